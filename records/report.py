#!/usr/bin/env python3
"""report.py: from run folders to a table, plots and a submission; and the planning half of gauntlet.sh.

    python records/report.py table  runs/a runs/b ...  [--baseline ROW] [--target 1.0810] [--out FOLDER]
    python records/report.py plots  runs/gauntlet
    python records/report.py record runs/my-run --name MyIdea --author "Ada L." --github-id ada

A path is a run folder or a folder of run folders. Metrics come from result.json. Only runs of another script, which
has none, are read from their log, once, into a result.json of the same shape. Every score carries its stage (raw, ema,
quantized, sliding, ttt) and rows are compared at one stage only, the last that they share.

Contents: 1 runs, 2 foreign logs, 3 statistics, 4 the table of experiments, 5 launching, 6 tables, 7 plots, 8 records,
9 commands.
Needs Python only; scores.npz needs numpy, plots need matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("raw", "ema", "quantized", "sliding", "ttt")
SIZE_CAP, TRAIN_CAP, EVAL_CAP = 16_000_000, 600.0, 600.0
STATUS_OF_CODE = {0: "done", 2: "bad-config", 3: "non-finite", 4: "over-budget"}
SIGNALS = (128 + 1, 128 + 2, 128 + 9, 128 + 15)
FAILED = ("crashed", "over-budget", "non-finite", "bad-config")
# Where things are and how they are launched: no part of what is measured.
PATHS = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH")
LOCATION = {"RUN_ID", "RUNS_DIR", "RESUME", "STRICT_ENV", "THREADS", *PATHS}


class ReportError(Exception):
    """Something the user can mend, in one line."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} is not readable JSON ({error}); delete the folder and run it again") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds no JSON object; delete the folder and run it again")
    return value


def write_text(path: Path, text: str) -> None:
    """Write beside the target and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


# ---- 1  Runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunData:
    """A run folder: what was asked (gauntlet.json, where the gauntlet launched it) and what came out."""

    folder: Path
    row: str
    seed: int
    status: str
    result: dict[str, Any]
    config: dict[str, Any]
    notes: dict[str, Any] = field(repr=False)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.result.get("stages", {}) if self.status == "done" else {}

    @property
    def foreign(self) -> bool:
        return self.result.get("source") == "log"

    def bpb(self, stage: str) -> float | None:
        return self.stages.get(stage, {}).get("val_bpb")

    @property
    def final(self) -> str | None:
        """The last stage that has a score."""
        return last_stage(self.stages)


def last_stage(stages: Iterable[str]) -> str | None:
    present = [stage for stage in STAGES if stage in set(stages)]
    return present[-1] if present else None


def alive(folder: Path) -> int:
    """The process that works on this folder now; 0 when there is none."""
    try:
        pid = int((folder / ".pid").read_text())
        os.kill(pid, 0)
        return pid
    except (OSError, ValueError):
        return 0


def run_status(folder: Path, notes: dict, result: dict) -> str:
    """done, running, interrupted or a way to fail. DONE is what our script leaves last."""
    if notes.get("status") == "running":
        return "running" if alive(folder) else "interrupted"
    if (folder / "DONE").exists():
        return "done"
    return notes.get("status") or result.get("status") or "interrupted"


def read_run(folder: Path) -> RunData:
    notes, result, config = (read_json(folder / name) for name in ("gauntlet.json", "result.json", "config.json"))
    request = notes.get("request", {})
    seed = request.get("seed", result.get("seed", config.get("seed", 0)))
    row = request.get("row") or re.sub(rf"-s{seed}$", "", folder.name)
    return RunData(folder, row, int(seed), run_status(folder, notes, result), result, config, notes)


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("gauntlet.json", "result.json", "config.json"))


def find_runs(paths: Sequence[Path]) -> list[RunData]:
    """Runs of every path, itself a run folder or a folder of run folders."""
    runs = []
    for path in paths:
        if not path.is_dir():
            raise ReportError(f"{path} is no folder; give run folders or a folder of them")
        folders = [path] if is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
        runs += [read_run(folder) for folder in folders if is_run(folder)]
    if not runs:
        raise ReportError(f"no run in {', '.join(map(str, paths))}; start one with gauntlet.sh run or train_gpt.py")
    return runs


# ---- 2  Foreign logs ------------------------------------------------------------------------------------------------

NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf)"
SCORE = re.compile(rf"^(.*?)\bval_loss: ?{NUMBER} +val_bpb: ?{NUMBER}(.*)$")
STEP_LABEL = re.compile(r"^(?:step[: ]?)?(\d+)/\d+ *$")
EVAL_TIME = re.compile(rf"eval_time: ?{NUMBER}(ms|s)")
TRAIN_TIME = re.compile(rf"train_time: ?{NUMBER}(ms|s|m)")
TRAIN_LOSS = re.compile(rf"^(?:step[: ]?)?(\d+)/(\d+) .*?train_loss: ?{NUMBER}")
IN_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0}
# Single facts: (key of the result, pattern, factor). The last line that matches counts.
FACTS = (
    ("artifact_bytes", re.compile(r"^Serialized model (?:quantized|int\d)\S*: (\d+) bytes"), 1),
    ("total_bytes", re.compile(r"^Total submission size (?:quantized|int\d)\S*: (\d+) bytes"), 1),
    ("code_bytes", re.compile(r"^Code size(?: \(compressed\))?: (\d+)(?: bytes)?"), 1),
    ("parameters", re.compile(r"^model_params: ?(\d+)"), 1),
    ("val_tokens", re.compile(r"\bval_(?:loader:.*?)?tokens: ?(\d+)"), 1),
    ("peak_memory_bytes", re.compile(r"peak memory allocated: ?(\d+) MiB"), 1 << 20),
    ("eval_seconds", re.compile(rf"^total_eval_time: ?{NUMBER}s"), 1.0),
    ("steps", re.compile(r"^stopping_early: .*step: ?(\d+)/"), 1),
)


def stage_of(label: str) -> str:
    """The stage that a score line's label names; ``other`` is never compared with anything."""
    label = label.strip().lower()
    if not label or STEP_LABEL.match(label):
        return "raw"
    if "ttt" in label:
        return "ttt"
    if "sliding" in label:
        return "sliding"
    if "pre-quant" in label or "pre_quant" in label:
        return "ema" if "ema" in label else "raw"
    if "quantized" in label or "roundtrip" in label:
        return "quantized"
    return "ema" if re.search(r"\bema\b", label) else "other"


def seconds_in(pattern: re.Pattern, line: str) -> float | None:
    found = pattern.search(line)
    return float(found[1]) * IN_SECONDS[found[2]] if found else None


def take_score(line: str, result: dict[str, Any]) -> None:
    """One ``val_loss: x val_bpb: y`` line (with or without spaces) into its stage; exact lines stay once seen."""
    found = SCORE.match(line)
    if not found:
        return
    label, loss, bpb, rest = found[1], float(found[2]), float(found[3]), found[4]
    stage, exact = stage_of(label), "exact" in label
    old = result["stages"].get(stage)
    if stage == "other" or (old and old["exact"] and not exact):
        return
    seconds = seconds_in(EVAL_TIME, rest) or (old or {}).get("seconds")
    result["stages"][stage] = dict(val_loss=loss, val_bpb=bpb, seconds=seconds, exact=exact)
    if step := STEP_LABEL.match(label.strip()):
        result["steps"] = int(step[1])


def parse_log(text: str) -> dict[str, Any]:
    """The community's log lines -> a result of the same shape as our result.json, stage by stage."""
    result: dict[str, Any] = dict(source="log", stages={}, curve=[])
    for line in text.splitlines():
        line = line.strip()
        take_score(line, result)
        for key, pattern, factor in FACTS:
            if found := pattern.search(line):
                result[key] = type(factor)(float(found[1]) * factor)
        if train := TRAIN_LOSS.match(line):
            result["curve"].append([int(train[1]), seconds_in(TRAIN_TIME, line), float(train[3])])
            result["steps"] = int(train[1])
        if (seconds := seconds_in(TRAIN_TIME, line)) is not None:
            result["train_seconds"] = seconds
    if "artifact_bytes" in result and "code_bytes" in result:
        result.setdefault("total_bytes", result["artifact_bytes"] + result["code_bytes"])
    return result


def unusable(result: dict[str, Any]) -> str:
    """Why a parsed log gives no score; empty when it does."""
    if not result["stages"]:
        return "its log has no line like 'val_loss:2.3 val_bpb:1.1'"
    bad = [s for s, row in result["stages"].items() if not math.isfinite(row["val_bpb"])]
    return f"its {bad[0]} score is not finite" if bad else ""


# ---- 3  Statistics --------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """Sample standard deviation; needs two values."""
    center = mean(values)
    return math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function I_x(a, b): Lentz's continued fraction."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny, c = 1e-300, 1.0
    d = 1 / max(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) of Student's t."""
    if math.isinf(t):
        return float(t > 0)
    share = t * t / (df + t * t)
    near = share < 0.5  # each form is exact where its argument is small
    tail = 0.5 * (1 - incomplete_beta(0.5, df / 2, share) if near else incomplete_beta(df / 2, 0.5, df / (df + t * t)))
    return 1 - tail if t > 0 else tail


def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, by bisection."""
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def ratio(difference: float, error: float) -> float:
    """difference / error, with its limits when the error is 0."""
    return difference / error if error else (math.copysign(math.inf, difference) if difference else 0.0)


def p_below_target(values: Sequence[float], target: float) -> float | None:
    """One-sided p of "the true mean is not below target"; None with fewer than two values."""
    if len(values) < 2:
        return None
    return t_cdf(ratio(mean(values) - target, std(values) / math.sqrt(len(values))), len(values) - 1)


def p_welch(values: Sequence[float], others: Sequence[float]) -> float | None:
    """One-sided p of "the mean of values is not below that of others", unequal variances."""
    if min(len(values), len(others)) < 2:
        return None
    a, b = std(values) ** 2 / len(values), std(others) ** 2 / len(others)
    if not a + b:
        return t_cdf(ratio(mean(values) - mean(others), 0.0), 1)
    df = (a + b) ** 2 / (a * a / (len(values) - 1) + b * b / (len(others) - 1))
    return t_cdf((mean(values) - mean(others)) / math.sqrt(a + b), df)


def p_paired(differences: Sequence[float]) -> float | None:
    """One-sided p of "the mean difference is not negative"."""
    return p_below_target(differences, 0.0)


def margin_needed(values: Sequence[float], target: float, level: float = 0.01) -> float | None:
    """How much lower the mean must get, at this spread, for p < level against the target; 0 when it is there."""
    if len(values) < 2:
        return None
    reach = t_quantile(1 - level, len(values) - 1) * std(values) / math.sqrt(len(values))
    return max(0.0, mean(values) - (target - reach))


# ---- 4  The table of experiments ------------------------------------------------------------------------------------


class Experiment(NamedTuple):
    """A row of gauntlet.txt. gpus 0: as many as --gpus says."""

    name: str
    group: str
    gpus: int
    seeds: tuple[int, ...]
    env: dict[str, str]
    accept: tuple[str, ...]
    script: str = ""


class Group(NamedTuple):
    name: str
    budget: str
    default: bool
    text: str


class Table(NamedTuple):
    """gauntlet.txt: budgets, groups, the flags that select groups, and the experiments, in their order."""

    budgets: dict[str, dict[str, str]]
    groups: dict[str, Group]
    flags: dict[str, tuple[str, list[str]]]
    rows: dict[str, Experiment]


def assignments(words: Iterable[str], where: str) -> dict[str, str]:
    """KEY=VALUE words as a dictionary."""
    out = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            raise ReportError(f"{where}: {word!r} is no KEY=VALUE")
        out[key] = value
    return out


def seed_list(text: str, where: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ReportError(f"{where}: seeds {text!r} must be integers with commas, such as 1337,42") from None
    if len(set(seeds)) != len(seeds):
        raise ReportError(f"{where}: a seed stands twice in {text!r}")
    return seeds


CONDITION = re.compile(r"^(\w+)(<=|>=|<|>)(?:([A-Za-z_][\w.]*)([-+][\d.eE-]+)?|([-+]?[\d.]+(?:[eE][-+]?\d+)?))$")


def parse_row(cells: list[str], where: str) -> Experiment:
    name, group, gpus, seeds, overrides, accept = cells
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ReportError(f"{where}: row name {name!r} may hold letters, digits, _ and . only")
    if gpus != "any" and not gpus.isdigit():
        raise ReportError(f"{where}: gpus {gpus!r} must be a number or any")
    conditions = () if accept in ("", "-") else tuple(accept.split())
    for condition in conditions:
        if not CONDITION.match(condition):
            raise ReportError(f"{where}: accept rule {condition!r} is not like bpb<1.1, bpb<naive-0.002, bytes<=16e6")
    env = assignments([] if overrides == "-" else overrides.split(), where)
    return Experiment(name, group, 0 if gpus == "any" else int(gpus), seed_list(seeds, where), env, conditions)


# Cells after the first word of a line of gauntlet.txt.
CELLS = dict(budget=2, group=4, flag=3, row=6)


def read_table(path: Path) -> Table:
    """gauntlet.txt; an error names the line."""
    table = Table({}, {}, {}, {})
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ReportError(f"cannot read the table {path}: {error.strerror}; set --table") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{path.name} line {number}"
        kind, *cells = (cell.strip() for cell in line.split("|"))
        if len(cells) != CELLS.get(kind, -1):
            raise ReportError(f"{where}: no budget, group, flag or row with its number of cells; see the file's head")
        if cells[0] in getattr(table, kind + "s"):
            raise ReportError(f"{where}: {kind} {cells[0]} stands twice")
        if kind == "budget":
            table.budgets[cells[0]] = assignments([] if cells[1] == "-" else cells[1].split(), where)
        elif kind == "group":
            table.groups[cells[0]] = Group(cells[0], cells[1], cells[2] == "yes", cells[3])
        elif kind == "flag":
            table.flags[cells[0]] = (cells[1], cells[2].split())
        else:
            row = parse_row(cells, where)
            if row.group not in table.groups:
                raise ReportError(f"{where}: row {row.name} names the group {row.group}, which stands nowhere above")
            if row.name in table.groups:
                raise ReportError(f"{where}: {row.name} names a group already; rename the row")
            table.rows[row.name] = row
    return table


def select(table: Table, names: Sequence[str], only: Iterable[str], skip: Iterable[str]) -> list[Experiment]:
    """The rows that names (rows or groups), the -only and the -skip flags choose, in the table's order."""
    for name in names:
        if name not in table.rows and name not in table.groups:
            raise ReportError(f"{name!r} is no row and no group of the table; gauntlet.sh list shows them")
    only = set(only)
    if only and names:
        raise ReportError("give names or an -only flag, not both")
    wanted = set(names) or only or {group.name for group in table.groups.values() if group.default}
    skip = set(skip)
    rows = [r for r in table.rows.values() if (r.name in wanted or r.group in wanted) and r.group not in skip]
    if not rows:
        raise ReportError("the flags select no row; gauntlet.sh list shows the groups")
    return rows


class Known(NamedTuple):
    """What train_gpt.py --help offers."""

    presets: set[str]
    knobs: set[str]


def ask_script(script: Path) -> Known:
    """Presets and knobs as the script itself lists them."""
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
    env = {name: os.environ[name] for name in names if name in os.environ}
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ReportError(f"{script} --help failed: {last}; pip install -r requirements.txt, or set PYTHON")
    head, _, rest = done.stdout.partition("Presets (PRESET=name):")
    return Known(
        set(re.findall(r"^  ([a-z]\w*)\s", rest, re.M)), set(re.findall(r"^  ([A-Z][A-Z0-9_]+)\s", head + rest, re.M))
    )


def missing_part(env: dict[str, str], known: Known) -> str:
    """What the script lacks for a row; empty when it can run it."""
    preset = env.get("PRESET")
    if preset and preset not in known.presets:
        return f"train_gpt.py has no preset {preset}"
    absent = [name for name in env if name not in known.knobs]
    return f"train_gpt.py has no knob {absent[0]}" if absent else ""


# ---- 5  Launching: what gauntlet.sh asks before and tells after a run -----------------------------------------------


class Task(NamedTuple):
    """One run of the plan. action: run, resume, skip (finished), failed, conflict, busy or unavailable."""

    action: str
    row: Experiment
    seed: int
    folder: Path
    request: dict[str, Any]
    reason: str


def same_value(a: Any, b: Any) -> bool:
    """Whether a variable's text and a configuration's value are the same setting."""
    texts = [str(int(v)) if isinstance(v, bool) else str(v).lower() for v in (a, b)]
    texts = [{"true": "1", "false": "0"}.get(text, text) for text in texts]
    try:
        return texts[0] == texts[1] or float(texts[0]) == float(texts[1])
    except ValueError:
        return False


def differences(folder: Path, request: dict[str, Any]) -> list[str]:
    """How a folder's run differs from the requested one, as ``NAME old -> new``."""
    old = read_json(folder / "gauntlet.json").get("request")
    config = {name.upper(): value for name, value in read_json(folder / "config.json").items()}
    env, found = request["env"], []
    for name, value in env.items():
        if name in config and name not in LOCATION and not same_value(value, config[name]):
            found.append(f"{name} {config[name]} -> {value}")
    if old:
        found += [
            f"{name} {old['env'].get(name, 'unset')} -> {env.get(name, 'unset')}"
            for name in sorted(set(env) | set(old["env"]))
            if not same_value(env.get(name), old["env"].get(name)) and name not in config
        ]
        found += [f"{key} {old[key]} -> {request[key]}" for key in ("gpus", "script") if old[key] != request[key]]
        dropped = set(old["env"]) - set(env)
        found += [f"{name} {old['env'][name]} -> unset" for name in sorted(dropped & set(config))]
    return found


def decide(folder: Path, request: dict[str, Any], again: bool, retry: bool) -> tuple[str, str]:
    """(action, reason) of one run, from what its folder holds."""
    if pid := alive(folder):
        return "busy", f"process {pid} works in {folder}; wait for it, or end it and remove {folder}/.pid"
    if again or not is_run(folder):
        return "run", ""
    changed = differences(folder, request)
    status = read_run(folder).status
    kept = "DONE" if status == "done" else "checkpoint.pt"
    if (folder / kept).exists() and changed:
        remedy = "--again runs it anew, --runs DIR keeps both"
        return "conflict", f"{folder} holds a run with other settings ({'; '.join(changed[:3])}): {remedy}"
    if status == "done":
        return "skip", "finished"
    if status in FAILED and not changed:
        return ("run", "") if retry else ("failed", f"{status} earlier; --retry runs it once more")
    return ("resume", "has a checkpoint") if (folder / "checkpoint.pt").exists() else ("run", "")


def row_env(table: Table, row: Experiment, args: argparse.Namespace) -> dict[str, str]:
    """Settings of a row: its budget, its own overrides, then the command line's."""
    budget = table.groups[row.group].budget if row.group in table.groups else next(iter(table.budgets), "own")
    name = budget if budget == "own" else args.budget or budget
    for asked in filter(None, (name, args.budget)):
        if asked != "own" and asked not in table.budgets:
            raise ReportError(f"budget {asked!r} is none of {', '.join(table.budgets)}")
    env = {} if name == "own" else dict(table.budgets[name])
    env |= row.env
    if args.steps:
        env |= {"ITERATIONS": str(args.steps), "MAX_WALLCLOCK_SECONDS": "0"}
    if args.vocab:
        env["VOCAB_SIZE"] = str(args.vocab)
    return env | assignments(args.set, "--set")


def nearest_knob(name: str, knobs: Iterable[str]) -> str:
    """How a line ends that tells of a name which is no knob."""
    near = difflib.get_close_matches(name, knobs, n=1)
    return f"; did you mean {near[0]}?" if near else "; train_gpt.py --help lists them"


def plan(args: argparse.Namespace, table: Table, only: list[str], skip: list[str]) -> list[Task]:
    """Every selected (row, seed) and what is to be done about it. Touches nothing."""
    rows = [] if args.script and not (args.names or only) else select(table, args.names, only, skip)
    known = ask_script(ROOT / "train_gpt.py") if rows else Known(set(), set())
    for name in assignments(args.set, "--set") if rows else ():
        if name not in known.knobs:
            raise ReportError(f"--set {name}: train_gpt.py has no such knob{nearest_knob(name, known.knobs)}")
    if args.script:
        rows = rows + [peer_row(args)]
    tasks = []
    for row in rows:
        env = row_env(table, row, args)
        lacks = "" if row.script else missing_part(env, known)
        if row.gpus and row.gpus != args.gpus:
            lacks = lacks or f"needs --gpus {row.gpus}"
        for seed in seed_list(args.seeds, "--seeds") if args.seeds else row.seeds:
            folder = args.runs / f"{row.name}-s{seed}"
            request = dict(
                row=row.name, group=row.group, seed=seed, gpus=row.gpus or args.gpus, script=row.script, env=env,
                accept=list(row.accept),
            )  # fmt: skip
            action, reason = ("unavailable", lacks) if lacks else decide(folder, request, args.again, args.retry)
            tasks.append(Task(action, row, seed, folder, request, reason))
    return tasks


def peer_row(args: argparse.Namespace) -> Experiment:
    """Another script as a row of its own, under its folder's name unless --name says otherwise."""
    if not args.script.is_file():
        raise ReportError(f"--script {args.script} is no file")
    generic = args.script.stem in ("train_gpt", "main", "train")
    name = args.name or re.sub(r"[^A-Za-z0-9_.]+", "_", args.script.parent.name if generic else args.script.stem)
    return Experiment(name, "peers", 0, (1337,), {}, (), str(args.script))


def environment_of(request: dict[str, Any], folder: Path, resume: bool) -> dict[str, str]:
    """Every variable of a run but those of the machine. Paths of a peer, which runs in its folder, are absolute."""
    env = {name: os.environ[name] for name in ("DATASET", *PATHS) if os.environ.get(name)}
    env |= request["env"]
    env |= dict(SEED=str(request["seed"]), RUN_ID=folder.name, RUNS_DIR=str(folder.parent), STRICT_ENV="1")
    if resume:
        env["RESUME"] = "1"
    if request["script"]:
        env |= {key: str(Path(env[key]).resolve()) for key in PATHS if key in env}
    return env


def set_aside(folder: Path) -> None:
    """Keep what an earlier, unusable run left, out of the way."""
    if folder.exists():
        old = folder.parent / ".old" / f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        while old.exists():
            old = old.with_name(old.name + "+")
        old.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(old)


def machine() -> dict[str, Any]:
    """GPUs, driver and the versions of the packages that requirements.txt names."""
    facts: dict[str, Any] = dict(python=sys.version.split()[0], packages={}, gpus=[])
    requirements = ROOT / "requirements.txt"
    names = re.findall(r"^[A-Za-z][\w.-]*", requirements.read_text(), re.M) if requirements.exists() else []
    for name in names:
        try:
            facts["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        facts["gpus"] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[:-1]
    except (OSError, subprocess.SubprocessError):
        pass
    return facts


def begin(folder: Path, request: dict[str, Any], resume: bool) -> list[str]:
    """Make the run folder, note the request, and return the run's variables as NAME=VALUE lines."""
    notes = read_json(folder / "gauntlet.json") if resume else {}
    if not resume:
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if request["script"]:
        link = folder / "data"
        if not link.is_symlink():
            link.symlink_to(Path(os.environ.get("DATA_DIR", ROOT / "data")).resolve())
        shutil.copy(request["script"], folder / "train_gpt.py")
    write_json(
        folder / "gauntlet.json",
        dict(
            request=request, status="running", started=time.time(), attempts=notes.get("attempts", 0) + 1,
            seconds=notes.get("seconds", 0.0), machine=machine(),
        ),
    )  # fmt: skip
    return [f"{name}={value}" for name, value in environment_of(request, folder, resume).items()]


def exit_code(folder: Path, code: int) -> int:
    """The run's own code: torchrun says 1 whatever a rank said, so each rank leaves its code in .exit.<rank>."""
    codes = [int(path.read_text() or 1) for path in sorted(folder.glob(".exit.*"))]
    for path in folder.glob(".exit.*"):
        path.unlink()
    telling = [c for c in codes if c in (2, 3, 4)]
    return telling[0] if telling else code if code or not any(codes) else next(c for c in codes if c)


def settle(folder: Path, code: int, stopped: bool) -> RunData:
    """Note how a run ended; a peer's log becomes its result.json here."""
    notes = read_json(folder / "gauntlet.json")
    code = exit_code(folder, code)
    status = STATUS_OF_CODE.get(code, "interrupted" if code in SIGNALS or code < 0 else "crashed")
    reason = ""
    if status == "done" and notes["request"]["script"]:
        result = parse_log((folder / "console.log").read_text(encoding="utf-8", errors="replace"))
        reason = unusable(result)
        status = "crashed" if reason else "done"
        if not reason:
            write_json(folder / "result.json", result | dict(status="done", seed=notes["request"]["seed"]))
            (folder / "DONE").touch()
    elif status == "done" and not (folder / "DONE").exists():
        status, reason = "crashed", "it ended with code 0 but left no DONE"
    if stopped and status != "done":
        status = "interrupted"
    notes |= dict(status=status, code=code, seconds=notes["seconds"] + time.time() - notes["started"], reason=reason)
    write_json(folder / "gauntlet.json", notes)
    (folder / ".pid").unlink(missing_ok=True)
    return read_run(folder)


RAISED = re.compile(r"(\[rank\d+\]: )?(?![\w.]*ChildFailedError)[\w.]+(Error|Exception|Failed)\b(: .|$)")


def last_words(folder: Path) -> str:
    """The last line that a failed run printed: its own message, else that of an exception, else whatever it is."""
    try:
        lines = (folder / "console.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    ours = [line for line in lines if line.startswith("error:")]
    raised = [line for line in lines if RAISED.match(line)]
    return (ours or raised or lines or [""])[-1][:300]


def describe_end(run: RunData) -> str:
    """One line on how a run ended."""
    took = f"{run.notes.get('seconds', 0):.0f}s"
    if run.status != "done":
        why = run.notes.get("reason") or last_words(run.folder)
        return f"{run.status} (code {run.notes.get('code')}) after {took}: {why}"
    size = run.result.get("total_bytes")
    return f"done in {took}: {run.final} bpb {run.bpb(run.final):.4f}" + (f", {size:,} bytes" if size else "")


# ---- 6  Tables ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """All runs of one row, and what the plan says of those that have no folder."""

    name: str
    runs: list[RunData]
    accept: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        return next((run.notes["request"]["group"] for run in self.runs if run.notes), "")

    @property
    def done(self) -> list[RunData]:
        return [run for run in self.runs if run.status == "done"]

    def scores(self, stage: str) -> dict[int, float]:
        """bpb at a stage by seed."""
        return {run.seed: run.bpb(stage) for run in self.done if run.bpb(stage) is not None}

    def values(self, key: str) -> list[float]:
        """A number of result.json over the finished runs that have it."""
        return [run.result[key] for run in self.done if isinstance(run.result.get(key), (int, float))]

    @property
    def stages(self) -> set[str]:
        """Stages that every finished run has."""
        return set.intersection(*[set(run.stages) for run in self.done]) if self.done else set()

    @property
    def status(self) -> str:
        """Counts of every way that the runs ended; never blank."""
        words = [run.status for run in self.runs] + list(self.absent)
        counts = {word: words.count(word) for word in dict.fromkeys(words)}
        return ", ".join(word if n == 1 else f"{word} x{n}" for word, n in counts.items()) or "not run"


def gather(runs: Sequence[RunData], tasks: Sequence[dict[str, Any]] = ()) -> list[Row]:
    """Runs by row, in the plan's order; rows of the plan without a run stay in."""
    names = list(dict.fromkeys([task["row"] for task in tasks] + [run.row for run in runs]))
    accept = {task["row"]: tuple(task["accept"]) for task in tasks}
    have = {(run.row, run.seed) for run in runs}
    rows = []
    for name in names:
        absent = [task for task in tasks if task["row"] == name and (name, task["seed"]) not in have]
        words = tuple(f"{t['action'] if t['action'] != 'run' else 'not run'}" for t in absent)
        mine = [run for run in runs if run.row == name]
        rules = accept.get(name) or tuple(next((r.notes["request"]["accept"] for r in mine if r.notes), ()))
        rows.append(Row(name, mine, rules, words))
    return rows


class Comparison(NamedTuple):
    """A row against another at the last stage that both have; differences are row minus other."""

    stage: str
    pairs: int
    difference: float
    spread: float | None
    p_paired: float | None
    p_welch: float | None


def compare(row: Row, other: Row) -> Comparison | None:
    stage = last_stage(row.stages & other.stages)
    if stage is None:
        return None
    mine, theirs = row.scores(stage), other.scores(stage)
    paired = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    difference = mean(paired) if paired else mean(list(mine.values())) - mean(list(theirs.values()))
    spread = std(paired) if len(paired) > 1 else None
    welch = p_welch(list(mine.values()), list(theirs.values()))
    return Comparison(stage, len(paired), difference, spread, p_paired(paired), welch)


# train_gpt.TRAINING_PARTS, for tables on machines without torch
TRAINING_PARTS = {
    "train": "train_seconds", "choose weights": "calibration_seconds", "calibration text": "calibration_text_seconds",
    "Hessians": "hessian_seconds", "gradients": "fisher_seconds", "quantize, pack": "quantize_pack_seconds",
}  # fmt: skip
TIME_PARTS = {"start-up": "startup_seconds", **TRAINING_PARTS, "evaluate": "eval_seconds"}


def training_seconds(run: RunData) -> float:
    """The training clock as the rules count it: steps and whatever makes the file."""
    return sum(run.result.get(key, 0.0) for key in TRAINING_PARTS.values())


WORST: dict[str, tuple[Callable[[RunData], float | None], Callable]] = {
    "bytes": (lambda run: run.result.get("total_bytes"), max),
    "steps": (lambda run: run.result.get("steps"), min),
    "training_seconds": (lambda run: training_seconds(run) if "train_seconds" in run.result else None, max),
    "eval_seconds": (lambda run: run.result.get("eval_seconds"), max),
}


def judge_condition(row: Row, condition: str, rows: dict[str, Row]) -> tuple[bool | None, str]:
    """(holds, evidence); None where it cannot be judged."""
    metric, sign, other, offset, number = CONDITION.match(condition).groups()
    stage = metric if metric in STAGES else last_stage(row.stages)
    if metric != "bpb" and metric not in STAGES and metric not in WORST:
        return None, f"{condition}: no metric {metric}"
    if other and metric not in WORST:
        shared = row.stages & rows[other].stages if other in rows else set()
        stage = metric if metric in shared else last_stage(shared) if metric == "bpb" else None
        if stage is None:
            return None, f"{condition}: {other} has no score at a shared stage"
        number = mean(list(rows[other].scores(stage).values())) + float(offset or 0)
    elif other:
        return None, f"{condition}: {metric} is compared with numbers only"
    if metric in WORST:
        told, worst = WORST[metric]
        values = [value for run in row.done if isinstance(value := told(run), (int, float))]
        value = worst(values) if values else None
    else:
        scores = list(row.scores(stage).values()) if stage else []
        value = mean(scores) if scores else None
    if value is None:
        return None, f"{condition}: no {metric}"
    limit = float(number)
    holds = {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[sign]
    return holds, f"{condition}: {value:.6g} against {limit:.6g}{f' ({stage})' if metric == 'bpb' else ''}"


def judge(row: Row, rows: dict[str, Row]) -> tuple[bool | None, list[str]]:
    """All conditions of a row: False if one is false, None if one cannot be judged or nothing is asked."""
    if not row.accept or not row.done:
        return None, []
    verdicts = [judge_condition(row, condition, rows) for condition in row.accept]
    answers = [holds for holds, _ in verdicts]
    overall = False if False in answers else None if None in answers else True
    return overall, [text for holds, text in verdicts if holds is not True]


def shown(values: Sequence[float], digits: int = 4) -> str:
    """mean +- std; the mean alone of one value."""
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {std(values):.{digits}f}" if len(values) > 1 else text


def shown_p(p: float | None) -> str:
    return "-" if p is None else "<1e-6" if p < 1e-6 else f"{p:.2g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table: the first column left, the others right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = []
    for first, *rest in cells:
        others = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *others]) + " |")
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def ranked(rows: Sequence[Row]) -> tuple[list[Row], str | None]:
    """Rows by bpb at the last stage that all scored rows share; rows without a score come last."""
    scored = [row for row in rows if row.stages]
    stage = last_stage(set.intersection(*[row.stages for row in scored])) if scored else None
    if stage:
        scored.sort(key=lambda row: mean(list(row.scores(stage).values())))
    return scored + [row for row in rows if not row.stages], stage


def score_table(rows: Sequence[Row], base: Row | None) -> str:
    """Scores of every stage, the difference from the base row, and the accept rule."""
    used = [stage for stage in STAGES if any(stage in row.stages for row in rows)]
    by_name = {row.name: row for row in rows}
    out = []
    for row in rows:
        cells = [row.name, f"{len(row.done)}/{len(row.runs) + len(row.absent)}"]
        cells += [shown(list(row.scores(stage).values())) for stage in used]
        versus = compare(row, base) if base and row.name != base.name else None
        if versus:
            spread = f" ± {versus.spread:.4f}" if versus.spread is not None else ""
            cells += [f"{versus.difference:+.4f}{spread}", f"{versus.pairs} at {versus.stage}"]
            cells += [shown_p(versus.p_paired), shown_p(versus.p_welch)]
        else:
            cells += ["base" if base and row.name == base.name else "-", "-", "-", "-"]
        verdict = judge(row, by_name)[0]
        cells += [{True: "yes", False: "NO", None: "-"}[verdict], row.status]
        out.append(cells)
    head = ["row", "done", *used, f"vs {base.name}" if base else "vs -", "pairs", "p paired", "p Welch"]
    return markdown([*head, "accepted", "status"], out)


def cost_table(rows: Sequence[Row]) -> str:
    """Bytes, steps and where the time went, of rows with a finished run."""

    def number(row: Row, key: str, form: str, scale: float = 1.0, pick: Callable = mean) -> str:
        values = row.values(key)
        return format(pick(values) * scale, form) if values else "-"

    out = []
    for row in rows:
        if not row.done:
            continue
        pace = [
            1e3 * run.result["train_seconds"] / run.result["steps"]
            for run in row.done
            if run.result.get("steps") and run.result.get("train_seconds")
        ]
        out.append(
            [
                row.name, number(row, "total_bytes", ",.0f", pick=max), number(row, "code_bytes", ",.0f"),
                number(row, "steps", ".0f"), shown(pace, 1), number(row, "tokens_per_second", ",.0f"),
                number(row, "startup_seconds", ".1f"), number(row, "train_seconds", ".1f"),
                number(row, "hessian_seconds", ".1f"), number(row, "quantize_pack_seconds", ".1f"),
                number(row, "eval_seconds", ".1f"), number(row, "peak_memory_bytes", ".1f", 1 / (1 << 30)),
            ]
        )  # fmt: skip
    head = ["row", "most bytes", "code bytes", "steps", "ms/step", "tok/s", "start-up s", "train s", "Hessians s"]
    return markdown([*head, "pack s", "eval s", "peak GiB"], out)


def target_table(rows: Sequence[Row], target: float) -> str:
    """Each row against a fixed bpb: one-sided p, and how much lower its mean must get for p < 0.01."""
    out = []
    for row in rows:
        if stage := last_stage(row.stages):
            values = list(row.scores(stage).values())
            need = margin_needed(values, target)
            cells = [row.name, stage, str(len(values)), shown(values, 5), f"{mean(values) - target:+.5f}"]
            cells += [shown_p(p_below_target(values, target)), "needs 2 runs" if need is None else f"{need:.5f}"]
            out.append(cells)
    return markdown(["row", "stage", "n", "bpb", f"minus {target:g}", "p", "still needed for p<0.01"], out)


def warnings_of(rows: Sequence[Row], by_name: dict[str, Row]) -> list[str]:
    """What a reader must know: mixed code within a row, rules that fail or cannot be judged, failures."""
    lines = []
    for row in rows:
        codes = {script_hash(run) for run in row.done}
        if len(codes) > 1:
            lines.append(f"{row.name}: its runs come from {len(codes)} versions of the script")
        lines += [f"{row.name}: {text}" for text in judge(row, by_name)[1]]
        lines += [f"{r.folder.name}: {describe_end(r)}" for r in row.runs if r.status in FAILED and r.notes]
    return lines


def script_hash(run: RunData) -> str:
    """SHA-256 of the script copy in the run folder; empty without one."""
    path = run.folder / "train_gpt.py"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def full_report(rows: list[Row], baseline: str | None, target: float | None) -> str:
    """The Markdown page."""
    ordered, stage = ranked(rows)
    by_name = {row.name: row for row in rows}
    if baseline and baseline not in by_name:
        raise ReportError(f"--baseline {baseline} is none of {', '.join(by_name)}")
    controls = sorted((row for row in rows if row.stages), key=lambda row: row.group != "baseline")
    base = by_name[baseline] if baseline else next(iter(controls), None)
    caption = f"Ranked by {stage} bpb (lower is better), the last stage that all scored rows share." if stage else ""
    parts = ["# Results", caption, score_table(ordered, base)]
    if any(row.done for row in rows):
        parts += ["## Bytes and time", cost_table(ordered)]
    if target is not None:
        parts += [f"## Against {target:g} bpb", target_table(ordered, target)]
    notes = warnings_of(ordered, by_name)
    parts += ["## Notes", "\n".join(f"- {line}" for line in notes)] if notes else []
    return "\n\n".join(part for part in parts if part) + "\n"


CSV_KEYS = (
    "preset", "device", "world_size", "git_sha", "steps", "train_seconds", "startup_seconds", "hessian_seconds",
    "quantize_pack_seconds", "eval_seconds", "tokens_per_second", "peak_memory_bytes", "artifact_bytes", "code_bytes",
    "total_bytes",
)  # fmt: skip


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a run, one column a stage and number."""
    header = ["row", "seed", "status", *CSV_KEYS, *[f"{s}_{m}" for s in STAGES for m in ("val_bpb", "val_loss")]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(header)
        for run in (run for row in rows for run in row.runs):
            scores = [run.stages.get(s, {}).get(m, "") for s in STAGES for m in ("val_bpb", "val_loss")]
            out.writerow([run.row, run.seed, run.status, *[run.result.get(key, "") for key in CSV_KEYS], *scores])


def load_rows(paths: Sequence[Path]) -> list[Row]:
    """Rows of run folders, with the plan of a gauntlet folder where there is one."""
    tasks = [task for path in paths for task in read_json(path / "plan.json").get("tasks", [])]
    try:
        runs = find_runs(paths)
    except ReportError:
        if not tasks:
            raise
        runs = []
    return gather(runs, tasks)


# ---- 7  Plots -------------------------------------------------------------------------------------------------------


def curve(run: RunData) -> list[tuple[int, float | None, float]]:
    """(step, seconds, loss) of training."""
    if run.foreign:
        return [tuple(point) for point in run.result.get("curve", [])]
    points = [(e["step"], e["seconds"], e["loss"]) for e in events(run, "train")]
    return sorted({point[0]: point for point in points}.values())


def events(run: RunData, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a kind; a half-written last line is passed over."""
    try:
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        out += [event] if event.get("event") == kind else []
    return out


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential average without bias at its start; short curves stay as they are."""
    memory = min(max(1 - 30 / len(values), 0.0), 0.9)
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + 1 - memory
        out.append(total / weight)
    return out


def import_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ReportError("plots need matplotlib; pip install matplotlib (tables work without it)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"figure.figsize": (9, 5.4), "figure.dpi": 130, "font.size": 11, "axes.grid": True, "grid.alpha": 0.3,
         "axes.spines.top": False, "axes.spines.right": False, "savefig.bbox": "tight"}
    )  # fmt: skip
    return plt


def save(plt: Any, figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def look(index: int) -> dict[str, Any]:
    """Colour and marker of a row: 10 dark colours, 10 light ones, then other markers."""
    import matplotlib

    colors = matplotlib.colormaps["tab20"].colors
    return dict(color=colors[2 * (index % 10) + index // 10 % 2], marker="osD^vP"[index // 20 % 6])


def legend(axes: Any) -> None:
    """Inside while it is small, else beside the axes."""
    many = len(axes.get_legend_handles_labels()[1]) > 6
    place = dict(loc="upper left", bbox_to_anchor=(1.0, 1.0)) if many else {}
    axes.legend(frameon=False, fontsize=9 if many else 11, **place)


def plot_loss(plt: Any, rows: Sequence[Row], path: Path, column: int, label: str) -> Path | None:
    """Training loss against steps (column 0) or seconds (column 1): one colour a row, later seeds dashed."""
    figure, axes = plt.subplots()
    points_drawn, drawn = [], 0
    for index, row in enumerate(rows):
        curves = [[p for p in curve(run) if p[column] is not None and math.isfinite(p[2])] for run in row.runs]
        curves = curves[:1] if len(rows) > 6 else curves
        for order, points in enumerate(points for points in curves if len(points) > 1):
            xs, ys = [p[column] for p in points], smooth([p[2] for p in points])
            style = dict(lw=1.7) if order == 0 else dict(lw=1.1, ls="--", alpha=0.8)
            axes.plot(xs, ys, color=look(index)["color"], label=None if order else row.name, **style)
            points_drawn += zip(xs, ys, strict=True)
            drawn += 1
    if not drawn:
        plt.close(figure)
        return None
    first = 0.05 * max(points_drawn)[0]
    late = [y for x, y in points_drawn if x >= first]  # the first steps would flatten the rest
    margin = 0.05 * (max(late) - min(late)) + 1e-3
    axes.set_ylim(min(late) - margin, max(late) + margin)
    lines = "the first run of each row" if len(rows) > 6 else "one line a run"
    axes.set(xlabel=label, ylabel="training loss (nats a token)", title=f"Training loss, {lines} ({drawn})")
    legend(axes)
    return save(plt, figure, path)


def draw_cap(axes: Any, largest: float) -> None:
    """The 16 MB line, where the bars or points come near it."""
    if largest > 0.4 * SIZE_CAP / 1e6:
        axes.axvline(SIZE_CAP / 1e6, color="crimson", lw=1.2, label="cap")


def label_pareto(axes: Any, stage: str) -> None:
    """What the axes of scores against sizes are, and the legend."""
    axes.set(xlabel="code + artifact (MB of 1,000,000 bytes)", ylabel=f"{stage} score (bits per byte)")
    axes.set_title("Score against size (lower left is better)")
    legend(axes)


def plot_pareto(plt: Any, rows: Sequence[Row], path: Path) -> Path | None:
    """bpb against the bytes that count, at one stage; whiskers are one standard deviation over seeds."""
    placed = [row for row in rows if row.stages & set(STAGES[2:]) and row.values("total_bytes")]
    stage = last_stage(set.intersection(*[row.stages for row in placed])) if placed else None
    if stage not in STAGES[2:]:
        return None
    figure, axes = plt.subplots()
    points = []
    for index, row in enumerate(placed):
        scores = list(row.scores(stage).values())
        size, score = mean(row.values("total_bytes")) / 1e6, mean(scores)
        spread = std(scores) if len(scores) > 1 else None
        axes.errorbar(size, score, yerr=spread, ls="", ms=7, capsize=4, label=row.name, **look(index))
        points.append((size, score))
    front = [p for p in sorted(points) if all(p[1] < q[1] for q in points if q[0] < p[0])]
    axes.step(*zip(*front, strict=True), where="post", color="0.5", lw=1, ls="--", zorder=0, label="Pareto front")
    largest = max(size for size, _ in points)
    draw_cap(axes, largest)
    axes.margins(0.12)
    label_pareto(axes, stage)
    return save(plt, figure, path)


def stacked_bars(
    plt: Any, rows: Sequence[Row], path: Path, parts: dict[str, str], scale: float, labels: tuple[str, str]
) -> Path | None:
    """Horizontal stacked bars: one bar a row, one colour a part of result.json; the total stands at the end."""
    kept = [row for row in rows if any(row.values(key) for key in parts.values())]
    if not kept:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.42 * len(kept)))
    left = [0.0] * len(kept)
    for part, key in parts.items():
        widths = [mean(row.values(key) or [0.0]) * scale for row in kept]
        axes.barh(range(len(kept)), widths, left=left, height=0.62, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if scale == 1e-6:
        draw_cap(axes, max(left))
    for index, total in enumerate(left):
        axes.text(total, index, f" {total:.2f}" if total < 100 else f" {total:.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(kept)), [row.name for row in kept])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.set(xlabel=labels[1])
    axes.set_title(labels[0], pad=14 + 14 * math.ceil(len(parts) / 4))
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.1)
    return save(plt, figure, path)


def role_sizes(tensors: dict[str, dict]) -> dict[str, tuple[float, float]]:
    """Role -> (bytes, weights), layers taken together, from the exporter's ledger; vectors are one role."""
    found: dict[str, tuple[float, float]] = {}
    for name, row in tensors.items():
        role = re.sub(r"^(blocks|skips)\.\w+\.|\.weight$", "", name) if row["weights"] > 16384 else "vectors"
        size, weights = found.get(role, (0.0, 0.0))
        found[role] = size + row["bytes"], weights + row["weights"]
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def plot_roles(plt: Any, rows: Sequence[Row], path: Path) -> Path | None:
    """Who eats the bytes: MB and bits a weight of each role, of the first run that kept its exporter's ledger."""
    runs = [run for row in rows for run in row.runs if run.result.get("export", {}).get("tensors")]
    if not runs:
        return None
    roles = role_sizes(runs[0].result["export"]["tensors"])
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.36 * len(roles)))
    axes.barh(range(len(roles)), [size * 1e-6 for size, _ in roles.values()], height=0.62)
    for index, (size, weights) in enumerate(roles.values()):
        axes.text(size * 1e-6, index, f" {size * 1e-6:.2f} MB, {8 * size / weights:.2f} bits", va="center", fontsize=9)
    axes.set_yticks(range(len(roles)), list(roles))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.22)
    axes.set(xlabel="MB of 1,000,000 bytes", title=f"Bytes and bits a weight by role ({runs[0].folder.name})")
    return save(plt, figure, path)


def plot_residuals(plt: Any, rows: Sequence[Row], path: Path) -> Path | None:
    """Relative residual of a fixed-point solver by iteration, from result.json's deq.residuals."""
    figure, axes = plt.subplots()
    drawn = 0
    for index, row in enumerate(rows):
        for run in row.done[:1]:
            values = (run.result.get("deq") or {}).get("residuals")
            if isinstance(values, list) and values and all(isinstance(v, (int, float)) for v in values):
                axes.semilogy(range(1, len(values) + 1), values, ms=4, label=row.name, **look(index))
                drawn += 1
    if not drawn:
        plt.close(figure)
        return None
    axes.set(xlabel="solver iteration", ylabel="median relative residual a token", title="Convergence of the solver")
    legend(axes)
    return save(plt, figure, path)


def plot_depth(plt: Any, rows: Sequence[Row], path: Path) -> Path | None:
    """Bits a byte against the solver iterations of evaluation, from result.json's deq.depth."""
    figure, axes = plt.subplots()
    drawn = 0
    for index, row in enumerate(rows):
        for run in row.done[:1]:
            depth = (run.result.get("deq") or {}).get("depth") or {}
            points = sorted((int(count), found["bpb"]) for count, found in depth.items())
            if points:
                axes.semilogx(*zip(*points, strict=True), base=2, ms=5, label=row.name, **look(index))
                drawn += 1
    if not drawn:
        plt.close(figure)
        return None
    axes.set(xlabel="solver iterations in evaluation", ylabel="bits per byte (first validation windows)")
    axes.set_title("Depth as a dial after training")
    legend(axes)
    return save(plt, figure, path)


def draw_plots(rows: Sequence[Row], out: Path) -> list[Path]:
    """Every plot that the runs have data for."""
    plt = import_pyplot()
    sizes = {"artifact": "artifact_bytes", "code": "code_bytes"}
    made = [
        plot_loss(plt, rows, out / "loss_steps.png", 0, "optimizer step"),
        plot_loss(plt, rows, out / "loss_seconds.png", 1, "training clock (seconds)"),
        plot_pareto(plt, rows, out / "pareto.png"),
        stacked_bars(plt, rows, out / "bytes.png", sizes, 1e-6, ("Byte budget", "MB of 1,000,000 bytes (cap: 16)")),
        plot_roles(plt, rows, out / "roles.png"),
        stacked_bars(plt, rows, out / "time.png", TIME_PARTS, 1.0, ("Time ledger", "seconds")),
        plot_residuals(plt, rows, out / "residuals.png"),
        plot_depth(plt, rows, out / "depth.png"),
    ]
    return [path for path in made if path]


# ---- 8  Records -----------------------------------------------------------------------------------------------------


class Track(NamedTuple):
    """What a track of the challenge asks for."""

    seeds: int
    timed: bool
    text: str


TRACKS = {
    "10min_16mb": Track(3, True, "10 minutes on 8xH100, 16,000,000 bytes"),
    "non_record_16mb": Track(1, False, "non-record: 16,000,000 bytes, compute unlimited"),
}
# Settings that may differ between the seeds of one submission.
PER_RUN = {"seed", "run_id", "runs_dir", "resume", "data_dir", "data_path", "tokenizer_path", "threads"}
# Which mechanism a configuration uses, and the pull request of the challenge that brought it.
ATTRIBUTION: tuple[tuple[str, str, Callable[[dict], bool]], ...] = (
    ("GPTQ, quantized embedding", "#1394", lambda c: bool(c.get("gptq"))),
    ("depth recurrence", "#1204, #1493", lambda c: any(c.get(name) for name in ("num_loops", "recur_layers"))),
    ("passes over all layers", "#298", lambda c: c.get("num_passes", 1) > 1),
    ("two lanes", "#1204, #1435", lambda c: bool(c.get("parallel_start_layer"))),
    ("hashed bigrams", "#1435", lambda c: bool(c.get("bigram_vocab_size"))),
    ("value embeddings", "#1435", lambda c: bool(c.get("ve_layers"))),
    ("parallel residuals", "#1204, #1412", lambda c: c.get("parallel_residual_start", -1) >= 0),
    ("leaky squared ReLU", "#549", lambda c: bool(c.get("mlp_slope"))),
    ("exclusive self-attention", "#198, #1019", lambda c: bool(c.get("xsa_last_n"))),
    ("partial rotary, layer scale", "#287", lambda c: bool(c.get("rope_dims")) and bool(c.get("ln_scale"))),
    ("row-normalized Muon", "#1285", lambda c: bool(c.get("muon_row_normalize"))),
    ("sparse attention gate", "#1787", lambda c: c.get("attn_gate") == "sparse"),
    ("SmearGate", "#1667", lambda c: bool(c.get("smear_gate"))),
    ("one layer run to its fixed point", "#1783", lambda c: c.get("deq_layer", -1) >= 0),
    ("score-first test-time training", "#461, #549", lambda c: bool(c.get("ttt_enabled"))),
)


class Evidence(NamedTuple):
    """What scores.npz and the files of a run prove."""

    targets: int
    bpb: float
    once: bool
    before: bool
    updates: int
    artifact: int
    code: int
    sha256: str


def git(*arguments: str) -> str:
    """Output of a git command in this repository; empty when it fails."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit_of(run: RunData) -> tuple[str, str]:
    """(commit whose train_gpt.py ran, complaint).

    A run made outside a repository or on a dirty tree is found by its script's content: the script is all that runs.
    """
    sha = run.result.get("git_sha", "")
    script = run.folder / "train_gpt.py"
    if not script.exists():
        return "", f"{run.folder} lacks train_gpt.py, the script that ran; run again"
    blob = git("hash-object", str(script)).strip()
    if not sha or sha.endswith("+"):
        touched = git("log", "--all", "--format=%H", f"--find-object={blob}", "--", "train_gpt.py").split()
        found = next((sha for sha in touched if git("rev-parse", f"{sha}:train_gpt.py").strip() == blob), "")
        where = f"on a dirty tree ({sha[:12]})" if sha else "outside a repository"
        return found, "" if found else f"{run.folder} ran {where} a script that is in no commit; commit, then run again"
    committed = git("rev-parse", "--verify", "-q", f"{sha}:train_gpt.py").strip()
    if committed and committed != blob:
        return "", f"the script in {run.folder} is not that of its commit {sha[:12]}; run again"
    return sha, ""


def collect_evidence(run: RunData) -> Evidence:
    """Recompute from scores.npz and the files; ReportError where something is missing."""
    try:
        import numpy as np
    except ImportError:
        raise ReportError("record needs numpy; pip install -r requirements.txt") from None
    files = {name: run.folder / name for name in ("scores.npz", "final_model.ptz", "train_gpt_packed.py", "train.log")}
    for name, path in files.items():
        if not path.exists():
            why = "run with SAVE_SCORES=1" if name == "scores.npz" else "run again"
            raise ReportError(f"{run.folder} has no {name}; {why}")
    try:
        scores = np.load(files["scores.npz"])
        nll, nbytes, order, trained = (scores[name] for name in ("nll", "nbytes", "order", "trained_before"))
    except Exception as error:
        raise ReportError(f"{files['scores.npz']} is damaged ({error}); score the artifact again") from error
    nats, size = float(nll.astype(np.float64).sum()), int(nbytes.astype(np.int64).sum())
    blob = files["final_model.ptz"].read_bytes()
    return Evidence(
        len(nll), nats / math.log(2) / max(size, 1), bool(np.array_equal(np.sort(order), np.arange(len(nll)))),
        bool((trained <= order).all()), int(len(np.unique(trained[trained > 0]))), len(blob),
        files["train_gpt_packed.py"].stat().st_size, hashlib.sha256(blob).hexdigest(),
    )  # fmt: skip


def config_of(run: RunData) -> dict[str, Any]:
    return {k: v for k, v in (run.result.get("config") or run.config).items() if k not in PER_RUN}


def run_complaints(run: RunData, track: Track) -> list[str]:
    """Why one run cannot stand in a record."""
    where, result = str(run.folder), run.result
    if run.status != "done":
        return [f"{where} is {run.status}, not done; finish it (RESUME=1) or leave it out"]
    if run.foreign:
        return [f"{where} is a run of another script; only runs of train_gpt.py carry the evidence a record needs"]
    if run.final not in STAGES[2:]:
        return [f"{where} has no score of its packed artifact; run it to the end"]
    proof, stage = collect_evidence(run), run.stages[run.final]
    total, out = proof.artifact + proof.code, [commit_of(run)[1]]
    if total > SIZE_CAP:
        out.append(f"{where}: {total:,} bytes exceed {SIZE_CAP:,}; lower SIZE_TARGET and export again")
    if total != result.get("total_bytes"):
        out.append(f"{where}: its files have {total} bytes, result.json says {result.get('total_bytes')}; run again")
    if not proof.once:
        out.append(f"{where}: scores.npz scores a token twice or never")
    if not proof.before:
        out.append(f"{where}: scores.npz has an update before its score")
    if proof.targets != stage["tokens"] or abs(proof.bpb - stage["val_bpb"]) > 1e-5:
        out.append(f"{where}: scores.npz gives {proof.bpb:.6f} bpb, result.json {stage['val_bpb']:.6f}; score it again")
    audit = run.folder / "audit.txt"
    page = audit.read_text(encoding="utf-8") if audit.exists() else ""
    if re.search(r"^FAIL", page, re.M) or (page and proof.sha256[:16] not in page.splitlines()[0]):
        out.append(f"{where}: its audit failed or is of another artifact; see {audit}, or audit it again")
    if config_of(run).get("val_tokens_limit"):
        out.append(f"{where}: VAL_TOKENS_LIMIT is set, so it did not score the whole text; run without it")
    if track.timed:
        out += time_complaints(run)
    return [line for line in out if line]


def time_complaints(run: RunData) -> list[str]:
    """Limits of the timed track: hardware, training clock, evaluation clock."""
    where, out = str(run.folder), []
    if run.result.get("world_size") != 8 or "H100" not in run.result.get("device", ""):
        where_ran = f"{run.result.get('world_size')}x {run.result.get('device')}"
        out.append(f"{where} ran on {where_ran}, the track asks for 8x H100; use --track non_record_16mb")
    if training_seconds(run) > TRAIN_CAP:
        out.append(f"{where}: training and export took {training_seconds(run):.1f} s, over {TRAIN_CAP:g}; train less")
    if run.result.get("eval_seconds", math.inf) > EVAL_CAP:
        out.append(f"{where}: evaluation took {run.result.get('eval_seconds')} s of {EVAL_CAP:g}; lower its budget")
    return out


def record_complaints(runs: Sequence[RunData], track_name: str) -> list[str]:
    """Every reason to refuse; empty when the runs make a record."""
    track = TRACKS[track_name]
    out = [line for run in runs for line in run_complaints(run, track)]
    seeds = [run.seed for run in runs]
    if len(set(seeds)) != len(seeds):
        out.append(f"seeds {seeds} repeat; give one run a seed")
    if len(set(seeds)) < track.seeds:
        out.append(f"{track_name} needs {track.seeds} seeds, there are {len(set(seeds))}; run the missing ones")
    first = config_of(runs[0])
    for run in runs[1:]:
        other = config_of(run)
        mixed = [key for key in sorted(set(first) | set(other)) if first.get(key) != other.get(key)]
        if mixed:
            pairs = "; ".join(f"{key.upper()} {first.get(key)} and {other.get(key)}" for key in mixed[:3])
            out.append(f"{runs[0].folder} and {run.folder} mix configurations ({pairs}); give runs of one")
        if script_hash(run) != script_hash(runs[0]):
            out.append(f"{runs[0].folder} and {run.folder} ran different scripts; run one of them again")
        if run.final != runs[0].final:
            out.append(f"{runs[0].folder} ends with {runs[0].final}, {run.folder} with {run.final}; give runs of one")
    return list(dict.fromkeys(out))


def preset_values(run: RunData) -> dict[str, Any]:
    """The run's preset as its own copy of the script defines it; empty when that copy cannot be imported."""
    code = (
        "import dataclasses,json,sys,train_gpt as t;"
        "print(json.dumps(dataclasses.asdict(t.read_config({'PRESET':sys.argv[1]})[0])))"
    )
    command = [sys.executable, "-c", code, str(run.result.get("preset", ""))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.folder)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def setting(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def overrides_of(run: RunData, preset: dict[str, Any]) -> dict[str, str]:
    """Variables that turn the preset into this run's configuration."""
    if not preset:
        asked = run.notes.get("request", {}).get("env", {})
        return {key: value for key, value in asked.items() if key != "PRESET"}
    config = config_of(run)
    return {k.upper(): setting(v) for k, v in sorted(config.items()) if k != "preset" and preset.get(k) != v}


def command_of(run: RunData, changed: dict[str, str]) -> str:
    """The exact launch command."""
    settings = dict(PRESET=run.result["preset"], SEED=str(run.seed), RUN_ID=f"seed{run.seed}") | changed
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    return " ".join([*words, f"torchrun --standalone --nproc_per_node={run.result['world_size']} train_gpt.py"])


def per_seed(runs: Sequence[RunData]) -> dict[str, dict[str, Any]]:
    """seed_results of submission.json."""
    out = {}
    for run in runs:
        result, final = run.result, run.stages[run.final]
        before = run.stages.get(result.get("weights", "raw"), {})
        out[str(run.seed)] = dict(
            val_loss=final["val_loss"], val_bpb=final["val_bpb"], artifact_bytes=result["artifact_bytes"],
            bytes_total=result["total_bytes"], steps=result["steps"],
            step_avg_ms=1e3 * result["train_seconds"] / max(1, result["steps"]),
            train_wallclock_ms=1e3 * result["train_seconds"], hessian_s=result.get("hessian_seconds"),
            curvature_s=result.get("fisher_seconds"), training_s=training_seconds(run),
            quantize_pack_s=result.get("quantize_pack_seconds"), startup_s=result.get("startup_seconds"),
            eval_time_s=result["eval_seconds"], val_tokens=final["tokens"], target_tokens=collect_evidence(run).targets,
            val_bytes=final["bytes"], pre_quant_val_bpb=before.get("val_bpb"),
            quantized_val_bpb=run.stages.get("quantized", {}).get("val_bpb"),
            artifact_sha256=collect_evidence(run).sha256,
        )  # fmt: skip
    return out


def compliance_of(runs: Sequence[RunData]) -> dict[str, bool]:
    """Each entry is computed from the runs' files, but for the no_* ones, which hold by the script's construction."""
    proofs = [collect_evidence(run) for run in runs]
    before = all(proof.before for proof in proofs)
    return dict(
        artifact_under_16mb=all(p.artifact + p.code <= SIZE_CAP for p in proofs),
        train_under_600s=all(training_seconds(run) <= TRAIN_CAP for run in runs),
        eval_under_600s=all(run.result["eval_seconds"] <= EVAL_CAP for run in runs),
        three_seeds=len(runs) >= 3,
        full_validation_targets=not any(config_of(run).get("val_tokens_limit") for run in runs),
        val_tokens_equal_target_tokens=all(
            p.targets == run.stages[run.final]["tokens"] for p, run in zip(proofs, runs, strict=True)
        ),
        each_token_scored_once=all(proof.once for proof in proofs), score_before_update=before, score_first_ttt=before,
        no_slot=True, no_pre_quant_ttt=True, no_etlb=True, no_ngram_cache=True, no_validation_training_leak=before,
    )  # fmt: skip


def submission_of(runs: Sequence[RunData], args: argparse.Namespace) -> dict[str, Any]:
    """submission.json with the fields that accepted rows have."""
    seeds = per_seed(runs)

    def column(name: str) -> list[float]:
        return [row[name] for row in seeds.values()]

    many, first = len(runs) > 1, runs[0].result
    packages = runs[0].notes.get("machine", {}).get("packages", {})
    cuda = re.search(r"\+cu(\d+)", first.get("torch_version", ""))
    out = dict(
        author=args.author, github_id=args.github_id, name=args.name, blurb=args.blurb, date=args.date,
        track=args.track, val_loss=mean(column("val_loss")), val_bpb=mean(column("val_bpb")),
        val_loss_std=std(column("val_loss")) if many else None, val_bpb_std=std(column("val_bpb")) if many else None,
        stage=runs[0].final, seeds=[run.seed for run in runs], seed_results=seeds,
        artifact_bytes_mean=mean(column("artifact_bytes")), artifact_bytes_max=max(column("artifact_bytes")),
        bytes_total=max(column("bytes_total")), bytes_code=first["code_bytes"],
        train_steps_mean=mean(column("steps")), train_wallclock_ms_mean=mean(column("train_wallclock_ms")),
        train_wallclock_ms_max=max(column("train_wallclock_ms")), step_avg_ms_mean=mean(column("step_avg_ms")),
        eval_time_s_mean=mean(column("eval_time_s")), eval_time_s_max=max(column("eval_time_s")),
        hardware=f"{first['world_size']}x {first['device']}", pytorch_version=first["torch_version"],
        cuda_version=cuda[1] if cuda else None, flash_attn_version=packages.get("flash-attn"),
        technique_summary=args.blurb, git_sha=commit_of(runs[0])[0], compliance=compliance_of(runs),
        attribution=attribution_of(runs[0], args.attribution),
        logs={str(run.seed): f"train_seed{run.seed}.log" for run in runs},
    )  # fmt: skip
    if args.baseline_bpb is not None:
        nats = args.baseline_bpb * out["val_loss"] / out["val_bpb"]
        out |= dict(
            comparison_baseline=args.baseline, comparison_baseline_bpb=args.baseline_bpb,
            delta_vs_leaderboard_bpb=out["val_bpb"] - args.baseline_bpb,
            delta_vs_leaderboard_nats=out["val_loss"] - nats, comparison_p_value=p_below_target(
                column("val_bpb"), args.baseline_bpb),
        )  # fmt: skip
    return out


def attribution_of(run: RunData, extra: Sequence[str]) -> dict[str, str]:
    """Mechanisms that the configuration switches on, and the pull requests that brought them."""
    used = {name: source for name, source, on in ATTRIBUTION if on(config_of(run))}
    for item in extra:
        name, sign, source = item.partition("=")
        if not sign:
            raise ReportError(f"--attribution {item!r} must be COMPONENT=PR")
        used[name] = source
    return used


def simplifications(runs: Sequence[RunData]) -> list[str]:
    """How these runs fall short of the official shape, from their own numbers."""
    result, config, out = runs[0].result, config_of(runs[0]), []
    if result["world_size"] != 8 or "H100" not in result["device"]:
        out.append(f"ran on {result['world_size']}x {result['device']}, not on 8x H100")
    if not config.get("max_wallclock_seconds"):
        seen = result["steps"] * config["train_batch_tokens"]
        out.append(f"no training clock: {result['steps']} steps, {seen:,} tokens")
    if len(runs) < 3:
        out.append(f"{len(runs)} seed{'s' * (len(runs) > 1)}: no claim of significance is made")
    if runs[0].final != "ttt":
        out.append(f"no test-time training: the score is that of the {runs[0].final} stage")
    if max(run.result["eval_seconds"] for run in runs) > EVAL_CAP:
        out.append("evaluation took longer than 600 s on this hardware")
    return out


CONDITIONS = (
    ("C1 strict causal dependence", "a target's score depends on the artifact and earlier tokens only. Test: changing "
     "later tokens leaves earlier logits bit-identical (tests/test_laws.py, for every preset)"),
    ("C2 full normalised distribution", "every score is a log-softmax over the whole vocabulary. Test: probabilities "
     "sum to 1 (tests/test_laws.py)"),
    ("C3 score before update", "scores.npz holds for every target how many targets had been trained on when it was "
     "scored: {updates} updates in all, and none had seen its target"),
    ("C4 single left-to-right pass", "scores.npz holds the position at which each of the {targets:,} targets was "
     "scored: each occurs exactly once. Recomputed from it: {bpb:.6f} bpb"),
)  # fmt: skip


def readme_results(runs: Sequence[RunData], facts: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The seed table and the comparison."""
    table = [
        [
            seed, f"{row['val_bpb']:.5f}", f"{row['val_loss']:.5f}", f"{row['quantized_val_bpb']:.5f}",
            f"{row['bytes_total']:,}", str(row["steps"]), f"{row['step_avg_ms']:.1f}",
            f"{row['train_wallclock_ms'] / 1e3:.1f}", f"{row['eval_time_s']:.1f}",
        ]
        for seed, row in facts["seed_results"].items()
    ]  # fmt: skip
    if len(runs) > 1:
        spread = ["std", f"{facts['val_bpb_std']:.5f}", f"{facts['val_loss_std']:.5f}", *["-"] * 6]
        table += [["mean", f"{facts['val_bpb']:.5f}", f"{facts['val_loss']:.5f}", *["-"] * 6], spread]
    head = ["seed", f"bpb ({facts['stage']})", "nats a token", "bpb quantized", "bytes", "steps", "ms/step"]
    out = ["## Results", markdown([*head, "train s", "eval s"], table)]
    if args.baseline_bpb is not None:
        need = margin_needed([row["val_bpb"] for row in facts["seed_results"].values()], args.baseline_bpb)
        p = facts["comparison_p_value"]
        verdict = "one seed gives no p-value" if p is None else f"one-sided t-test p = {shown_p(p)}"
        more = f"; p < 0.01 needs a mean lower by {need:.5f} more" if need else ""
        delta = facts["delta_vs_leaderboard_bpb"]
        name = args.baseline or "the baseline"
        out.append(f"Against {name} ({args.baseline_bpb:.5f} bpb): {delta:+.5f}, {verdict}{more}.")
    return out


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def readme_of(runs: Sequence[RunData], facts: dict[str, Any], args: argparse.Namespace) -> str:
    """README.md of the record folder."""
    preset = preset_values(runs[0])
    changed = overrides_of(runs[0], preset)
    proof = collect_evidence(runs[0])
    rows = [[k, v, setting(preset[k.lower()]) if preset else "-"] for k, v in changed.items()]
    settings = markdown(["setting", "here", "preset"], rows) if rows else "The preset as it is."
    audits = sorted(f"audit_seed{run.seed}.txt" for run in runs if (run.folder / "audit.txt").exists())
    audited = f"Audit pages: {', '.join(audits)}." if audits else "Not audited (`python train_gpt.py audit RUN`)."
    commands = "\n".join(command_of(run, changed) for run in runs)
    notes = args.notes.read_text(encoding="utf-8").strip() if args.notes else ""
    parts = [
        f"# {args.name}", args.blurb, f"Track: {args.track} ({TRACKS[args.track].text}).",
        *readme_results(runs, facts, args),
        "![loss](loss_steps.png)" if (args.folder / "loss_steps.png").exists() else "",
        "## What changed", f"Preset `{runs[0].result['preset']}` with:", settings, notes,
        "## Simplifications", bullets(simplifications(runs)) or "None: the official shape.",
        "## Compliance",
        bullets(f"**{n}**: {t.format(**proof._asdict())}" for n, t in CONDITIONS), audited,
        f"Bytes: {proof.code:,} of code (`train_gpt.py` here, the packed script) and {proof.artifact:,} of artifact. "
        "`train_gpt_readable.py` is the same script before packing; it is not needed to run.",
        "## Commands", f"```\npip install -r requirements.txt\n{commands}\n```",
        f"Commit {facts['git_sha'][:12]}.",
        "## Attribution", bullets(f"{name}: {source}" for name, source in facts["attribution"].items()),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def requirements_of(run: RunData) -> str:
    """The run's package versions where they were noted, else the repository's requirements."""
    packages = run.notes.get("machine", {}).get("packages", {})
    if packages:
        return "".join(f"{name}=={version}\n" for name, version in packages.items())
    path = ROOT / "requirements.txt"
    return path.read_text() if path.exists() else f"torch=={run.result['torch_version']}\n"


def write_record(runs: Sequence[RunData], args: argparse.Namespace) -> Path:
    """The complete folder; ReportError with every reason when the runs do not make a record."""
    complaints = record_complaints(runs, args.track)
    short = re.sub(r"[^A-Za-z0-9]+", "_", args.name).strip("_")
    args.folder = args.out / f"track_{args.track}" / f"{args.date}_{short}"
    if args.folder.exists():
        complaints.append(f"{args.folder} exists; remove it or choose another --name")
    if complaints:
        raise ReportError("no record:\n" + bullets(complaints))
    building = args.folder.with_name(f".{args.folder.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    final, args.folder = args.folder, building
    facts = submission_of(runs, args)
    for run in runs:
        shutil.copyfile(run.folder / "train.log", building / f"train_seed{run.seed}.log")
        if (run.folder / "audit.txt").exists():
            shutil.copyfile(run.folder / "audit.txt", building / f"audit_seed{run.seed}.txt")
    shutil.copyfile(runs[0].folder / "train_gpt_packed.py", building / "train_gpt.py")
    shutil.copyfile(runs[0].folder / "train_gpt.py", building / "train_gpt_readable.py")
    write_text(building / "requirements.txt", requirements_of(runs[0]))
    try:
        draw_plots([Row(args.name, list(runs))], building)
    except ReportError as error:
        print(f"note: {error}", file=sys.stderr)
    write_json(building / "submission.json", facts)
    write_text(building / "README.md", readme_of(runs, facts, args))
    building.rename(final)
    return final


# ---- 9  Commands ----------------------------------------------------------------------------------------------------


def command_table(args: argparse.Namespace) -> int:
    rows = load_rows(args.paths)
    page = full_report(rows, args.baseline, args.target)
    print(page, end="")
    out = args.out or (args.paths[0] if len(args.paths) == 1 and not is_run(args.paths[0]) else None)
    if out:
        write_text(out / "report.md", page)
        write_csv(out / "report.csv", rows)
        print(f"\nwrote {out / 'report.md'} and {out / 'report.csv'}")
    return 0


def command_plots(args: argparse.Namespace) -> int:
    made = draw_plots(load_rows(args.paths), args.out or args.paths[0] / "plots")
    print("\n".join(f"wrote {path}" for path in made) or "nothing to plot yet")
    return 0


def command_record(args: argparse.Namespace) -> int:
    runs = find_runs(args.paths)
    if args.row:
        runs = [run for run in runs if run.row == args.row]
        if not runs:
            raise ReportError(f"no run of row {args.row} in {', '.join(map(str, args.paths))}")
    args.blurb = args.blurb or f"{runs[0].result.get('preset', 'train_gpt.py')} preset"
    folder = write_record(runs, args)
    print(f"wrote {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))
    if len(runs) < 3:
        print(f"note: {len(runs)} seed{'s' * (len(runs) > 1)}; the README says that no significance is claimed")
    return 0


def command_plan(args: argparse.Namespace) -> int:
    """The plan for people, or, with --machine, one line a run for gauntlet.sh."""
    table = args.parsed_table
    only = [g for flag in args.flags if table.flags[flag][0] == "only" for g in table.flags[flag][1]]
    skip = [g for flag in args.flags if table.flags[flag][0] == "skip" for g in table.flags[flag][1]]
    tasks = plan(args, table, only, skip)
    if args.machine:
        plain = [
            dict(row=t.row.name, seed=t.seed, action=t.action, reason=t.reason, accept=list(t.row.accept))
            for t in tasks
        ]
        write_json(args.runs / "plan.json", dict(tasks=plain))
        print(f"{args.runs}\x1f{int(args.cold)}")
    for t in tasks:
        if args.machine:
            cells = [t.action, t.folder, t.request["gpus"], t.request["script"], t.reason, json.dumps(t.request)]
            print("\x1f".join(map(str, cells)))
        else:
            words = " ".join(f"{k}={v}" for k, v in t.request["env"].items())
            start = "python" if t.request["gpus"] == 1 else f"torchrun --nproc_per_node={t.request['gpus']}"
            note = f"  # {t.reason}" if t.reason else ""
            script = t.request["script"] or "train_gpt.py"
            print(f"{t.action:<12} {t.folder.name:<26} SEED={t.seed} {words} {start} {script}{note}")
    return 0


def command_list(args: argparse.Namespace) -> int:
    """The table by group; rows that the script cannot run yet say so."""
    table, known = args.parsed_table, ask_script(ROOT / "train_gpt.py")
    for group in table.groups.values():
        print(f"\n{group.name}: {group.text} [budget {group.budget}{'' if group.default else '; only when named'}]")
        for row in (row for row in table.rows.values() if row.group == group.name):
            lacks = missing_part(row.env, known)
            words = " ".join(f"{key}={value}" for key, value in row.env.items())
            gpus, seeds = row.gpus or "any", ",".join(map(str, row.seeds))
            accept = f"  accept {' '.join(row.accept)}" if row.accept else ""
            print(f"  {row.name:<22} gpus {gpus:<4} seeds {seeds:<12} {words}{accept}"
                  f"{f'  [unavailable: {lacks}]' if lacks else ''}")  # fmt: skip
    print("\nbudgets:")
    for name, env in table.budgets.items():
        print(f"  {name:<22} {' '.join(f'{k}={v}' for k, v in env.items()) or 'as the preset says'}")
    print("\nflags:")
    for flag, (kind, groups) in table.flags.items():
        print(f"  {flag:<22} {kind} {' '.join(groups)}")
    return 0


def command_begin(args: argparse.Namespace) -> int:
    print("\n".join(begin(args.folder, json.loads(args.request), args.resume)))
    return 0


def command_settle(args: argparse.Namespace) -> int:
    run = settle(args.folder, args.code, args.stopped)
    print(describe_end(run))
    return 0 if run.status == "done" else 1


def command_judge(args: argparse.Namespace) -> int:
    """The table of a gauntlet folder; 1 when a planned run is not done or a rule is false."""
    rows = load_rows([args.runs])
    page = full_report(rows, None, args.target)
    write_text(args.runs / "report.md", page)
    write_csv(args.runs / "report.csv", rows)
    print(page, end="")
    tasks = read_json(args.runs / "plan.json").get("tasks", [])
    by_name = {row.name: row for row in rows}
    done = {(run.row, run.seed) for row in rows for run in row.done}
    wanted = [(t["row"], t["seed"]) for t in tasks if t["action"] != "unavailable"]
    failed = [f"{name}-s{seed}" for name, seed in wanted if (name, seed) not in done]
    failed += [f"{t['row']}-s{t['seed']}" for t in tasks if t["action"] == "conflict"]
    refused = [name for name in dict.fromkeys(name for name, _ in wanted) if judge(by_name[name], by_name)[0] is False]
    absent = [t for t in tasks if t["action"] == "unavailable"]
    for t in absent:
        print(f"not run: {t['row']}-s{t['seed']} ({t['reason']})")
    print(f"\n{len(wanted) - len(set(failed))} of {len(tasks)} runs done; {len(absent)} unavailable; "
          f"failed: {', '.join(dict.fromkeys(failed)) or 'none'}; "
          f"accept rule false: {', '.join(refused) or 'none'}")  # fmt: skip
    print(f"wrote {args.runs / 'report.md'} and {args.runs / 'report.csv'}")
    return 1 if failed or refused or not wanted else 0


def number_over_zero(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def add_plan_options(parser: argparse.ArgumentParser, table: Table, here: Path) -> None:
    """What gauntlet.sh's list, plan and run understand."""

    def path(text: str) -> Path:
        return (here / text).resolve()

    parser.add_argument("names", nargs="*", help="rows or groups; none: every group that is on by default")
    parser.add_argument("--runs", type=path, default=ROOT / "runs" / "gauntlet", help="folder of the run folders")
    parser.add_argument("--gpus", type=number_over_zero, default=1, help="processes of a run, one a GPU")
    parser.add_argument("--budget", help=f"one of {', '.join(table.budgets)}; default: the group's")
    parser.add_argument("--steps", type=number_over_zero, help="ITERATIONS, and no clock")
    parser.add_argument("--vocab", type=number_over_zero, help="VOCAB_SIZE")
    parser.add_argument("--seeds", help="seeds of every row, such as 1337,42")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any variable, for every row")
    parser.add_argument("--again", action="store_true", help="run finished and failed runs again; old folders are kept")
    parser.add_argument("--retry", action="store_true", help="run failed runs again; old folders are kept")
    parser.add_argument("--script", type=path, help="another script with the same variables, as a row of its own")
    parser.add_argument("--name", help="name of the row of --script")
    parser.add_argument("--cold", action="store_true", help="an empty compile cache for every run")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(flags=[])
    for flag, (kind, groups) in table.flags.items():
        text = f"{kind} {' '.join(groups)}"
        parser.add_argument(flag, dest="flags", action="append_const", const=flag, default=[], help=text)


def parser_of(arguments: Sequence[str], here: Path) -> argparse.ArgumentParser:
    """The command line; the flags that select groups come from gauntlet.txt."""
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, action, text in (
        ("table", command_table, "Markdown and CSV of runs"),
        ("plots", command_plots, "PNG plots of runs"),
        ("record", command_record, "a submission folder from finished runs"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(action=action)
        sub.add_argument("paths", nargs="+", type=Path, help="run folders, or folders of them")
        sub.add_argument("--out", type=Path, default=ROOT / "records" if name == "record" else None)
        sub.add_argument("--baseline", help="row (of table) or name (of record) to compare with")
        sub.add_argument("--target", type=float, help="bpb to beat: p-value and margin still needed")
        if name == "record":
            add_record_options(sub)
    planning = {"plan": command_plan, "list": command_list}
    for name in planning if arguments[:1] and arguments[0] in planning else ():
        sub = commands.add_parser(name, help="the gauntlet's table")
        early = argparse.ArgumentParser(add_help=False)
        early.add_argument("--table", default=str(ROOT / "gauntlet.txt"))
        table = read_table(here / early.parse_known_args(arguments[1:])[0].table)
        sub.add_argument("--table", help="another table")
        add_plan_options(sub, table, here)
        sub.set_defaults(action=planning[name], parsed_table=table)
    add_launch_commands(commands)
    return parser


def add_record_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--row", help="take the runs of this row only")
    parser.add_argument("--name", required=True, help="short name of the submission")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"))
    parser.add_argument("--track", choices=tuple(TRACKS), default="non_record_16mb")
    parser.add_argument("--blurb", default="", help="one sentence on what is new")
    parser.add_argument("--notes", type=Path, help="Markdown for 'What changed': the idea, negative results")
    parser.add_argument("--baseline-bpb", type=float, help="score to compare with")
    parser.add_argument("--attribution", action="append", default=[], metavar="COMPONENT=PR")


def add_launch_commands(commands: Any) -> None:
    """What gauntlet.sh calls; not for people."""
    sub = commands.add_parser("begin")
    sub.add_argument("folder", type=Path)
    sub.add_argument("request")
    sub.add_argument("--resume", action="store_true")
    sub.set_defaults(action=command_begin)
    sub = commands.add_parser("settle")
    sub.add_argument("folder", type=Path)
    sub.add_argument("code", type=int)
    sub.add_argument("--stopped", action="store_true")
    sub.set_defaults(action=command_settle)
    sub = commands.add_parser("judge")
    sub.add_argument("runs", type=Path)
    sub.add_argument("--target", type=float)
    sub.set_defaults(action=command_judge)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 (judge and settle: something failed), 2 (an error that the message explains)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        here = Path(os.environ.get("GAUNTLET_FROM", "."))
        args = parser_of(arguments, here).parse_args(arguments)
        return args.action(args)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())

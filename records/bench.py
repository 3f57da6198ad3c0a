#!/usr/bin/env python3
"""bench.py: measurements side by side in one process: times of steps and maps, the tax of quantizers.

    python records/bench.py speed PRESET=pr1783 'PRESET=pr1783 MOD_LAYERS=all MOD_CAPACITY=0.5' [--set NAME=VALUE ...]
    python records/bench.py speed PRESET=record --kernels 25
    python records/bench.py bases
    python records/bench.py effects PRESET=pr1783 --group mechanisms --seeds 1337 42 --set ITERATIONS=300 ...
    python records/bench.py effects PRESET=record 'wide: MLP_MULT=5' 'hot: MATRIX_LR=0.07' --budget sprint --out a.jsonl
    python records/bench.py effects PRESET=pr1783 'deq: PRESET=deq' --packed --keep runs/sprints --budget sprint
    python records/bench.py effects PRESET=record 'up: SEED_MAPS=up' --budget sprint --packed 4000000 --plot a.png
    python records/bench.py export runs/a runs/b runs/c --sizes 15990000 8000000      bytes of the artifact
    python records/bench.py export runs/a --bits 3.6 1.8 --methods scalar ours        bits a stored weight

speed: each argument is a configuration, variables as on a command line. No data is needed: a step's time does not
depend on the text, so that documents of random tokens serve. Each configuration is built and compiled as a run would,
then all take turns, a step each, so that clocks and neighbours trouble all alike; weights stand still (learning rate
0). One row for each state that a training step can be in: recurrence on or off, routed layers by their exact choice or
the causal rule. MFU is against this card's own 8192^3 product, measured before and after.

bases: a random square matrix of a seeded map, applied to activations three ways: as a dense matrix, by its fast
transform (log2 n passes, compiled), and by that transform as products with two small Hadamard matrices of about sqrt n.

effects: what each change of a base does to the loss at equal tokens, one short run after another in one process: the
given changes and the rows of a group of gauntlet.txt that have the base's preset. How long a run is, --budget sprint
or ITERATIONS and TRAIN_BATCH_TOKENS say; the presets' own are those of 8 GPUs. Training only, the raw weights scored
on plain windows of the validation text of DATA_PATH: for tuning, let that be text held out of the training text.
Differences are within a seed; "usual bytes" are what a change's numbers take where 36 M weights fill 16 MB. --out keeps
a line for each run, and runs that it holds are not repeated; --part 1/2 and 2/2 of the same file may share a GPU.
--packed also exports each model at its SIZE_TARGET, or at the sizes told, and scores what its files hold: a sprint
without the half minute that a process of its own and sliding windows take. --plot draws those scores against bytes,
--probe measures the raw weights as result.json has it (an equilibrium's residuals, the shares of routed layers).
--keep DIR leaves weights there for the verb export.

export: what trained weights lose in a file of equal size, by rounding to nearest, by SDClip and GPTQ (both with Brotli,
as the seeds do it) and by ours. Each folder is a finished run (model.pt, result.json) whose data is where its settings
say. Runs of several seeds give mean and standard deviation. All methods see the same weights and Hessians of inputs;
their losses are predicted from the same Fisher sums.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import report

import train_gpt as tg


class State(NamedTuple):
    """What a training step may differ in."""

    looping: bool
    exact: bool

    def label(self, cfg: tg.Config) -> str:
        names = ["loop on" if self.looping else "loop off"] * bool(cfg.loops)
        names += ["exact choice" if self.exact else "causal rule"] * any(tg.capacities(cfg))
        return ", ".join(names) or "-"


class Subject(NamedTuple):
    """A configuration ready to step: its trainer, a batch [sequences, T + 1], and seconds it took to build."""

    text: str
    trainer: tg.Trainer
    rows: torch.Tensor
    seconds: float

    def states(self) -> list[State]:
        return [State(*state) for state in self.trainer.states()]

    def step(self, state: State) -> None:
        """Forward, backward, optimizers at rate 0 and averages: a training step that changes no weight."""
        self.trainer.accumulate(self.rows, *state)
        self.trainer.optimizers.step(0.0, self.trainer.cfg.muon_momentum)
        self.trainer.ema.update(1)


def random_shard(folder: Path, tokens: int, vocab: int) -> Path:
    """A shard of random tokens with a document's start every 512 or so."""
    draw = np.random.default_rng(0)
    text = draw.integers(4, vocab, tokens)
    text[draw.random(tokens) < 1 / 512] = tg.BOS
    header = np.zeros(256, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, tokens
    (folder / "fineweb_train_000000.bin").write_bytes(header.tobytes() + text.astype("<u2").tobytes())
    return folder


def checked(env: dict[str, str], where: str) -> tg.Config:
    """The configuration of variables; UserError where one is no knob: it would be measured as no effect."""
    if strangers := sorted(set(env) - set(tg.knobs()) - {"STRICT_ENV", "ALLOW_ENV"}):
        name = strangers[0]
        raise tg.UserError(f"{where}: {name} is no knob{report.nearest_knob(name, tg.knobs())}")
    cfg, warnings = tg.read_config(env)
    for line in warnings:
        print(f"warning: {where}: {line}", file=sys.stderr)
    return cfg


@contextlib.contextmanager
def subject(text: str, shared: list[str]) -> Iterator[Subject]:
    """Build and compile a configuration; UserError where a run would refuse it."""
    begin, cfg = time.perf_counter(), checked(report.assignments(shared + shlex.split(text), text), text)
    with tempfile.TemporaryDirectory() as folder:
        tokens = cfg.train_batch_tokens + 2 * cfg.train_seq_len + 2
        random_shard(Path(folder), tokens, cfg.vocab_size)
        trainer = tg.Trainer(tg.Run(dataclasses.replace(cfg, data_path=folder), tg.Launch(0, 1, 0)))
        rows = trainer.stream.batch(0, cfg.train_batch_tokens // cfg.train_seq_len).to(trainer.run.device)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.warm_up()
        yield Subject(text, trainer, rows, time.perf_counter() - begin)


def timed(run: tg.Run, work: Callable[[], None]) -> float:
    run.synchronize()
    begin = time.perf_counter()
    work()
    run.synchronize()
    return time.perf_counter() - begin


def measure(subjects: list[Subject], steps: int) -> list[dict[str, Any]]:
    """A row for each configuration and state; all take turns, and the first turn is not counted."""
    pairs = [(index, state) for index, one in enumerate(subjects) for state in one.states()]
    took: dict[tuple[int, State], list[float]] = {pair: [] for pair in pairs}
    peaks: dict[tuple[int, State], int] = {}
    for turn in range(steps + 1):
        for index, state in pairs:
            one = subjects[index]
            cuda = one.trainer.run.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = timed(one.trainer.run, lambda one=one, state=state: one.step(state))
            if turn:
                took[index, state].append(seconds)
                peaks[index, state] = torch.cuda.max_memory_allocated() if cuda else 0
    rows = []
    for (index, state), seconds in took.items():
        one, cfg = subjects[index], subjects[index].trainer.cfg
        median = statistics.median(seconds)
        rows.append(dict(
            config=one.text, state=state.label(cfg), looping=state.looping, seconds=median, least=min(seconds),
            most=max(seconds), tokens_per_second=cfg.train_batch_tokens / median, peak_bytes=peaks[index, state],
            flops=tg.flops_per_token(cfg, state.looping) * cfg.train_batch_tokens / median, built_seconds=one.seconds,
        ))  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]], peak: float) -> str:
    """Times against those of the first configuration in the same state of its recurrence (or its only one)."""
    first = {row["looping"]: row["seconds"] for row in reversed(rows) if row["config"] == rows[0]["config"]}
    lines = [f"{'ms a step':>10} {'least-most':>17} {'tok/s':>11} {'MFU':>6} {'of first':>8} {'peak GiB':>8} "
             f"{'built s':>7}  state, configuration"]  # fmt: skip
    for row in rows:
        base = first.get(row["looping"], next(iter(first.values())))
        span = f"{1e3 * row['least']:.1f}-{1e3 * row['most']:.1f}"
        mfu = f"{row['flops'] / peak:.3f}" if peak else "-"
        lines.append(f"{1e3 * row['seconds']:>10.1f} {span:>17} {row['tokens_per_second']:>11.0f} {mfu:>6} "
                     f"{row['seconds'] / base:>8.3f} {row['peak_bytes'] / 2**30:>8.1f} {row['built_seconds']:>7.1f}  "
                     f"{row['state']}: {row['config']}")  # fmt: skip
    return "\n".join(lines)


def kernels(one: Subject, state: State, count: int) -> str:
    """The kernels that take longest in one step (on a CPU: operations)."""
    cuda = one.trainer.run.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        timed(one.trainer.run, lambda: one.step(state))
    spent = {}
    for event in profile.key_averages():
        spent[event.key] = (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
    whole = sum(micros for micros, _ in spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
    lines = [f"{micros / 1e3:>9.2f} ms {micros / whole:>6.1%} {calls:>6}x  {name[:110]}"
             for name, (micros, calls) in ranked]  # fmt: skip
    return "\n".join([f"{state.label(one.trainer.cfg)}: {one.text}: {whole / 1e3:.1f} ms", *lines])


def speed(args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(subject(text, args.set)) for text in args.configs]
        device = subjects[0].trainer.run.device
        peaks = [tg.peak_matmul_flops(device)]
        rows = measure(subjects, args.steps)
        peaks.append(tg.peak_matmul_flops(device))
        print(f"8192^3 product before and after: {' and '.join(f'{peak / 1e12:.0f}' for peak in peaks)} TFLOP/s")
        print(table(rows, max(peaks)))
        for one in subjects if args.kernels else ():
            for state in one.states():
                print("\n" + kernels(one, state, args.kernels))
    if args.json:
        args.json.write_text(json.dumps(dict(peaks=peaks, rows=rows), indent=1))


def small_hadamards(
    x: torch.Tensor, signs: list[torch.Tensor], left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """H D H D H D x with H = left (x) right: [tokens, n] -> the same, by products that tensor cores run."""
    for sign in reversed(signs):
        x = (left @ (x * sign).unflatten(-1, (len(left), len(right))) @ right).flatten(-2)
    return x


def factors(basis: tg.Structured, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(diagonals, first applied last, left, right) of ``small_hadamards`` for a basis whose order is a power of two."""
    diagonals = [t for kind, t in basis.blocks[0] if kind == "diagonal"]
    power, one = len(diagonals[0]).bit_length() - 1, diagonals[0].new_ones(1, 1)
    eyes = (torch.eye(1 << part, device=one.device) for part in (power // 2, power - power // 2))
    left, right = (tg.hadamard(eye, one).to(dtype) for eye in eyes)
    return [t.to(dtype) for t in diagonals], left, right


def basis_row(order: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of each way at one order, the median of ten after a first that compiles."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    basis = tg.BASES["hadamard"](tg.bits_of(0, "bench", 0), order, order)
    basis = basis._replace(blocks=[[(kind, t.to(device)) for kind, t in steps] for steps in basis.blocks])
    x = torch.randn(tokens, order, device=device, dtype=dtype)
    dense = torch.randn(order, order, device=device, dtype=dtype)
    small = factors(basis, dtype)
    ways = dict(dense=lambda: x @ dense.T, passes=lambda: basis.apply(x), products=lambda: small_hadamards(x, *small))
    run = tg.Run(tg.read_config({"DEVICE": device.type})[0], tg.Launch(0, 1, 0))
    found = {}
    for name, way in ways.items():
        way = torch.compile(way) if device.type == "cuda" and name != "dense" else way
        found[name] = statistics.median([timed(run, way) for _ in range(11)][1:])
    return found


def bases(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'n':>6} {'dense ms':>10} {'passes ms':>10} {'products ms':>11}   of {args.tokens} tokens")
    for order in args.orders:
        row = basis_row(order, args.tokens, device)
        print(f"{order:>6} {1e3 * row['dense']:>10.3f} {1e3 * row['passes']:>10.3f} {1e3 * row['products']:>11.3f}")


def changes(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Name -> variables: the base, the rows of the groups that have its preset, the changes given."""
    table = report.read_table(report.ROOT / "gauntlet.txt")
    counted = {name: env for name, env in table.budgets.items() if "ITERATIONS" in env}  # no clock here
    if args.budget and args.budget not in counted:
        raise tg.UserError(f"--budget {args.budget} is none of {', '.join(counted)}")
    base = counted.get(args.budget, {}) | report.assignments([*args.set, *shlex.split(args.base)], "the base")
    checked(base, "the base")
    found = {"base": base}
    if unknown := set(args.group) - {row.group for row in table.rows.values()}:
        raise tg.UserError(f"gauntlet.txt has no group {unknown.pop()}; ./gauntlet.sh list tells them")
    for row in table.rows.values():
        if row.group in args.group and row.env.get("PRESET") == base.get("PRESET") and base | row.env != base:
            found[row.name] = base | row.env
            checked(found[row.name], f"the row {row.name}")
    for text in args.changes:
        label, colon, words = text.partition(":")
        name, where = label.strip(), f"the change {text!r}"
        if name in found:
            raise tg.UserError(f"two changes are called {name!r}; give each a name of its own")
        found[name] = base | report.assignments(shlex.split(words if colon else text), where)
        checked(found[name], where)
    return found


def packed_files(
    trainer: tg.Trainer, looping: bool, score: Callable[[], tg.Score], sizes: list[int]
) -> list[dict[str, float]]:
    """Export the weights as a run would, at its SIZE_TARGET or at each of ``sizes``, and score those that a file holds;
    the first export's seconds are with the calibration, which serves all."""
    cfg, begin, files = trainer.cfg, time.perf_counter(), []
    state = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    code, rows = len(tg.packed_script(tg.script_source())), tg.calibration_rows(trainer)
    quantizer = tg.Quantizer(cfg, state, *tg.calibrate(trainer.run, trainer.model, state, rows, looping, {}))
    for target in sizes or [cfg.size_target]:
        try:
            packed = tg.fit(dataclasses.replace(cfg, size_target=target), quantizer, looping, code)
        except tg.OverBudget as error:
            print(f"no file of {target} bytes: {error}", flush=True)
            continue
        seconds = time.perf_counter() - begin
        with tg.swapped(trainer.model, tg.unpack(packed.blob).state()):
            bpb = score().val_bpb
        files.append(dict(target=target, bytes=len(packed.blob) + code, bpb=bpb, seconds=seconds))
        begin = time.perf_counter()
    return files


def keep_weights(folder: Path, trainer: tg.Trainer, looping: bool) -> None:
    """What ``taxes`` reads of a run; the weights last, so that where they are all is."""
    folder.mkdir(parents=True, exist_ok=True)
    told = dict(config=dataclasses.asdict(trainer.cfg), steps=trainer.step, looping=looping, weights="raw")
    tg.write_json(folder / "result.json", told)
    tg.save_tensors(folder / "model.pt", {"raw": dict(trainer.model.state_dict())})


def short_run(
    env: dict[str, str], seed: int, packed: list[int] | None, keep: Path | None, probe: bool
) -> dict[str, Any]:
    """Train from scratch and score the raw weights; ``packed``: those of files too (see ``packed_files``); ``probe``:
    what the mechanisms tell of themselves in result.json (see ``train_gpt.PROBES``)."""
    begin = time.perf_counter()
    cfg, _ = tg.read_config(env | {"SEED": str(seed), "MAX_WALLCLOCK_SECONDS": "0"})
    trainer, count = tg.Trainer(tg.Run(cfg, tg.Launch(0, 1, 0))), cfg.train_batch_tokens // cfg.train_seq_len
    run, val = trainer.run, tg.load_validation(cfg, tg.load_tokenizer(cfg))
    with contextlib.redirect_stdout(sys.stderr):
        trainer.warm_up()
    built, loss = time.perf_counter() - begin, torch.zeros(())

    def train() -> None:
        nonlocal loss
        for step in range(cfg.iterations):
            rows = trainer.stream.batch(step * count, count).to(run.device, non_blocking=True)
            loss, _ = trainer.train_step(rows, step / cfg.iterations)

    try:
        seconds = timed(run, train)
        trainer.step, looping = cfg.iterations, tg.looping_at(cfg, 1.0, cfg.iterations)
        windows = tg.plain_windows(val.targets, cfg.eval_seq_len)
        evaluate = functools.partial(tg.evaluate, run, trainer.model, val, windows, looping)
        score = evaluate()
        if keep:
            keep_weights(keep, trainer, looping)
        probes = tg.probe(run, trainer.model, val, looping) if probe else None
        files = [] if packed is None else packed_files(trainer, looping, evaluate, packed)
    finally:
        sizes = {name: param.numel() for name, param in trainer.model.named_parameters()}
        trainer.release()
    usual = sum(size * tg.usual_bits(tg.owner(name, tg.TENSOR_PLAN)) for name, size in sizes.items()) / 8
    return dict(
        seed=seed, nats=score.val_loss, bpb=score.val_bpb, train_loss=float(loss), params=sum(sizes.values()),
        bytes=usual, ms=1e3 * seconds / cfg.iterations, built_seconds=built, config=env, sizes=packed, files=files,
        probes=probes,
    )  # fmt: skip


def by_change(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Name -> seed -> the run."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["name"], {})[row["seed"]] = row
    return runs


def targets_of(rows: list[dict[str, Any]]) -> list[int]:
    """The sizes of their files, from the smallest on."""
    return sorted({file["target"] for row in rows for file in row["files"]})


def of_size(runs: list[dict[str, Any]], target: int) -> list[dict[str, float]]:
    """The runs' files of one size."""
    return [file for row in runs for file in row["files"] if file["target"] == target]


def effects_table(rows: list[dict[str, Any]]) -> str:
    """Each change against the base of the same seed, and its files' scores with the bytes of the largest."""
    runs, lines = by_change(rows), []
    base, targets = runs.get("base", {}), targets_of(rows)
    for name, own in runs.items():
        paired = [(row, base[seed]) for seed, row in own.items() if seed in base]
        if not paired:
            continue
        gains = [row["bpb"] - control["bpb"] for row, control in paired]
        added, size = (paired[0][0].get(key, math.nan) - paired[0][1].get(key, math.nan) for key in ("params", "bytes"))
        slower = statistics.median(row["ms"] / control["ms"] for row, control in paired)
        files = [of_size([row for row, _ in paired], target) for target in targets]
        lines.append((statistics.mean(gains), [
            name, f"{statistics.mean(row['bpb'] for row, _ in paired):.4f}", report.shown(gains, 5), str(len(paired)),
            f"{added:+,}", f"{size:+,.0f}", f"{slower:.3f}",
            *(f"{report.shown([one['bpb'] for one in found], 5)} ({max(one['bytes'] for one in found):,})" if found
              else "-" for found in files),
        ]))  # fmt: skip
    header = ["change", "bpb", "against the base", "seeds", "parameters", "usual bytes", "step time"]
    header += [f"packed, {target / 1e6:g} MB" for target in targets]
    return report.markdown(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def plot_files(rows: list[dict[str, Any]], path: Path) -> None:
    """The packed scores against the files' bytes, a line a change; whiskers are a standard deviation over seeds."""
    plt = report.import_pyplot()
    figure, axes = plt.subplots()
    for index, (name, own) in enumerate(by_change(rows).items()):
        runs = list(own.values())
        found = [of_size(runs, target) for target in targets_of(runs)]
        points = [([one["bytes"] / 1e6 for one in files], [one["bpb"] for one in files]) for files in found]
        spread = [report.std(scores) if len(scores) > 1 else 0.0 for _, scores in points]
        means = [(statistics.mean(sizes), statistics.mean(scores)) for sizes, scores in points]
        if means:
            axes.errorbar(*zip(*means, strict=True), yerr=spread, capsize=4, label=name, **report.look(index))
    report.label_pareto(axes, "quantized")
    report.save(plt, figure, path)


SHOWN = dict(bpb=".5f", nats=".5f", ms=".1f", built_seconds=".1f")


def share(text: str) -> tuple[int, int]:
    """I/N as two numbers, for --part."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N with 1 <= I <= N")
    return int(part), int(parts)


def effects(args: argparse.Namespace) -> None:
    part, parts = args.part
    if args.probe and not args.out:
        raise tg.UserError("--probe writes into the lines of --out; give it a file")
    for path in filter(None, (args.out, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []

    def place(name: str, seed: int) -> Path | None:
        return args.keep / f"{name}-s{seed}" if args.keep else None

    def whole(row: dict[str, Any]) -> bool:
        """Whether it tells all that is asked for now."""
        kept = not args.keep or (place(row["name"], row["seed"]) / "model.pt").exists()
        asked, had = args.packed, row["sizes"]
        filed = asked is None or had == asked or bool(asked and had) and set(asked) <= set(had)
        return kept and filed and (not args.probe or row["probes"] is not None)

    rows = [row for row in map(json.loads, lines) if "sizes" in row and whole(row)]  # older lines lack it
    done = {(row["name"], row["seed"], json.dumps(row["config"], sort_keys=True)) for row in rows}
    failed: list[str] = []
    for name, env in list(changes(args).items())[part - 1 :: parts]:
        torch._dynamo.reset()  # the compiler keeps a few versions of a function at most
        for seed in args.seeds:
            if (name, seed, json.dumps(env, sort_keys=True)) in done:
                continue
            try:
                row = dict(name=name) | short_run(env, seed, args.packed, place(name, seed), args.probe)
            except Exception as error:  # whatever a change breaks, the others are still to be measured
                if name == "base":
                    raise
                failed.append(name)
                print(f"{name} failed: {type(error).__name__}: {str(error).strip()[:500]}", flush=True)
                break
            told = [f"{key}:{row[key]:{form}}" for key, form in SHOWN.items()]
            told += [
                f"bytes:{one['bytes']} packed_bpb:{one['bpb']:.5f} seconds:{one['seconds']:.1f}" for one in row["files"]
            ]
            print(f"{name} seed:{seed}", *told, flush=True)
            rows.append(row)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
    print("\n" + effects_table(rows))
    if args.plot:
        plot_files(rows, args.plot)
    if failed:
        raise tg.UserError(f"not measured: {', '.join(failed)}; the messages are above")


# what "ours" is, whatever the run was packed with; a method differs from it
OWN = dict(weights="auto", gptq=True, quant_steps="fisher", gptq_rows=32, trellis_states=8, compressor="ans")
SEEDS = dict(quant_steps="sdclip", compressor="brotli", trellis_states=1, gptq_rows=0)
METHODS = {
    "nearest": SEEDS | dict(gptq=False),
    "sdclip": SEEDS,
    "sdclip_ans": SEEDS | dict(compressor="ans"),
    "scalar": dict(trellis_states=1, gptq_rows=0),
    "columns": dict(gptq_rows=0),
    "trellis4": dict(trellis_states=4),
    "ours": {},
    "trellis16": dict(trellis_states=16),
    "rows128": dict(gptq_rows=128),
}


def taxes(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """(method at a size, tax in bpb, tax in nats, predicted nats) for one run."""
    result = tg.read_facts(folder / "result.json")
    if "looping" not in result or not (folder / "model.pt").exists():
        raise tg.UserError(f"{folder} is no finished run: it needs the result.json and model.pt that one leaves")
    names = {field.name for field in dataclasses.fields(tg.Config)}
    base = {name: value for name, value in result["config"].items() if name in names}
    cfg, _ = tg.read_config({}, base=base | dict(OWN, val_tokens_limit=args.val_tokens))
    run = tg.Run(cfg, tg.Launch(0, 1, 0))
    trainer = tg.Trainer(run)
    trainer.step, looping = result["steps"], result["looping"]
    saved = torch.load(folder / "model.pt", weights_only=True, map_location=run.device)[result["weights"]]
    state = {name: tensor.float() for name, tensor in saved.items()}
    rows = tg.calibration_rows(trainer)
    hessians, fisher, outputs, tables = tg.calibrate(run, trainer.model, state, rows, looping, {})
    val = tg.load_validation(cfg, tg.load_tokenizer(cfg))
    windows = tg.plain_windows(val.targets, cfg.eval_seq_len)

    def score(weights: dict) -> tg.Score:
        with tg.swapped(trainer.model, weights):
            return tg.evaluate(run, trainer.model, val, windows, looping)

    whole, count = score(state), sum(tensor.numel() for tensor in state.values())
    for size in args.sizes or [int(bits * count / 8) for bits in args.bits]:
        for method in args.methods:
            own, begin = dataclasses.replace(cfg, size_target=size, **METHODS[method]), time.perf_counter()
            gradients = outputs if own.gptq_rows else {}, tables if own.quant_steps == "fisher" else {}
            quantizer = tg.Quantizer(own, state, hessians if own.gptq else {}, fisher, *gradients)
            packed = tg.fit(own, quantizer, looping, 0)
            seconds = time.perf_counter() - begin
            found = score(tg.Artifact({}, looping, packed.stored).state())
            predicted = sum(row["loss"] for row in tg.ledger(quantizer, packed.stored, quantizer.fisher).values())
            tax = found.val_bpb - whole.val_bpb, found.val_loss - whole.val_loss
            print(f"{folder.name} {method} bytes:{len(packed.blob)} tax_bpb:{tax[0]:.5f} tax_nats:{tax[1]:.5f} "
                  f"predicted_nats:{predicted:.6f} packs:{packed.packs} seconds:{seconds:.1f}", flush=True)  # fmt: skip
            yield f"{method} at {size}", *tax, predicted


def export(args: argparse.Namespace) -> None:
    found: dict[str, list] = {}
    for folder in args.folders:
        for key, *numbers in taxes(folder, args):
            found.setdefault(key, []).append(numbers)
    cells = [[key, *(report.shown(column, 5) for column in zip(*rows, strict=True))] for key, rows in found.items()]
    print("\n" + report.markdown(["method", "tax, bpb", "tax, nats", "predicted, nats"], cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("speed", help="training steps of several configurations, side by side")
    verb.add_argument("configs", nargs="+", metavar="'NAME=VALUE ...'")
    verb.add_argument(
        "--steps", type=report.number_over_zero, default=6, metavar="N", help="steps of each that are timed"
    )
    verb.add_argument("--kernels", type=int, default=0, metavar="N", help="also list the N slowest kernels of a step")
    verb.add_argument("--json", type=Path, help="write the rows there too")
    verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of all of them")
    verb.set_defaults(work=speed)
    verb = verbs.add_parser("bases", help="three ways to apply a seeded map's random matrix")
    verb.add_argument("--orders", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], metavar="N")
    verb.add_argument("--tokens", type=int, default=65536)
    verb.set_defaults(work=bases)
    verb = verbs.add_parser("effects", help="what changes of a base do to the loss, by short runs")
    verb.add_argument("base", metavar="'NAME=VALUE ...'")
    verb.add_argument("changes", nargs="*", metavar="'NAME: VARIABLE=VALUE ...'")
    verb.add_argument("--group", action="append", default=[], help="also the rows of this group of gauntlet.txt")
    verb.add_argument("--seeds", type=int, nargs="+", default=[1337])
    verb.add_argument("--budget", metavar="NAME", help="what a run may spend, from gauntlet.txt: sprint")
    verb.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of all runs")
    verb.add_argument("--out", type=Path, help="a JSON line for each run; what it holds is not run again")
    told = "also export, to these bytes or SIZE_TARGET, code included, and score what the files hold"
    verb.add_argument("--packed", type=int, nargs="*", metavar="BYTES", help=told)
    verb.add_argument("--probe", action="store_true", help="keep what mechanisms tell of themselves, in --out's lines")
    verb.add_argument("--plot", type=Path, metavar="PNG", help="draw the files' scores against their bytes")
    verb.add_argument("--keep", type=Path, metavar="DIR", help="leave the weights there, a folder for each run")
    verb.add_argument("--part", default=(1, 1), type=share, metavar="I/N", help="every N-th change from the I-th on")
    verb.set_defaults(work=effects)
    verb = verbs.add_parser("export", help="the quantization tax of finished runs at equal bytes")
    verb.add_argument("folders", type=Path, nargs="+")
    verb.add_argument("--sizes", type=int, nargs="+", help="bytes of the artifact")
    verb.add_argument("--bits", type=float, nargs="+", default=[3.6, 1.8], help="bits a weight, if no sizes are told")
    verb.add_argument("--methods", nargs="+", choices=METHODS, default=["nearest", "sdclip", "scalar", "ours"])
    verb.add_argument("--val-tokens", type=int, default=0, help="score the first N validation tokens only")
    verb.set_defaults(work=export)
    args = parser.parse_args()
    try:
        args.work(args)
    except (tg.UserError, report.ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())

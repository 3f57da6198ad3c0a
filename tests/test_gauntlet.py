"""gauntlet.sh: the plan, clean launches, failures, resuming, judging; a stand-in for train_gpt.py keeps it fast."""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_env

ROOT = Path(__file__).resolve().parents[1]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None or os.name != "posix", reason="gauntlet.sh needs bash")

spec = importlib.util.spec_from_file_location("report", ROOT / "records" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)

# The contract of train_gpt.py in a few lines: --help, run folder, exit codes, signals, checkpoint and resume.
STAND_IN = """
import json, os, pathlib, signal, sys, time
if sys.argv[1:] == ["--help"]:
    print("stand-in\\n\\nPresets (PRESET=name):\\n  tiny       small\\n\\nrun:")
    for name in ("PRESET SEED RUN_ID RUNS_DIR RESUME ITERATIONS MODE GAIN DATA_PATH MAX_WALLCLOCK_SECONDS "
                 "VOCAB_SIZE").split():
        print(f"  {name:<28} 0          text")
    sys.exit(0)
env = os.environ
folder = pathlib.Path(env["RUNS_DIR"]) / env["RUN_ID"]
folder.mkdir(parents=True, exist_ok=True)
mode, gain, seed, steps = env.get("MODE", "ok"), float(env.get("GAIN", 0)), int(env["SEED"]), int(env["ITERATIONS"])
config = dict(preset=env["PRESET"], mode=mode, gain=gain, seed=seed, iterations=steps)
(folder / "config.json").write_text(json.dumps(config))
(folder / "env.json").write_text(json.dumps(dict(env)))
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
rank = env.get("RANK", "0")
checkpoint = folder / "checkpoint.pt"
step = int(checkpoint.read_text()) if env.get("RESUME") == "1" and checkpoint.exists() else 0
if mode == "crash":
    raise RuntimeError("wheel came off")
if mode == "bad":
    print("error: GAIN=x is not a number", file=sys.stderr); sys.exit(2)
while step < steps:
    step += 1
    time.sleep(0.2 if mode == "slow" else 0.002)
    print(f"{step}/{steps} train_loss: {3 - step / steps:.4f} train_time: 0.1m tok/s: 1000 eta: 1s", flush=True)
    with open(folder / f"work.{rank}", "a") as file:
        file.write(f"{step}\\n")
    checkpoint.write_text(str(step))
    if stop:
        sys.exit(128 + stop[0])
    if mode == "die" and step == 2 and env.get("RESUME") != "1":
        os.kill(os.getpid(), 9)
if mode == "nan":
    sys.exit(3)
if mode == "over":
    print("error: code and artifact take 17 bytes, SIZE_LIMIT=16", file=sys.stderr); sys.exit(4)
if rank == "0":
    stage = lambda bpb: dict(val_bpb=bpb, val_loss=2 * bpb, seconds=1.0, tokens=10, bytes=30)
    bpb = 1.2 + gain + 0.001 * (seed % 7)
    result = dict(status="done", seed=seed, preset=env["PRESET"], config=config, steps=steps, train_seconds=2.0,
                  eval_seconds=1.0, artifact_bytes=900, code_bytes=100, total_bytes=1000,
                  stages=dict(raw=stage(bpb - 0.01), quantized=stage(bpb)))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "DONE").touch()
"""

PEER = """
import os
assert os.path.isdir(os.environ["DATA_PATH"]) and not os.path.exists("gauntlet.sh")
print("model_params:1000\\nstep:1/3 train_loss:4.5 train_time:10ms step_avg:10.0ms")
print("3/3 val_loss: 2.4 val_bpb: 1.19")
print("stopping_early: wallclock_cap train_time: 1500ms step: 3/3")
print("Serialized model int8+zlib: 800 bytes\\nTotal submission size int8+zlib: 950 bytes")
print("final_int8_zlib_roundtrip val_loss:2.41 val_bpb:1.20 eval_time:1000ms")
print("final_int8_zlib_roundtrip_exact val_loss:2.41234567 val_bpb:1.20123456")
open("final_model.ptz", "w").write("x")
"""

TABLE = """
budget | short | ITERATIONS=4
group  | base  | short | yes | controls
group  | faults | short | no | runs that fail
flag | --base-only | only | base
flag | --skip-base | skip | base
row | good   | base   | any | 1,2 | PRESET=tiny | bpb<1.3 bytes<=1000
row | better | base   | any | 1,2 | PRESET=tiny GAIN=-0.1 | bpb<good-0.05
row | later  | base   | any | 1   | PRESET=absent | -
row | knob   | base   | any | 1   | PRESET=tiny NO_SUCH=1 | -
row | crash  | faults | any | 1   | PRESET=tiny MODE=crash | -
row | over   | faults | any | 1   | PRESET=tiny MODE=over | -
row | nan    | faults | any | 1   | PRESET=tiny MODE=nan | -
row | bad    | faults | any | 1   | PRESET=tiny MODE=bad | -
row | die    | faults | any | 1   | PRESET=tiny MODE=die | -
row | slow   | faults | any | 1   | PRESET=tiny MODE=slow | -
row | worse  | faults | any | 1   | PRESET=tiny GAIN=0.5 | bpb<1.3
row | last   | faults | any | 1   | PRESET=tiny | -
row | eight  | faults | 8   | 1   | PRESET=tiny | -
"""


@pytest.fixture
def home(tmp_path):
    """A copy of the gauntlet with the stand-in."""
    (tmp_path / "records").mkdir()
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "gauntlet.sh", tmp_path)
    shutil.copy(ROOT / "records" / "report.py", tmp_path / "records")
    (tmp_path / "train_gpt.py").write_text(STAND_IN)
    (tmp_path / "gauntlet.txt").write_text(TABLE)
    return tmp_path


def environment(home, **extra):
    names = ("PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    own = dict(PYTHON=sys.executable, DATA_PATH=str(home / "data"), GAUNTLET_TICK="0.05", GAUNTLET_EVERY="0")
    return kept | own | extra


def start(home, *arguments, script="gauntlet.sh", **extra):
    """The process; SIGINT reaches it even if these tests run in a shell's background, where it is ignored."""
    command = [BASH, str(home / script), *arguments]
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment(home, **extra), cwd=home, preexec_fn=heeding, **pipes)


def gauntlet(home, *arguments, **extra):
    """(exit code, output)"""
    process = start(home, *arguments, **extra)
    out = process.communicate(timeout=180)[0]
    return process.returncode, out


def status(home, run):
    return report.read_run(home / "runs" / "gauntlet" / run).status


def work(home, run):
    """The steps that a run did, in order, over all its starts."""
    return [int(line) for line in (home / "runs" / "gauntlet" / run / "work.0").read_text().split()]


def test_shell_is_clean():
    """bash parses it; shellcheck, where there is one, finds nothing."""
    for script in (ROOT / "gauntlet.sh", ROOT / "records" / "submit.sh"):
        assert subprocess.run([BASH, "-n", script]).returncode == 0
        if checker := shutil.which("shellcheck"):
            done = subprocess.run([checker, script], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


def test_the_table_of_the_repository_reads():
    table = report.read_table(ROOT / "gauntlet.txt")
    assert {"pr1783", "naive", "record", "demo"} <= set(table.rows)
    for kind, groups in table.flags.values():
        assert kind in ("only", "skip") and set(groups) <= set(table.groups)
    for group in table.groups.values():
        assert group.budget == "own" or group.budget in table.budgets
    named = {m[3] for r in table.rows.values() for c in r.accept if (m := report.CONDITION.match(c)) and m[3]}
    assert named <= set(table.rows)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("row | a | base | any | 1 | GAIN | -", "is no KEY=VALUE"),
        ("row | a | base | any | x | - | -", "must be integers"),
        ("row | a | base | any | 1,1 | - | -", "stands twice"),
        ("row | a | none | any | 1 | - | -", "names the group none"),
        ("row | a | base | all | 1 | - | -", "must be a number or any"),
        ("row | a | base | any | 1 | - | bpb is low", "accept rule"),
        ("row | a | base | any", "number of cells"),
        ("row | good | base | any | 1 | - | -", "row good stands twice"),
        ("rows | a", "number of cells"),
        ("row | base | base | any | 1 | - | -", "names a group already"),
    ],
)
def test_bad_lines_of_a_table(tmp_path, line, sentence):
    """Every fault names its line."""
    path = tmp_path / "t.txt"
    path.write_text(TABLE + line + "\n")
    with pytest.raises(report.ReportError, match=sentence) as caught:
        report.read_table(path)
    assert f"line {len(path.read_text().splitlines())}" in str(caught.value)


def test_plan_touches_nothing_and_says_all(home):
    code, out = gauntlet(home, "plan", "--steps", "7", "--seeds", "5", "--set", "GAIN=0.2")
    assert code == 0 and not (home / "runs").exists()
    assert "GAIN=0.2" in out and "ITERATIONS=7" in out and "MAX_WALLCLOCK_SECONDS=0" in out and "good-s5" in out
    assert out.count("unavailable") == 2 and "no preset absent" in out and "no knob NO_SUCH" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["plan", "gud"], "no row and no group"),
        (["plan", "--base-only", "--skip-base"], "select no row"),
        (["plan", "good", "--base-only"], "not both"),
        (["plan", "--gpus", "0"], "no whole number of at least 1"),
        (["plan", "--budget", "huge"], "none of short"),
        (["plan", "--set", "gain=1"], "is no KEY=VALUE"),
        (["plan", "--set", "GAINS=1"], "did you mean GAIN"),
        (["plan", "--script", "none.py"], "is no file"),
        (["plan", "--table", "none.txt"], "cannot read the table"),
        (["fly"], "no verb fly"),
        (["report", "nowhere"], "is no folder"),
    ],
)
def test_bad_command_lines(home, arguments, sentence):
    code, out = gauntlet(home, *arguments)
    assert code == 2 and sentence in out and "Traceback" not in out


def test_a_clean_pass(home):
    """Clean environment, strict knobs, table, exit code 0, unavailable rows said; a second pass repeats nothing."""
    code, out = gauntlet(home, "run", SECRET_KNOB="7", GAIN="9")
    assert code == 0, out
    env = json.loads((home / "runs/gauntlet/good-s1/env.json").read_text())
    assert env["STRICT_ENV"] == "1" and env["RUN_ID"] == "good-s1" and env["SEED"] == "1" and env["ITERATIONS"] == "4"
    assert "GAIN" not in env and "SECRET_KNOB" not in env and env["DATA_PATH"] == str(home / "data")
    assert env["TORCHINDUCTOR_CACHE_DIR"] == str(home / "runs/gauntlet/.cache/inductor")
    assert "[4/4] better-s2" in out and " train_loss: " in out and "not run: later-s1" in out
    page = (home / "runs/gauntlet/report.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| better"))
    assert "-0.1000 ± 0.0000" in row and "2 at quantized" in row and "yes" in row and "1.1015 ± 0.0007" in row
    assert page.index("| better") < page.index("| good") < page.index("| later")
    code, out = gauntlet(home, "run")
    assert code == 0 and "good-s1: finished earlier" in out and work(home, "good-s1") == [1, 2, 3, 4]
    code, out = gauntlet(home, "run", "good", "--set", "GAIN=0.01")
    assert code == 1 and "conflict" in out and "--again" in out
    code, out = gauntlet(home, "run", "good", "--seeds", "1", "--again")
    assert code == 0 and work(home, "good-s1") == [1, 2, 3, 4]
    assert len(list((home / "runs/gauntlet/.old").iterdir())) == 1


def test_another_text_is_another_run(tmp_path):
    """A path may change between two starts, the name of the text may not."""
    (tmp_path / "config.json").write_text(json.dumps(dict(dataset="a", data_dir="/x")))
    request = dict(env=dict(DATASET="b", DATA_DIR="/y"), gpus=1, script="")
    assert report.differences(tmp_path, request) == ["DATASET a -> b"]


def test_failures_are_named_and_do_not_stop_the_rest(home):
    """Six demo rows: crashing, over budget, not a number, bad configuration, killed, and a good one."""
    rows = ["crash", "over", "nan", "bad", "die", "good"]
    code, out = gauntlet(home, "run", *rows, "--seeds", "1")
    assert code == 1
    ended = {row: status(home, f"{row}-s1") for row in rows}
    assert ended == dict(
        crash="crashed", over="over-budget", nan="non-finite", bad="bad-config", die="interrupted", good="done"
    )
    assert "wheel came off" in out and "SIZE_LIMIT=16" in out and "failed: crash-s1, over-s1" in out
    page = (home / "runs/gauntlet/report.md").read_text()
    for row, word in ended.items():
        assert word in next(line for line in page.splitlines() if line.startswith(f"| {row} "))
    code, out = gauntlet(home, "run", *rows, "--seeds", "1")
    assert code == 1 and "[1/1] die-s1: has a checkpoint" in out and "over-budget earlier" in out
    assert status(home, "die-s1") == "done" and work(home, "die-s1") == [1, 2, 3, 4]
    assert work(home, "over-s1") == [1, 2, 3, 4] and "5 of 6" not in out and "2 of 6 runs done" in out
    code, out = gauntlet(home, "run", "over", "good", "--seeds", "1", "--retry")
    assert code == 1 and "good-s1: finished earlier" in out and "over-s1: starting" in out
    assert len(list((home / "runs/gauntlet/.old").iterdir())) == 1


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def test_interrupted_twice_it_repeats_no_work(home):
    command = ("run", "slow", "last", "--set", "ITERATIONS=6")
    for steps, number in ((1, signal.SIGTERM), (3, signal.SIGINT)):
        process = start(home, *command)
        trace = home / "runs/gauntlet/slow-s1/work.0"
        wait_for(lambda trace=trace, steps=steps: trace.exists() and len(trace.read_text().split()) >= steps)
        process.send_signal(number)
        out = process.communicate(timeout=90)[0]
        assert process.returncode == 128 + number and "interrupted; the same command goes on" in out
        assert status(home, "slow-s1") == "interrupted" and not (home / "runs/gauntlet/last-s1").exists()
    code, out = gauntlet(home, *command)
    assert code == 0 and work(home, "slow-s1") == [1, 2, 3, 4, 5, 6] and status(home, "last-s1") == "done"


def test_a_killed_gauntlet_leaves_its_run_alone(home):
    """kill -9 on the gauntlet: the run goes on, and a second gauntlet does not start it twice."""
    process = start(home, "run", "slow", "--set", "ITERATIONS=6")
    pid = home / "runs/gauntlet/slow-s1/.pid"
    wait_for(lambda: pid.exists() and (home / "runs/gauntlet/slow-s1/work.0").exists())
    process.kill()
    code, out = gauntlet(home, "run", "slow", "--set", "ITERATIONS=6")
    assert code == 1 and "busy" in out
    wait_for(lambda: (home / "runs/gauntlet/slow-s1/DONE").exists())
    process.wait()
    process.stdout.close()


def test_a_false_accept_rule_fails(home):
    code, out = gauntlet(home, "run", "worse")
    assert code == 1 and "accept rule false: worse" in out and status(home, "worse-s1") == "done"
    assert "bpb<1.3: 1.701 against 1.3 (quantized)" in out


def test_rows_for_other_machines_are_not_run(home):
    code, out = gauntlet(home, "run", "eight", "knob")
    assert code == 1 and "eight-s1: unavailable: needs --gpus 8" in out and "0 of 2 runs done; 2 unavailable" in out


def test_two_processes_keep_the_ranks_exit_code(home):
    code, out = gauntlet(home, "run", "over", "--gpus", "2", "--set", "ITERATIONS=2")
    assert code == 1 and status(home, "over-s1") == "over-budget", out
    assert work(home, "over-s1") == [1, 2]


def test_another_script_fills_the_same_table(home):
    folder = home / "peer_one"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(PEER)
    code, out = gauntlet(home, "run", "good", "--script", "peer_one/train_gpt.py", "--seeds", "1")
    assert code == 0, out
    row = next(line for line in out.splitlines() if line.startswith("| peer_one"))
    assert "1.1900" in row and "1.2012" in row and "+0.0002" in row and "1 at quantized" in row
    run = report.read_run(home / "runs/gauntlet/peer_one-s1")
    assert run.foreign and run.result["total_bytes"] == 950 and run.result["steps"] == 3
    assert run.result["train_seconds"] == 1.5 and run.stages["quantized"]["val_bpb"] == 1.20123456
    (folder / "train_gpt.py").write_text("print('no score here')")
    code, out = gauntlet(home, "run", "--script", "peer_one/train_gpt.py", "--name", "mute")
    assert code == 1 and "no line like" in out and status(home, "mute-s1337") == "crashed"


def test_the_real_script(home, corpus):
    """train_gpt.py itself, from a row of the table to a submission folder: submit.sh runs, audits and writes it up."""
    shutil.copy(ROOT / "train_gpt.py", home)
    shutil.copy(ROOT / "records" / "submit.sh", home / "records")
    words = " ".join(f"{name}={value}" for name, value in tiny_env("record", iterations=2, gptq=False).items())
    row = f"row | tiny | real | any | 3 | {words} | bpb<9"
    (home / "gauntlet.txt").write_text(f"group | real | own | yes | real\n{row}\n")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm all"):
        subprocess.run(["git", *words.split()], cwd=home, check=True)
    place = dict(RUNS=str(home / "runs/gauntlet"), TRACK="non_record_16mb", DEVICE="cpu")
    begun = start(home, "tiny", "Idea", "Ada L.", "ada", script="records/submit.sh", **corpus.env(), **place)
    out, code = begun.communicate(timeout=300)[0], begun.returncode
    assert code == 0, out
    folder = next((home / "records" / "track_non_record_16mb").glob("*_Idea"))
    assert {"README.md", "submission.json", "train_gpt.py", "train_seed3.log", "audit_seed3.txt"} <= {
        path.name for path in folder.iterdir()
    }
    run = report.read_run(home / "runs/gauntlet/tiny-s3")
    assert run.final == "sliding" and run.result["seed"] == 3 and run.result["total_bytes"] > 1000

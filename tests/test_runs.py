"""Whole runs as real processes: stages and files, kills and resumes, exit codes, several ranks, the packed script."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, clean_env, finish, sandbox, script, start, tg, tiny, tiny_env, trainer_of

STEPS = 20
RESULT = {
    "run_id", "preset", "config", "seed", "world_size", "device", "torch_version", "git_sha", "status", "steps",
    "train_seconds", "startup_seconds", "tokens_per_second", "artifact_bytes", "code_bytes", "total_bytes", "stages",
}  # fmt: skip
FILES = {
    "train.log", "metrics.jsonl", "result.json", "config.json", "train_gpt.py", "model.pt", "final_model.ptz",
    "scores.npz", "checkpoint.pt", "eval.json", "DONE",
}  # fmt: skip


class Place:
    """Where the runs of this file live, and how they are started."""

    def __init__(self, corpus, folder: Path):
        self.corpus, self.folder = corpus, folder

    def env(self, run_id: str, **values) -> dict[str, str]:
        knobs = dict(iterations=STEPS, warmup_steps=1, val_loss_every=10, ttt_lr=0.01, runs_dir=str(self.folder))
        text = tiny_env("demo", **{**knobs, **self.corpus.knobs(), "run_id": run_id, **values})
        return clean_env(text)

    def run(self, run_id: str, **values):
        return finish(start(script(), self.env(run_id, **values), cwd=self.folder))

    def interrupt(self, run_id: str, line: str, number: int, **values):
        """Send a signal once the run has printed a line that contains ``line``; how it ended."""
        process = start(script(), self.env(run_id, **values), cwd=self.folder)
        for printed in process.stdout:
            if line in printed:
                process.send_signal(number)
                break
        return finish(process)

    def torchrun(self, run_id: str, *options: str, command: tuple = ()):
        launcher = [sys.executable, "-m", "torch.distributed.run", *options, SCRIPT, *command]
        return start(launcher, self.env(run_id) | {"GLOO_SOCKET_IFNAME": "lo"}, cwd=self.folder)

    def result(self, run_id: str) -> dict:
        return json.loads((self.folder / run_id / "result.json").read_text())

    def losses(self, run_id: str) -> list[float]:
        events = map(json.loads, (self.folder / run_id / "metrics.jsonl").read_text().splitlines())
        return [event["loss"] for event in events if event["event"] == "train"]

    def weights(self, run_id: str) -> dict:
        return torch.load(self.folder / run_id / "model.pt", weights_only=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_nodes(place: Place) -> list:
    """Two launchers of one process each, meeting on the loopback interface."""
    shared = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    nodes = [place.torchrun("nodes", *shared, f"--node_rank={rank}") for rank in (0, 1)]
    return [finish(node) for node in nodes]


def bereft(place: Place) -> tuple:
    """How one of two processes ended after the other was killed, and the seconds that took."""
    met = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), GLOO_SOCKET_IFNAME="lo")
    ranks = [start(script(), place.env("bereft", iterations=9999) | met | {"RANK": rank}, cwd=place.folder)
             for rank in "01"]  # fmt: skip
    next(line for line in ranks[0].stdout if "5/9999 train_loss" in line)
    ranks[1].kill()
    begin = time.monotonic()
    return finish(ranks[0]), time.monotonic() - begin, finish(ranks[1])


def terminated(place: Place) -> list:
    first = place.interrupt("term", f"7/{STEPS} train_loss", signal.SIGTERM)
    step = torch.load(place.folder / "term" / "checkpoint.pt", weights_only=True)["step"]
    return [first, step, place.run("term", resume=True)]


def hung_up(place: Place) -> tuple:
    """A run whose terminal goes away: nobody reads it any more, and it is told so twice. Tests under nohup inherit that
    the signal is ignored, and must not hand it on."""
    heeding = "from signal import *; signal(SIGHUP, SIG_DFL); import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    process = start([sys.executable, "-c", heeding, *script()], place.env("hup"), cwd=place.folder)
    next(line for line in process.stdout if f"7/{STEPS} train_loss" in line)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    return process.wait(150), process.stderr.read()


def killed(place: Place) -> list:
    first = place.interrupt("kill", "checkpoint: step 6 saved", signal.SIGKILL, checkpoint_every=3)
    step = torch.load(place.folder / "kill" / "checkpoint.pt", weights_only=True)["step"]
    return [first, step, place.run("kill", resume=True, checkpoint_every=3)]


JOBS = {
    "whole": lambda place: place.run("whole"),
    "ranks": lambda place: finish(place.torchrun("ranks", "--standalone", "--nproc_per_node=2")),
    "term": terminated,
    "kill": killed,
    "hup": hung_up,
    "nodes": two_nodes,
    "bereft": bereft,
    "nan": lambda place: place.run("nan", matrix_lr=1e30, scalar_lr=1e30, tied_embed_lr=1e30, checkpoint_every=1),
}


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory) -> Place:
    return Place(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def ended(place) -> dict:
    """How the long runs ended; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(JOBS, pool.map(lambda job: job(place), JOBS.values()), strict=True))


# ---- one run, end to end --------------------------------------------------------------------------------------------


def test_a_run_does_everything(ended, place):
    """Every stage is scored, result.json has its fields, the folder its files, and the sizes are those of the files."""
    assert ended["whole"].code == 0, ended["whole"].err
    result, folder = place.result("whole"), place.folder / "whole"
    assert set(result) >= RESULT
    assert {path.name for path in folder.iterdir()} >= FILES
    assert set(result["stages"]) == {"raw", "ema", "quantized", "sliding", "ttt"}
    for row in result["stages"].values():
        assert set(row) == {"val_loss", "val_bpb", "seconds", "tokens", "bytes"}
        assert 0 < row["val_bpb"] < 16 and row["bytes"] == sum(len(text.encode()) for text in place.corpus.texts)
    assert (result["status"], result["steps"], result["preset"], result["world_size"]) == ("done", STEPS, "demo", 1)
    assert result["artifact_bytes"] == (folder / "final_model.ptz").stat().st_size
    assert result["code_bytes"] == (folder / "train_gpt_packed.py").stat().st_size
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"] <= 16_000_000
    assert (folder / "train_gpt.py").read_bytes() == SCRIPT.read_bytes()
    assert result["config"] == json.loads((folder / "config.json").read_text())


def test_the_exporters_are_compared(ended, place):
    """bench.py export measures a finished run: a line and a row of the table for each method and rate."""
    words = (place.folder / "whole", "--bits", "3", "--methods", "nearest", "ours", "--val-tokens", "600")
    bench = finish(start([sys.executable, ROOT / "records/bench.py", "export", *words], clean_env(), cwd=place.folder))
    assert bench.code == 0, bench.err
    rows = re.findall(r"^whole (\w+) bytes:\d+ tax_bpb:\S+ tax_nats:\S+ predicted_nats:(\S+)", bench.out, re.M)
    assert [name for name, _ in rows] == ["nearest", "ours"] and bench.out.count("| ours at ") == 1
    assert float(rows[1][1]) < float(rows[0][1])


def test_a_run_learns(ended, place):
    """The loss falls from that of chance, and the trained model scores better than a uniform one."""
    losses = place.losses("whole")
    assert len(losses) == STEPS and losses[0] > 5.5 and losses[-1] < losses[0] - 0.5
    assert place.result("whole")["stages"]["raw"]["val_loss"] < 5.3


LINES = (
    r"train_shards: 3 ", r"val_tokens: \d+", r"model_params:\d+", r"preflight: ", r"startup: [\d.]+s",
    r"\d+/20 train_loss: [\d.]+ train_time: [\d.]+m tok/s: \d+", r"10/20 val_loss: [\d.]+ val_bpb: [\d.]+",
    r"layer_loop:enabled step:\d+ frac:[\d.]+ encoder:\[", r"GPTQ:collected \d+ Hessians in [\d.]+s",
    r"Serialized model quantized\+ans: \d+ bytes", r"Total submission size quantized\+ans: \d+ bytes",
    r"quantized val_loss:[\d.]+ val_bpb:[\d.]+ eval_time:\d+ms", r"quantized_sliding_window val_loss:[\d.]+ val_bpb:",
    r"quantized_ttt val_loss:[\d.]+ val_bpb:", r"diagnostic pre-quantization post-ema val_loss:[\d.]+ val_bpb:",
)  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_log_lines_stay(ended, place, line):
    """The lines that the community's parsers read are in train.log, and on the console."""
    log = (place.folder / "whole" / "train.log").read_text()
    assert re.search(rf"^{line}", log, re.M)
    assert re.search(rf"^{line}", ended["whole"].out, re.M)


def test_the_table_ends_the_run(ended):
    """The last lines are the table of stages."""
    tail = [line.split()[0] for line in ended["whole"].out.strip().splitlines()[-6:]]
    assert tail == ["stage", "raw", "ema", "quantized", "sliding", "ttt"]


# ---- interruptions --------------------------------------------------------------------------------------------------


def same_weights(place: Place, run_id: str) -> None:
    whole, other = place.weights("whole"), place.weights(run_id)
    for label in ("raw", "ema"):
        assert set(whole[label]) == set(other[label])
        assert all(torch.equal(tensor, other[label][name]) for name, tensor in whole[label].items())


def test_a_loss_that_nobody_predicted_is_told():
    """Rounding that costs far more than its prediction is worth a warning; without a prediction there is none."""

    def told(lost, predicted):
        stages = dict(raw=dict(val_loss=3.0), ema=dict(val_loss=9.0), quantized=dict(val_loss=3.0 + lost))
        return tg.unexpected_loss(dict(weights="raw", stages=stages, export=dict(predicted_loss=predicted)))

    assert told(0.46, 0.0001).startswith("quantization cost 0.460 nats a token where 0.0001 were predicted")
    assert not told(0.46, 0.1) and not told(0.01, 0.0001) and not told(0.46, 0)


def test_sigterm_and_resume(ended, place):
    """SIGTERM ends with 143 after a checkpoint; resumed, the run ends with the very weights of one never stopped."""
    first, step, second = ended["term"]
    assert first.code == 143 and 7 <= step < STEPS, first.err
    assert "RESUME=1" in first.out and not first.err
    assert second.code == 0 and f"resume: step {step}" in second.out, second.err
    same_weights(place, "term")
    blobs = [(place.folder / run_id / "final_model.ptz").read_bytes() for run_id in ("whole", "term")]
    assert blobs[0] == blobs[1]


def test_a_terminal_that_goes_away(ended, place):
    """SIGHUP, twice and with nobody to read the log: a checkpoint all the same."""
    code, err = ended["hup"]
    assert code == 128 + signal.SIGHUP and not err, err
    assert (place.folder / "hup" / "checkpoint.pt").exists()
    assert json.loads((place.folder / "hup" / "result.json").read_text())["status"] == "interrupted"


def test_sigkill_and_resume(ended, place):
    """After SIGKILL the last checkpoint carries on to the same final weights."""
    first, step, second = ended["kill"]
    assert first.code == -9 and step >= 6 and step % 3 == 0
    assert second.code == 0 and f"resume: step {step}" in second.out, second.err
    same_weights(place, "kill")


def test_nan_loss(ended, place):
    """A loss that is no number ends the run with code 3, one line, and a checkpoint of finite weights."""
    run = ended["nan"]
    assert run.code == 3, run.err
    assert len(run.err.splitlines()) == 1 and re.match(r"error: step \d+: loss ", run.err)
    assert not (place.folder / "nan" / "final_model.ptz").exists()
    saved = place.folder / "nan" / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)["model"]
        assert all(torch.isfinite(tensor).all() for tensor in state.values())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_refused_command_touches_no_run(ended, place):
    """A RUN_ID in use is refused, and one to go on with by other settings or that does not exist. Nothing changes."""
    before = files_of(place.folder / "whole")
    on = dict(run_id="whole", resume=True)
    again = {
        "whole holds a run": dict(run_id="whole"), "MATRIX_LR was": on | dict(matrix_lr=0.5),
        "SIZE_LIMIT=60000": on | dict(size_limit=60000), "there is no .*whale": dict(run_id="whale", resume=True),
    }  # fmt: skip
    for words, values in again.items():
        refused = place.run(**values)
        assert refused.code in (2, 4) and re.search(words, refused.err), refused.err
    assert files_of(place.folder / "whole") == before and not (place.folder / "whale").exists()


def test_a_folder_at_work_is_refused(tmp_path):
    """While one run lives, no other gets its folder."""
    cfg = tg.read_config({"PRESET": "demo", "DEVICE": "cpu"})[0]
    first, second = (tg.Run(cfg, tg.Launch(0, 1, 0)) for _ in range(2))
    first.claim(tmp_path / "one")
    with pytest.raises(tg.UserError, match="another run is at work"):
        second.claim(tmp_path / "one")
    first.lock.close()
    second.claim(tmp_path / "one")


def test_a_run_that_trained_and_left_no_checkpoint_is_kept(corpus, tmp_path):
    """RESUME=1 does not start it anew over its files; one that never took a step does start."""
    trainer = trainer_of(tiny("demo", **corpus.knobs()))
    trainer.resume(tmp_path)
    (tmp_path / "result.json").write_text('{"steps": 7}')
    with pytest.raises(tg.UserError, match="after 7 steps, has no checkpoint"):
        trainer.resume(tmp_path)


def test_which_run_goes_on(tmp_path):
    """RESUME=1 alone takes the newest unfinished run of the preset, but none that diverged; new names never meet."""
    cfg = tg.read_config({"PRESET": "demo", "RUNS_DIR": str(tmp_path), "RESUME": "1"})[0]
    ends = {"demo-1": 130, "my run": None, "demo-3": 3, "demo-4": 0, "another": 130}
    for age, (name, code) in enumerate(ends.items()):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "checkpoint.pt").touch()
        os.utime(folder / "checkpoint.pt", (age, age))
        (folder / "result.json").write_text(json.dumps({"exit_code": code}))
        (folder / "config.json").write_text(json.dumps({"preset": "naive" if name == "another" else "demo"}))
    (tmp_path / "demo-4" / "DONE").touch()
    for name, text in (("damaged", "{"), ("foreign", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").touch()
        (tmp_path / name / "config.json").write_text(text)
    assert tg.choose_run_id(cfg) == "my run"
    fresh = tg.read_config({"PRESET": "demo"})[0]
    assert len({tg.choose_run_id(fresh) for _ in range(5)}) == 5


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", ["ranks", "nodes"])
def test_ranks_do_not_matter(ended, place, run_id):
    """Two processes, on one node or two, give one process's losses and its score."""
    for process in ended[run_id] if run_id == "nodes" else [ended[run_id]]:
        assert process.code == 0, process.err[-2000:]
    one, two = place.result("whole"), place.result(run_id)
    assert two["world_size"] == 2
    assert place.losses(run_id) == pytest.approx(place.losses("whole"), abs=1e-5)
    for stage, row in one["stages"].items():
        assert two["stages"][stage]["val_bpb"] == pytest.approx(row["val_bpb"], rel=1e-3)


def test_a_lost_rank_is_named(ended):
    """The rank that is left ends within 30 seconds, with one line and no traceback."""
    first, seconds, second = ended["bereft"]
    assert second.code == -9 and first.code == 1 and seconds < 30
    assert first.err.splitlines()[-1].startswith("error: rank 0 lost another rank") and "Traceback" not in first.err


def test_two_ranks_score_the_same_artifact(ended, place):
    """One artifact, one score: eval by two processes equals eval by one, adaptation included."""
    copy = place.folder / "scored_by_two"
    copy.mkdir()
    shutil.copy(place.folder / "whole" / "final_model.ptz", copy)
    options = ("--standalone", "--nproc_per_node=2")
    run = finish(place.torchrun("unused", *options, command=("eval", str(copy / "final_model.ptz"))))
    assert run.code == 0, run.err[-2000:]
    told = json.loads((copy / "eval.json").read_text())["stages"]
    for stage, row in told.items():
        assert row["val_bpb"] == pytest.approx(place.result("whole")["stages"][stage]["val_bpb"], rel=1e-5)


# ---- the packed script ----------------------------------------------------------------------------------------------


def test_the_packed_script_scores_the_same(ended, place):
    """pack writes one self-extracting file of the counted size, which scores the artifact on its own."""
    folder = place.folder / "packed"
    folder.mkdir()
    shutil.copy(place.folder / "whole" / "final_model.ptz", folder)
    tg.pack_command(folder / "tiny.py")
    assert (folder / "tiny.py").stat().st_size == place.result("whole")["code_bytes"] < SCRIPT.stat().st_size / 2
    assert (folder / "tiny.py").read_bytes() == (place.folder / "whole" / "train_gpt_packed.py").read_bytes()
    env = clean_env(place.corpus.env(), {"DEVICE": "cpu", "THREADS": "1"})
    run = finish(start([sys.executable, "tiny.py", "eval", "final_model.ptz"], env, cwd=folder))
    assert run.code == 0, run.err
    told = json.loads((folder / "eval.json").read_text())["stages"]
    for stage, row in told.items():
        assert row["val_bpb"] == pytest.approx(place.result("whole")["stages"][stage]["val_bpb"], rel=1e-6)


def test_packing_is_stable():
    """Packing a packed script gives it back; packing twice gives the same bytes."""
    packed = tg.packed_script(tg.script_source())
    assert tg.packed_script(packed.decode()) == packed == tg.packed_script(tg.script_source())
    assert packed.isascii()


# ---- what fails, fails early, with one line -------------------------------------------------------------------------


def layout(place: Place, name: str) -> Path:
    """A data folder as data/prepare.py lays it out: shards, tokenizer, manifest."""
    root = place.folder / f"data_{name}"
    (root / "tokenizers").mkdir(parents=True)
    shutil.copytree(place.corpus.folder, root / "datasets" / "tiny", ignore=shutil.ignore_patterns("*.model"))
    shutil.copy(place.corpus.tokenizer, root / "tokenizers" / "tiny.model")
    return root


def layout_env(root: Path) -> dict[str, str]:
    tokenizer = str(root / "tokenizers" / "tiny.model")
    return dict(data_dir=str(root), dataset="tiny", data_path="", tokenizer_path=tokenizer)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def with_truncated_shard(place: Place) -> dict:
    root = layout(place, "train")
    cut(root / "datasets" / "tiny" / "fineweb_train_000001.bin")
    return layout_env(root)


def with_truncated_validation(place: Place) -> dict:
    root = layout(place, "val")
    cut(root / "datasets" / "tiny" / "fineweb_val_000000.bin")
    return layout_env(root)


def with_manifest(place: Place, name: str, text: str) -> dict:
    root = layout(place, name)
    (root / "manifest.json").write_text(text)
    return layout_env(root)


def with_other_tokenizer(place: Place) -> dict:
    tokenizers = [{"name": "t", "sha256": "0" * 64}]
    manifest = {"datasets": [{"name": "tiny", "tokenizer_name": "t"}], "tokenizers": tokenizers}
    return with_manifest(place, "other", json.dumps(manifest))


def with_altered_validation(place: Place) -> dict:
    files = {"datasets/tiny/fineweb_val_000000.bin": {"sha256": "0" * 64}}
    return with_manifest(place, "altered", json.dumps({"datasets": [{"name": "tiny", "files": files}]}))


def with_damaged_manifest(place: Place) -> dict:
    return with_manifest(place, "manifest", '{"datasets": [')


def with_no_tokenizer_at_all(place: Place) -> dict:
    root = layout(place, "text")
    (root / "tokenizers" / "tiny.model").write_bytes(b"this is no tokenizer")
    return layout_env(root)


def with_damaged_checkpoint(place: Place) -> dict:
    folder = place.folder / "damaged"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"PK\3\4 nothing")
    return dict(resume=True, run_id="damaged")


# name -> (settings, exit code, what the line must say)
EARLY = {
    "misspelt": (lambda place: {"iteration": 5}, 2, "did you mean ITERATIONS"),
    "truncated": (with_truncated_shard, 2, r"fineweb_train_000001.bin is truncated"),
    "truncated_val": (with_truncated_validation, 2, r"fineweb_val_000000.bin is truncated"),
    "other_tokenizer": (with_other_tokenizer, 2, "SHA-256"),
    "no_tokenizer": (with_no_tokenizer_at_all, 2, "tiny.model is no SentencePiece model"),
    "damaged_manifest": (with_damaged_manifest, 2, "manifest.json is no manifest"),
    "missing_tokenizer": (lambda place: {"tokenizer_path": "/nowhere.model"}, 2, "/nowhere.model"),
    "vocab_size": (lambda place: {"vocab_size": 300}, 2, "VOCAB_SIZE=300"),
    "no_data": (lambda place: {"data_path": str(place.folder / "nothing")}, 2, "no fineweb_"),
    "over_budget": (lambda place: {"size_limit": 60_000}, 4, "SIZE_LIMIT=60000"),
    "no_checkpoint": (lambda place: {"resume": True, "run_id": ""}, 2, "RESUME=1"),
    "altered_validation": (with_altered_validation, 2, "fineweb_val_000000.bin is not the file that"),
    "damaged_checkpoint": (with_damaged_checkpoint, 2, "checkpoint.pt is damaged"),
    "braces": (lambda place: {"tokenizer_path": "/no{where}.model"}, 2, "TOKENIZER_PATH|no{where}"),
}


@pytest.fixture(scope="module")
def failed(place) -> dict:
    """How runs that cannot work ended, each in a process of its own."""
    jobs = {}
    for name, (settings, _, _) in EARLY.items():
        values = settings(place)
        if values.get("run_id") == "":
            values["runs_dir"] = str(place.folder / "no_runs")
        jobs[name] = ([], place.env(values.pop("run_id", f"early_{name}"), **values))
    folder = place.folder / "early"
    folder.mkdir()
    return sandbox(jobs, folder)


@pytest.mark.parametrize("name", EARLY)
def test_early_failures(failed, name):
    """What cannot work ends before the first step with the right code and one line that names the thing."""
    run, (_, code, words) = failed[name], EARLY[name]
    assert run.code == code, run.err[-1500:]
    assert len(run.err.splitlines()) == 1 and run.err.startswith("error: ")
    assert re.search(words, run.err)
    assert "train_loss" not in run.out and "warmup_step" not in run.out


def test_the_script_stands_alone(place):
    """The script runs from any folder, imported by nothing of its neighbours."""
    text = SCRIPT.read_text()
    neighbours = {path.stem for path in ROOT.glob("*.py")} - {"train_gpt"}
    assert not any(re.search(rf"^\s*(import|from) {name}\b", text, re.M) for name in neighbours | {"prepare", "data"})

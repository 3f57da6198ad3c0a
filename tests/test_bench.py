"""records/bench.py: its rows are the states of the runs that it names, and its fast ways to apply a basis are right."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT, tg, tiny_env

spec = importlib.util.spec_from_file_location("bench", ROOT / "records" / "bench.py")
bench = importlib.util.module_from_spec(spec)
sys.modules["bench"] = bench
spec.loader.exec_module(bench)


def settings(preset: str, **values) -> str:
    env = tiny_env(preset, num_loops=1, **values)
    return " ".join(f"{name}={value}" for name, value in env.items() if value)


def shared_settings(preset: str, **values) -> list[str]:
    """The same but for the preset, as options of ``effects``."""
    words = [word for word in settings(preset, **values).split() if "PRESET" not in word]
    return [part for word in words for part in ("--set", word)]


def bench_main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    return bench.main()


def test_a_row_for_every_state(monkeypatch, tmp_path, capsys):
    """Recurrence off and on, the exact choice and the causal rule, with ratios to the first."""
    mod = settings("mod", mod_causal_at=0.5, enable_looping_at=0.5)
    found = tmp_path / "rows.json"
    assert bench_main(monkeypatch, "speed", mod, settings("record"), "--steps", 2, "--json", found) == 0
    rows = json.loads(found.read_text())["rows"]
    assert [row["state"] for row in rows] == [
        "loop off, exact choice", "loop off, causal rule", "loop on, exact choice", "loop on, causal rule", "loop on"
    ]  # fmt: skip
    for row in rows:
        assert row["least"] <= row["seconds"] <= row["most"]
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(128)
    out = capsys.readouterr().out
    assert " 1.000 " in out and "loop on: PRESET=record" in out


def test_no_weight_moves():
    """The step that is timed leaves the model as it was; its kernels have names and shares."""
    with bench.subject(settings("record"), ["SEED=5"]) as one:
        before = {name: tensor.clone() for name, tensor in one.trainer.model.state_dict().items()}
        assert "aten::" in bench.kernels(one, one.states()[0], 2)
        assert one.trainer.cfg.seed == 5
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.trainer.model.state_dict().items())


def test_what_a_run_refuses_is_refused(monkeypatch, capsys):
    assert bench_main(monkeypatch, "speed", "PRESET=record ITERATION=5") == 2
    assert "did you mean ITERATIONS" in capsys.readouterr().err


def test_a_budget_comes_before_what_is_told(monkeypatch):
    """--budget sprint is the gauntlet's; variables of the command line are stronger."""
    seen = {}
    monkeypatch.setattr(bench, "effects", lambda args: seen.update(bench.changes(args)))
    asked = ("effects", "PRESET=record ITERATIONS=7", "x: MLP_MULT=5", "--budget", "sprint")
    assert bench_main(monkeypatch, *asked) == 0
    assert (
        seen["x"]["TRAIN_BATCH_TOKENS"] == "196608" and seen["x"]["ITERATIONS"] == "7" and seen["x"]["MLP_MULT"] == "5"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("speed", "PRESET=demo FOO=3"), "FOO is no knob"),
        (("effects", "PRESET=demo", "x: SMEER_GATES=1"), "did you mean SMEAR_GATE"),
        (("effects", "PRESET=demo", "--group", "nope"), "no group nope"),
        (("effects", "PRESET=demo", "--budget", "clock"), "--budget clock is none of sprint"),
        (("effects", "PRESET=demo", "--probe"), "--probe writes into the lines of --out"),
        (("effects", "PRESET=demo", "x: SEED=1", "x: SEED=2"), "two changes are called 'x'"),
        (("export", "/nowhere"), "/nowhere is no finished run"),
    ],
)
def test_what_measures_nothing_is_refused(arguments, words, monkeypatch, capsys):
    """A misspelt knob or group, a name twice, a folder without a run: one line, before anything is built."""
    assert bench_main(monkeypatch, *arguments) == 2
    told = capsys.readouterr()
    assert words in told.err and not told.out


@pytest.mark.parametrize("order", [32, 64])
def test_small_hadamards_are_the_transform(order, monkeypatch, capsys):
    """Both fast ways give R x, and the table has a row for each order."""
    basis = tg.BASES["hadamard"](tg.bits_of(0, "bench", 0), order, order)
    x = torch.randint(-4, 5, (3, order)).float()
    assert torch.equal(bench.small_hadamards(x, *bench.factors(basis, torch.float32)), x @ basis.dense().T)
    assert torch.equal(basis.apply(x), x @ basis.dense().T)
    assert bench_main(monkeypatch, "bases", "--orders", order, "--tokens", 8) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_packed_effect_scores_the_file(corpus, monkeypatch, tmp_path, capsys):
    """--packed: the scores are those of files within the sizes asked for, of one trained model; --keep: the verb export
    reads what is left and makes the same file of it."""
    code = len(bench.tg.packed_script(bench.tg.script_source()))
    rooms = [code + 30_000, code + 60_000]
    shared = shared_settings("record", iterations=2, size_target=rooms[1], val_tokens_limit=2000, **corpus.knobs())
    out, kept = tmp_path / "runs.jsonl", tmp_path / "kept"
    asked = ("effects", "PRESET=record", "--out", out, *shared)
    assert bench_main(monkeypatch, *asked) == 0  # without: no file, and to be run again with
    assert bench_main(monkeypatch, *asked, "--packed", "--keep", kept) == 0
    row = json.loads(out.read_text().splitlines()[-1])
    (file,) = row["files"]
    assert file["target"] == rooms[1] and rooms[1] - 10_000 <= file["bytes"] <= rooms[1]
    assert file["bpb"] == pytest.approx(row["bpb"], abs=0.2) and file["bpb"] != row["bpb"]
    assert f"packed_bpb:{file['bpb']:.5f}" in capsys.readouterr().out
    assert bench_main(monkeypatch, "export", kept / "base-s1337", "--sizes", 60_000, "--methods", "ours") == 0
    told = dict(word.split(":") for word in capsys.readouterr().out.split() if word.count(":") == 1)
    assert int(told["bytes"]) == file["bytes"] - code
    assert float(told["tax_bpb"]) == pytest.approx(file["bpb"] - row["bpb"], abs=1e-5)
    (kept / "base-s1337" / "model.pt").unlink()
    assert bench_main(monkeypatch, *asked, "--packed", "--keep", kept) == 0  # not there: run again
    assert len(out.read_text().splitlines()) == 3 and (kept / "base-s1337" / "model.pt").exists()
    capsys.readouterr()
    assert bench_main(monkeypatch, *asked, "--packed", *rooms) == 0  # another size: run again
    again = json.loads(out.read_text().splitlines()[-1])["files"]
    assert [one["target"] for one in again] == rooms and again[0]["bpb"] != again[1]["bpb"] == file["bpb"]
    assert bench_main(monkeypatch, *asked, "--packed", rooms[0]) == 0  # one of those: not run again
    assert bench_main(monkeypatch, *asked, "--packed") == 0  # the settings' own size, as at first: neither
    assert [json.loads(line)["sizes"] for line in out.read_text().splitlines()] == [None, [], [], rooms]
    header, line, *_ = (
        part for part in capsys.readouterr().out.splitlines() if part.startswith(("| change", "| base"))
    )
    assert header.count("packed") == 2 and f"{again[0]['bpb']:.5f} ({again[0]['bytes']:,})" in line


def test_a_probed_effect_keeps_what_the_model_tells(corpus, monkeypatch, tmp_path):
    """--probe: an equilibrium's telemetry in its line, nothing for a model that has none; without, it is run again."""
    shared = shared_settings("deq", iterations=1, val_tokens_limit=500, **corpus.knobs())
    out = tmp_path / "runs.jsonl"
    asked = ("effects", "PRESET=deq NUM_LOOPS=0", "plain: DEQ_LAYER=-1", "--out", out, *shared)
    for flags, told in ((), [None, None]), (("--probe",), [None, None, ["deq"], []]), (("--probe",), ...):
        assert bench_main(monkeypatch, *asked, *flags) == 0
        lines = [json.loads(line)["probes"] for line in out.read_text().splitlines()]
        assert len(lines) == 4 if told is ... else [line if line is None else list(line) for line in lines] == told
    assert len(lines[2]["deq"]["anderson"]["p50"]) == 32


def test_a_file_too_small_loses_nothing(corpus, monkeypatch, tmp_path, capsys):
    """A size that no step reaches is told; the run and its other files are kept."""
    shared = shared_settings("record", iterations=1, val_tokens_limit=500, **corpus.knobs())
    out = tmp_path / "runs.jsonl"
    room = len(bench.tg.packed_script(bench.tg.script_source())) + 60_000
    sizes = (room - 59_000, room)
    assert bench_main(monkeypatch, "effects", "PRESET=record", "--out", out, *shared, "--packed", *sizes) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert [file["target"] for file in row["files"]] == [room] and row["bpb"] > 0
    assert f"no file of {sizes[0]} bytes" in capsys.readouterr().out


def test_files_are_drawn(monkeypatch, tmp_path):
    """Two changes of two seeds at two sizes, one without a file of the larger: their means and spreads."""
    pytest.importorskip("matplotlib")
    scores = {("base", 10): (1.4, 1.6), ("base", 20): (1.2, 1.3), ("small", 10): (1.7, 1.7)}
    rows = [
        dict(name=name, seed=seed, files=[dict(target=t, bytes=t * 10**6, bpb=scores[name, t][seed])
                                          for t in (10, 20) if (name, t) in scores])
        for name in ("base", "small") for seed in (0, 1)
    ]  # fmt: skip
    drawn = []
    monkeypatch.setattr(bench.report, "save", lambda plt, figure, path: drawn.append(figure.axes[0]))
    bench.plot_files(rows, tmp_path / "bytes.png")
    lines = {line.get_label(): line.lines[0].get_xydata().tolist() for line in drawn[0].containers}
    assert lines == {"base": [[10, 1.5], [20, 1.25]], "small": [[10, 1.7]]}
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == ["base", "small"]


def test_effects_are_against_the_same_seed(corpus, monkeypatch, tmp_path, capsys):
    """Changes given and rows of a group; what --out holds is not run again; the table pairs runs by seed."""
    (tmp_path / "gauntlet.txt").write_text(
        "group | mine | own | yes | -\n"
        "row | smear | mine | any | 1 | PRESET=record SMEAR_GATE=0 | -\n"
        "row | other | mine | any | 1 | PRESET=naive | -\n"
    )
    monkeypatch.setattr(bench.report, "ROOT", tmp_path)
    shared = shared_settings("record", iterations=3, **corpus.knobs())
    out = tmp_path / "runs.jsonl"
    words = (
        "effects",
        "PRESET=record",
        "hot: MATRIX_LR=0.5",
        "--group",
        "mine",
        "--seeds",
        1,
        2,
        "--out",
        out,
        *shared,
    )
    assert bench_main(monkeypatch, *words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["name"], row["seed"]) for row in rows] == [
        ("base", 1), ("base", 2), ("smear", 1), ("smear", 2), ("hot", 1), ("hot", 2)
    ]  # fmt: skip
    text = capsys.readouterr().out
    gain = sum(rows[4 + i]["bpb"] - rows[i]["bpb"] for i in (0, 1)) / 2
    line = next(line for line in text.splitlines() if line.startswith("| hot"))
    assert float(line.split("|")[3].split()[0]) == pytest.approx(gain, abs=1e-5) and gain
    assert bench_main(monkeypatch, *words) == 0
    assert len(out.read_text().splitlines()) == 6 and line in capsys.readouterr().out
    assert bench_main(monkeypatch, "effects", "PRESET=record", "hot: MATRIX") == 2

"""records/report.py: statistics, foreign logs, tables, plots, records; and the audit of train_gpt.py."""

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("report", ROOT / "records" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)

# ---- statistics -----------------------------------------------------------------------------------------------------


def test_students_t_has_its_closed_forms():
    """df 1 is Cauchy's; df 2 is algebraic; the quantile inverts the distribution."""
    for t in (-30.0, -2.5, -0.3, 0.0, 1e-6, 0.7, 4.0, 100.0):
        assert report.t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-12)
        assert report.t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-12)
    for df in (1, 2, 3, 7.5, 40):
        for p in (0.01, 0.5, 0.9, 0.99):
            assert report.t_cdf(report.t_quantile(p, df), df) == pytest.approx(p, abs=1e-9)
    assert report.t_quantile(0.99, 2) == pytest.approx(6.964557, abs=1e-5)
    assert report.t_cdf(math.inf, 3) == 1 and report.t_cdf(-math.inf, 3) == 0


def test_p_values_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = [1.0562, 1.0568, 1.0566], [1.0581, 1.0577, 1.0590, 1.0584]
    wanted = stats.ttest_ind(a, b, equal_var=False, alternative="less").pvalue
    assert report.p_welch(a, b) == pytest.approx(wanted, rel=1e-9)
    assert report.p_below_target(a, 1.057) == pytest.approx(
        stats.ttest_1samp(a, 1.057, alternative="less").pvalue, rel=1e-9
    )
    assert report.p_paired([x - y for x, y in zip(a, b, strict=False)]) == pytest.approx(
        stats.ttest_rel(a, b[:3], alternative="less").pvalue, rel=1e-9
    )
    for t in (-4.2, 0.1, 3.3):
        assert report.t_cdf(t, 6.3) == pytest.approx(stats.t.cdf(t, 6.3), rel=1e-10)


def test_margin_is_what_is_missing():
    """Shifted by the margin, p is 0.01; where p is below it already, nothing is missing."""
    values = [1.20, 1.21, 1.22]
    need = report.margin_needed(values, 1.2)
    assert report.p_below_target([v - need for v in values], 1.2) == pytest.approx(0.01, rel=1e-6)
    assert report.margin_needed(values, 2.0) == 0
    assert report.margin_needed([1.2], 1.1) is None and report.p_below_target([1.2], 1.3) is None
    assert report.p_welch([1.0, 1.0], [2.0, 2.0]) == 0 and report.p_paired([0.0, 0.0]) == 0.5


# ---- foreign logs ---------------------------------------------------------------------------------------------------

OURS = """
val_tokens: 59920 val_bytes: 130162
model_params:1019416
500/20000 train_loss: 2.5705 train_time: 0.8m tok/s: 8341171
4000/20000 val_loss: 2.4235 val_bpb: 1.1074
stopping_early: wallclock_cap train_time: 599672ms step: 5001/20000
peak memory allocated: 41697 MiB reserved: 41720 MiB
diagnostic pre-quantization post-ema val_loss:2.33 val_bpb:1.0603 eval_time:9000ms
Serialized model: 135412345 bytes
Code size (uncompressed): 191274 bytes
Code size (compressed): 37155 bytes
Serialized model quantized+pergroup: 15910335 bytes
Total submission size quantized+pergroup: 15947490 bytes
diagnostic quantized val_loss:2.35 val_bpb:1.0687 eval_time:9500ms
ttp: b775/782 bl:2.2660 bb:1.0534 rl:2.3 rb:1.06 dl:6892-7524 gd:0
quantized_ttt_phased val_loss:2.31115900 val_bpb:1.05610947 eval_time:540111ms
total_eval_time:540.1s
"""


def test_a_records_log():
    result = report.parse_log(OURS)
    assert {s: row["val_bpb"] for s, row in result["stages"].items()} == dict(
        raw=1.1074, ema=1.0603, quantized=1.0687, ttt=1.05610947
    )
    assert (result["steps"], result["total_bytes"], result["code_bytes"]) == (5001, 15947490, 37155)
    assert result["train_seconds"] == pytest.approx(599.672) and result["eval_seconds"] == 540.1
    assert result["stages"]["ttt"]["seconds"] == pytest.approx(540.111)
    assert result["peak_memory_bytes"] == 41697 << 20 and result["curve"] == [[500, pytest.approx(48), 2.5705]]
    assert report.unusable(result) == ""


@pytest.mark.parametrize(
    "line, stage",
    [
        ("step:1000/20000 val_loss:2.3 val_bpb:1.2 train_time:1ms step_avg:1.00ms", "raw"),
        ("500/1000 val_loss: 2.3 val_bpb: 1.2", "raw"),
        ("diagnostic pre-quantization raw val_loss:2.3 val_bpb:1.2 eval_time:1ms", "raw"),
        ("final_int8_zlib_roundtrip val_loss:2.3 val_bpb:1.2 eval_time:1ms", "quantized"),
        ("final_int6_sliding_window_exact val_loss:2.3 val_bpb:1.2", "sliding"),
        ("quantized_sliding_window val_loss:2.3 val_bpb:1.2 eval_time:5ms", "sliding"),
        ("legal_ttt_exact val_loss:2.3 val_bpb:1.2", "ttt"),
        ("something else val_loss:2.3 val_bpb:1.2", None),
        ("500/1000 train_loss: 2.3 train_time: 1.0m", None),
    ],
)
def test_stages_are_never_mixed(line, stage):
    assert list(report.parse_log(line)["stages"]) == ([stage] if stage else [])


def test_exact_lines_win_and_bad_logs_say_so():
    exact = "final_int8_zlib_roundtrip_exact val_loss:2.31234567 val_bpb:1.21234567"
    rounded = "final_int8_zlib_roundtrip val_loss:2.3123 val_bpb:1.2123 eval_time:900ms"
    for text in (f"{exact}\n{rounded}", f"{rounded}\n{exact}"):
        assert report.parse_log(text)["stages"]["quantized"]["val_bpb"] == 1.21234567
    assert "no line like" in report.unusable(report.parse_log("hello"))
    assert "not finite" in report.unusable(report.parse_log("1/2 val_loss:nan val_bpb:nan"))


# ---- tables ---------------------------------------------------------------------------------------------------------

CONFIG = dict(preset="demo", iterations=8, train_batch_tokens=64, max_wallclock_seconds=0.0, val_tokens_limit=0,
              gptq=True, num_loops=1, parallel_residual_start=3, xsa_last_n=2)  # fmt: skip
SCRIPT = """
import dataclasses
@dataclasses.dataclass
class C:
    preset: str = "demo"; iterations: int = 20; train_batch_tokens: int = 64; max_wallclock_seconds: float = 0.0
    val_tokens_limit: int = 0; gptq: bool = True; num_loops: int = 1; parallel_residual_start: int = 3
    xsa_last_n: int = 2
def read_config(env):
    return C(), []
"""


def make_run(folder: Path, seed=1, bpb=1.2, stages=("raw", "quantized", "sliding"), **changes):
    """A finished run folder with files that agree with each other."""
    folder.mkdir(parents=True)
    rng, count = np.random.default_rng(seed), 50
    nbytes = rng.integers(1, 6, count).astype(np.uint16)
    nll = rng.random(count).astype(np.float32)
    nll = (nll * (bpb * math.log(2) * nbytes.sum() / nll.astype(np.float64).sum())).astype(np.float32)
    ledger = dict(nll=nll, nbytes=nbytes, order=np.arange(count), trained_before=np.zeros(count, np.int64))
    np.savez(folder / "scores.npz", **ledger)
    exact = float(nll.astype(np.float64).sum()) / math.log(2) / int(nbytes.sum())
    rows = {
        stage: dict(val_bpb=exact + 0.01 * (len(stages) - 1 - i), val_loss=2.0, seconds=1.0, tokens=count, bytes=150)
        for i, stage in enumerate(stages)
    }
    (folder / "final_model.ptz").write_bytes(b"a" * 900)
    (folder / "train_gpt_packed.py").write_bytes(b"c" * 100)
    (folder / "train_gpt.py").write_text(SCRIPT)
    (folder / "train.log").write_text("log\n")
    curve = [dict(event="train", step=s, seconds=0.5 * s, loss=4 / s + 0.1 * seed) for s in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in curve) + '{"half')
    config = CONFIG | {k: changes.pop(k) for k in list(changes) if k in CONFIG}
    result = dict(
        status="done", run_id=folder.name, preset="demo", seed=seed, world_size=1, device="cpu", config=config,
        torch_version="2.9.1+cu128", git_sha="f" * 40, steps=8, train_seconds=4.0, hessian_seconds=1.0,
        quantize_pack_seconds=1.0, startup_seconds=2.0, eval_seconds=3.0, artifact_bytes=900, code_bytes=100,
        total_bytes=1000, stages=rows, tokens_per_second=100.0,
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | changes))
    (folder / "config.json").write_text(json.dumps(config | dict(seed=seed)))
    (folder / "DONE").touch()
    return folder


def test_table_compares_one_stage_pairs_seeds_and_never_ranks_blanks_first(tmp_path, capsys):
    for seed, a, b in ((1, 1.20, 1.19), (2, 1.22, 1.20), (3, 1.21, 1.20)):
        make_run(tmp_path / f"base-s{seed}", seed, a)
        make_run(tmp_path / f"idea-s{seed}", seed, b, stages=("raw", "quantized"))
    (tmp_path / "empty-s1").mkdir()
    (tmp_path / "empty-s1" / "config.json").write_text("{}")
    assert report.main(["table", str(tmp_path), "--baseline", "base", "--target", "1.21"]) == 0
    page = capsys.readouterr().out
    assert page.index("| idea") < page.index("| base") < page.index("| empty") and "Ranked by quantized" in page
    idea = next(line for line in page.splitlines() if line.startswith("| idea"))
    differences = [1.19 - 1.21, 1.20 - 1.23, 1.20 - 1.22]
    assert f"{report.mean(differences):+.4f} ± {report.std(differences):.4f}" in idea and "3 at quantized" in idea
    assert "interrupted" in next(line for line in page.splitlines() if line.startswith("| empty"))
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert (
        len(lines) == 8
        and lines[0].startswith("row,seed,status")
        and page.startswith((tmp_path / "report.md").read_text())
    )


def test_accept_rules(tmp_path):
    rows = {}
    for name, values in (("a", (1.20, 1.22)), ("b", (1.15, 1.16))):
        runs = [report.read_run(make_run(tmp_path / f"{name}-s{i}", i, v)) for i, v in enumerate(values)]
        rows[name] = report.Row(name, runs)
    for rule, answer in {
        "bpb<1.3": True, "bpb<1.1": False, "bpb<b": False, "bpb<b+0.1": True, "sliding>=b-0.01": True,
        "bytes<=1000": True, "bytes<1000": False, "steps>=8": True, "eval_seconds<600": True, "ttt<2": None,
        "bpb<absent": None, "wonder<1": None,
    }.items():  # fmt: skip
        assert report.judge_condition(rows["a"], rule, rows)[0] is answer, rule


@pytest.mark.parametrize(
    "name, text, sentence",
    [
        ("result.json", "{", "is not readable JSON"),
        ("config.json", "[1]", "holds no JSON object"),
    ],
)
def test_damaged_folders_are_named(tmp_path, capsys, name, text, sentence):
    folder = make_run(tmp_path / "x-s1")
    (folder / name).write_text(text)
    assert report.main(["table", str(folder)]) == 2
    assert sentence in capsys.readouterr().err
    assert report.main(["table", str(tmp_path / "nowhere")]) == 2


# ---- plots ----------------------------------------------------------------------------------------------------------


def test_plots_are_made_and_labelled(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        make_run(tmp_path / f"base-s{seed}", seed)
        make_run(
            tmp_path / f"deq-s{seed}",
            seed,
            1.1,
            deq=dict(residuals=[0.5, 0.1, 0.01], depth={"1": dict(bpb=2.0), "4": dict(bpb=1.1)}),
            export=dict(
                tensors={"embed": dict(bytes=9e5, weights=1 << 20), "skips.3_6.gate": dict(bytes=9, weights=4)}
            ),
        )
    assert report.main(["plots", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        f"{n}.png" for n in ("loss_steps", "loss_seconds", "pareto", "bytes", "roles", "time", "residuals", "depth")
    }
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in made)


def test_roles_add_up():
    """Layers are taken together, vectors are one role, and nothing is lost."""
    tensors = {f"blocks.{i}.mlp.up.weight": dict(bytes=10.0 * i, weights=1 << 20) for i in range(4)}
    roles = report.role_sizes(tensors | {"blocks.0.attn_scale": dict(bytes=5.0, weights=512)})
    assert roles == {"mlp.up": (60.0, 4 << 20), "vectors": (5.0, 512)}


def test_plots_without_matplotlib_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(["plots", str(make_run(tmp_path / "x-s1"))]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


# ---- records --------------------------------------------------------------------------------------------------------

WHO = ["--name", "Good Idea", "--author", "A", "--github-id", "a", "--date", "2026-01-02"]


def record(tmp_path, *arguments):
    return report.main(["record", *map(str, arguments), *WHO, "--out", str(tmp_path / "records")])


FIELDS = (
    "author github_id name blurb date track val_loss val_bpb val_loss_std val_bpb_std seeds seed_results "
    "comparison_baseline comparison_baseline_bpb delta_vs_leaderboard_bpb delta_vs_leaderboard_nats "
    "artifact_bytes_mean artifact_bytes_max bytes_total bytes_code train_steps_mean train_wallclock_ms_mean "
    "train_wallclock_ms_max step_avg_ms_mean eval_time_s_mean eval_time_s_max hardware pytorch_version cuda_version "
    "flash_attn_version technique_summary compliance attribution logs"
).split()
SEED_FIELDS = (
    "val_loss val_bpb artifact_bytes steps step_avg_ms train_wallclock_ms eval_time_s val_tokens target_tokens "
    "pre_quant_val_bpb quantized_val_bpb"
).split()
COMPLIANCE = (
    "artifact_under_16mb train_under_600s eval_under_600s three_seeds full_validation_targets score_before_update "
    "score_first_ttt no_slot no_pre_quant_ttt no_etlb no_ngram_cache no_validation_training_leak "
    "val_tokens_equal_target_tokens"
).split()


def test_a_record_from_finished_runs(tmp_path):
    """Every file, every field, a working command, and honesty about what is short of the official shape."""
    runs = [make_run(tmp_path / f"idea-s{s}", s, 1.2 + 0.001 * s) for s in (1, 2)]
    assert record(tmp_path, *runs, "--baseline", "the row before", "--baseline-bpb", "1.25") == 0
    folder = tmp_path / "records" / "track_non_record_16mb" / "2026-01-02_Good_Idea"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"README.md", "submission.json", "requirements.txt", "train_gpt.py", "train_gpt_readable.py",
                     "train_seed1.log", "train_seed2.log"}  # fmt: skip
    assert (folder / "train_gpt.py").read_bytes() == b"c" * 100
    facts = json.loads((folder / "submission.json").read_text())
    assert not set(FIELDS) - set(facts) and not set(COMPLIANCE) - set(facts["compliance"])
    assert all(not set(SEED_FIELDS) - set(row) for row in facts["seed_results"].values())
    assert facts["val_bpb"] == pytest.approx(1.2015, abs=1e-6) and facts["cuda_version"] == "128"
    assert facts["compliance"]["three_seeds"] is False and facts["compliance"]["score_before_update"] is True
    template = json.loads((ROOT / "records/track_10min_16mb/TEMPLATE_8xH100/submission.json").read_text())
    assert set(template) == set(facts) and set(template["compliance"]) == set(facts["compliance"])
    assert all(set(row) == set(facts["seed_results"]["1"]) for row in template["seed_results"].values())
    page = (folder / "README.md").read_text()
    assert "PRESET=demo SEED=2 RUN_ID=seed2 ITERATIONS=8 torchrun --standalone --nproc_per_node=1" in page
    assert "no claim of significance" in page and "not on 8x H100" in page and "C4 single left-to-right" in page
    assert "| ITERATIONS |    8 |     20 |" in page and "depth recurrence: #1204" in page
    assert str(tmp_path) not in page
    assert record(tmp_path, *runs) == 2


def tamper_scores(folder, **columns):
    scores = dict(np.load(folder / "scores.npz"))
    np.savez(folder / "scores.npz", **{name: change(scores[name].copy()) for name, change in columns.items()},
             **{name: value for name, value in scores.items() if name not in columns})  # fmt: skip


def put(place, value):
    def change(array):
        array[place] = value
        return array

    return change


REFUSED = {
    "dirty tree": (dict(git_sha="abc+"), None, "dirty tree"),
    "unknown commit": (dict(git_sha=""), None, "is in no commit"),
    "over the cap": (dict(total_bytes=16_000_101), "fat", "exceed 16,000,000"),
    "other bytes": (dict(total_bytes=999), None, "its files have 1000 bytes"),
    "other settings": (dict(iterations=9), None, "mix configurations (ITERATIONS 8 and 9)"),
    "part of the text": (dict(val_tokens_limit=5), None, "VAL_TOKENS_LIMIT is set"),
    "scored twice": ({}, dict(order=put(3, 4)), "scores a token twice"),
    "update first": ({}, dict(trained_before=put(3, 9)), "update before its score"),
    "other score": ({}, dict(nll=put(3, 9.0)), "scores.npz gives"),
    "repeated seed": (dict(seed=1), None, "repeat"),
    "other script": ({}, "script", "different scripts"),
    "no scores": ({}, "unlink", "SAVE_SCORES=1"),
    "not done": ({}, "open", "not done"),
    "a peer": (dict(source="log"), None, "another script"),
    "failed audit": ({}, "audit", "its audit failed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_records_that_are_refused(tmp_path, capsys, case):
    changes, damage, sentence = REFUSED[case]
    good, bad = make_run(tmp_path / "idea-s1", 1), make_run(tmp_path / "idea-s2", **(dict(seed=2) | changes))
    if isinstance(damage, dict):
        tamper_scores(bad, **damage)
    elif damage == "fat":
        (bad / "final_model.ptz").write_bytes(b"a" * 16_000_001)
    elif damage == "audit":
        (bad / "audit.txt").write_text("audit of idea-s2\nFAIL size: too many\n")
    elif damage == "script":
        (bad / "train_gpt.py").write_text(SCRIPT + "# changed\n")
    elif damage:
        (bad / {"unlink": "scores.npz", "open": "DONE"}[damage]).unlink()
        if damage == "open":
            (bad / "result.json").unlink()
    assert record(tmp_path, good, bad) == 2
    assert sentence in capsys.readouterr().err and not list((tmp_path / "records").glob("*/*"))


def test_the_timed_track_is_strict(tmp_path, capsys):
    official = dict(world_size=8, device="NVIDIA H100 80GB HBM3")
    runs = [make_run(tmp_path / f"idea-s{s}", s, **official) for s in (1, 2, 3)]
    track = ["--track", "10min_16mb"]
    assert record(tmp_path, *runs[:2], *track) == 2 and "needs 3 seeds, there are 2" in capsys.readouterr().err
    assert record(tmp_path, *runs, *track) == 0
    slow = make_run(tmp_path / "idea-s4", 4, train_seconds=599.0, eval_seconds=601.0, **official)
    small = make_run(tmp_path / "idea-s5", 5)
    assert record(tmp_path, *runs, slow, small, *track) == 2
    errors = capsys.readouterr().err
    assert "601.0 s, over 600" in errors and "evaluation took 601.0 s" in errors and "asks for 8x H100" in errors


# ---- the shape of the file ------------------------------------------------------------------------------------------


def test_the_training_clock_has_one_list():
    """The audit and the tables count the same parts, those of a run's result.json."""
    assert report.TRAINING_PARTS == tg.TRAINING_PARTS
    told, _ = report.WORST["training_seconds"]
    timed = dict.fromkeys(report.TRAINING_PARTS.values(), 2.0) | dict(eval_seconds=100.0)
    runs = [report.RunData(Path(), "", 1, "done", result, {}, {}) for result in ({}, timed)]
    assert [told(run) for run in runs] == [None, 12.0]


def test_functions_fit_a_screen():
    import ast

    for node in ast.walk(ast.parse((ROOT / "records" / "report.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_help_and_usage(capsys):
    for arguments in (["--help"], ["table", "--help"], ["record", "--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as ended:
            report.main(arguments)
        assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


# ---- the audit ------------------------------------------------------------------------------------------------------

from conftest import tg, tiny_env, tiny_model  # noqa: E402

needs_audit = pytest.mark.skipif(not hasattr(tg, "audit_command"), reason="train_gpt.py has no audit yet")


@pytest.fixture(scope="module")
def scored(tmp_path_factory, corpus):
    """A tiny run's folder as training leaves it, made in this process: random weights, packed, and adapted scores."""
    folder = tmp_path_factory.mktemp("audited")
    env = tiny_env("record", save_scores=True, ttt_enabled=True, **corpus.knobs())
    cfg, _ = tg.read_config(env)
    stored = tg.quantize(cfg, {name: p.detach() for name, p in tiny_model(cfg).named_parameters()}, {})
    (folder / "final_model.ptz").write_bytes(tg.pack(cfg, stored, cfg.loops))
    (folder / "train_gpt_packed.py").write_bytes(b"c" * 100)
    tg.eval_command(folder / "final_model.ptz", env, tg.Launch(0, 1, 0))
    stages = json.loads((folder / "eval.json").read_text())["stages"]
    result = dict(
        config=dataclasses.asdict(cfg), stages=stages, world_size=1, device="cpu", eval_seconds=1.0, train_seconds=1.0,
        total_bytes=(folder / "final_model.ptz").stat().st_size + 100,
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(json.dumps(result["config"]))
    return folder


def audit(folder, capsys):
    """(page, complaint)"""
    try:
        tg.audit_command(folder, {})
        complaint = ""
    except tg.UserError as error:
        complaint = str(error)
    return capsys.readouterr().out, complaint


@needs_audit
def test_the_audit_passes(scored, capsys):
    page, complaint = audit(scored, capsys)
    assert complaint == "" and "FAIL" not in page and (scored / "audit.txt").read_text() == page
    for words in ("scored exactly once", "score before update", "bytes of the decoded text", "distributions sum to 1",
                  "future tokens do not matter", "time ledger", "by weights trained on [0, 64)"):  # fmt: skip
        assert words in page


def swap(array):
    array[[10, 40]] = array[[40, 10]]
    return array


def more(place):
    def change(array):
        array[place] += 1
        return array

    return change


TAMPERED = {
    "reordered scores": (dict(nll=swap), "not this artifact's, or reordered"),
    "reordered order": (dict(order=swap), "the scores are reordered"),
    "scored twice": (dict(order=put(10, 11)), "a token is scored twice"),
    "update first": (dict(trained_before=put(slice(5, 9), 60)), "an update came before its score"),
    "one byte more": (dict(nbytes=more(20)), "the byte count is off by 1"),
    "better score": (dict(nll=lambda a: a * 0.99), "score recomputed"),
    "cut short": (dict.fromkeys(("nll", "nbytes", "order", "trained_before"), lambda a: a[:-1]), "every target scored"),
}


@needs_audit
@pytest.mark.parametrize("case", TAMPERED)
def test_the_audit_names_what_was_tampered_with(scored, tmp_path, capsys, case):
    columns, sentence = TAMPERED[case]
    folder = tmp_path / "run"
    shutil.copytree(scored, folder)
    tamper_scores(folder, **columns)
    page, complaint = audit(folder, capsys)
    assert sentence in complaint and "FAIL" in page


@needs_audit
def test_the_audit_sees_the_future(scored, capsys, monkeypatch):
    """A model whose stream at t holds a trace of t + 1."""
    hidden = tg.GPT.hidden

    def peeking(self, ids, looping):
        x = hidden(self, ids, looping)
        return x + 0.1 * torch.roll(x, -1, dims=1)

    monkeypatch.setattr(tg.GPT, "hidden", peeking)
    assert "the model depends on the future" in audit(scored, capsys)[1]


@needs_audit
def test_the_audit_sees_distributions_that_are_none(scored, capsys, monkeypatch):
    nll = tg.GPT.nll
    monkeypatch.setattr(tg.GPT, "nll", lambda self, x, targets: nll(self, x, targets) - 0.01)
    assert "distributions sum to 1" in audit(scored, capsys)[1]


@needs_audit
def test_the_audit_counts_the_files(scored, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(scored, folder)
    (folder / "train_gpt_packed.py").write_bytes(b"c" * 99)
    assert "result.json says" in audit(folder, capsys)[1]
    (folder / "scores.npz").unlink()
    assert "SAVE_SCORES=1" in audit(folder, capsys)[1]

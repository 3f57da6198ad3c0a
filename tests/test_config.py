"""Configuration: types, ranges, misspelt names, presets, help, and a plan without data."""

import dataclasses
import os
import types

import pytest
from conftest import PRESETS, every_preset, tg, tiny_env


def refused(env: dict[str, str]) -> str:
    """The message with which an environment is refused; it is one line."""
    with pytest.raises(tg.UserError) as caught:
        tg.read_config(env)
    message = str(caught.value)
    assert caught.value.code == 2 and "\n" not in message
    return message


# ---- types and ranges -----------------------------------------------------------------------------------------------


def test_values_get_the_type_of_their_default():
    """Integers, floats, strings and booleans are parsed by the field's own type."""
    env = {"SEED": "7", "MATRIX_LR": "1e-2", "SMEAR_GATE": "1", "GPTQ": "false", "RUN_ID": "x y"}
    cfg, warnings = tg.read_config(env)
    assert (cfg.seed, cfg.matrix_lr, cfg.smear_gate, cfg.gptq, cfg.run_id) == (7, 0.01, True, False, "x y")
    assert [type(value) for value in (cfg.seed, cfg.matrix_lr, cfg.smear_gate)] == [int, float, bool]
    assert warnings == []


@pytest.mark.parametrize(
    "name", [name for name, field in tg.knobs().items() if type(field.default) in (int, float, bool)]
)
def test_text_is_no_number(name):
    """Every number and switch refuses a word and an empty text, naming the variable and the value."""
    for text in ("many", ""):
        message = refused({name: text})
        assert name in message and repr(text) in message


@pytest.mark.parametrize("text", ["1.5", "1e3", "0x10"])
def test_fractions_are_no_integers(text):
    """An integer knob takes integers only, and says so."""
    assert "ITERATIONS" in refused({"ITERATIONS": text})


@pytest.mark.parametrize("text", ["2", "yes", "on", "-1"])
def test_switches_take_zero_and_one(text):
    """A switch is 0 or 1 (or true, false)."""
    assert "0 or 1" in refused({"GPTQ": text})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_floats_must_be_finite(text):
    """No float knob takes nan or an infinity."""
    assert "MATRIX_LR" in refused({"MATRIX_LR": text})


BOUNDED = [
    (name, side) for name, field in tg.knobs().items() for side in ("lo", "hi") if field.metadata[side] is not None
]


@pytest.mark.parametrize(("name", "side"), BOUNDED, ids=[f"{name}-{side}" for name, side in BOUNDED])
def test_ranges_are_kept(name, side):
    """One beyond each bound is refused by name; the bound itself passes the parser."""
    field = tg.knobs()[name]
    bound, kind = field.metadata[side], type(field.default)
    beyond = bound - 1 if side == "lo" else bound + 1
    assert "out of range" in refused({name: str(kind(beyond))})
    assert tg.parse_knob(name, field, str(kind(bound) if kind is int else bound)) == bound


CHOICES = [name for name, field in tg.knobs().items() if field.metadata["choices"]]


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_closed(name):
    """A named value outside the list is refused, and the message gives the list."""
    choices = [str(choice) for choice in tg.knobs()[name].metadata["choices"]]
    message = refused({name: "something_else"})
    assert all(choice in message for choice in choices)
    for choice in choices:
        assert str(tg.parse_knob(name, tg.knobs()[name], choice)) == choice


def test_optimizers_accept_every_allowed_bound():
    """What the range allows, AdamW takes: no traceback from inside torch."""
    import torch

    fields = tg.knobs()
    for name in ("BETA1", "BETA2"):
        for bound in (fields[name].metadata["lo"], fields[name].metadata["hi"]):
            try:
                tg.parse_knob(name, fields[name], str(bound))
            except tg.UserError:
                continue
            torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(float(bound), float(bound)))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("ITERATION", "ITERATIONS"), ("MATRIXLR", "MATRIX_LR"), ("NUM_LOOP", "NUM_LOOPS"), ("VOCABSIZE", "VOCAB_SIZE"),
     ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"), ("EMA_DECEY", "EMA_DECAY"), ("PRESETS", "PRESET")],
)  # fmt: skip
def test_a_near_miss_stops_the_run(wrong, right):
    """A misspelt knob is an error with a suggestion; ALLOW_ENV lets it pass."""
    message = refused({wrong: "1"})
    assert wrong in message and f"did you mean {right}?" in message
    tg.read_config({wrong: "1", "ALLOW_ENV": wrong})


def test_a_stranger_of_a_known_family_warns():
    """An unknown name that begins like our knobs warns, and stops the run under STRICT_ENV=1."""
    env = {"TTT_WARP_SPEED_FACTOR": "9"}
    cfg, warnings = tg.read_config(env)
    assert len(warnings) == 1 and "TTT_WARP_SPEED_FACTOR" in warnings[0]
    assert cfg == tg.read_config({})[0]
    assert "TTT_WARP_SPEED_FACTOR" in refused({**env, "STRICT_ENV": "1"})


@pytest.mark.parametrize("name", ["preset", "Matrix_LR"])
def test_a_knob_in_other_letters_is_refused(name):
    """What would be a knob in capitals is no knob: it would change nothing."""
    assert name.upper() in refused({name: "1"})
    assert tg.read_config({name: "1", "ALLOW_ENV": name}) == (tg.read_config({})[0], [])


def test_what_other_scripts_call_a_knob_warns():
    """LEARNING_RATE and the like are told by our name."""
    _, warnings = tg.read_config({"LEARNING_RATE": "1", "MAX_STEPS": "9"})
    assert [line.split()[-2] for line in warnings] == ["MATRIX_LR", "ITERATIONS"]
    assert set(tg.USUAL_NAMES.values()) <= set(tg.knobs()) and not set(tg.USUAL_NAMES) & set(tg.knobs())


def test_knobs_that_sleep_are_told():
    """A variable whose mechanism is off warns, unless it is the default; with the mechanism on it does not."""
    for starts, _, wanted in tg.IDLE:
        for start in starts:
            assert any(name.startswith(start) for name in tg.knobs()), start
        assert wanted
    _, warnings = tg.read_config({"LORA_RANK_ATTN": "8", "MOD_LAYERS": "loop", "NUM_LOOPS": "0", "DEQ_TOL": "0.001"})
    assert [line.split("=")[0] for line in warnings] == ["LORA_RANK_ATTN", "MOD_LAYERS"]
    assert not tg.read_config({"LORA_RANK_ATTN": "8", "SEED_MAPS": "attn", "MOD_LAYERS": "1@0.5"})[1]


def test_other_peoples_variables_are_left_alone():
    """What shells, launchers and libraries set is neither an error nor a warning."""
    env = {
        "PATH": "/bin", "HOME": "/home/x", "USER": "x", "LANG": "C", "PWD": "/", "SHLVL": "1", "TERM": "dumb", "_": "y",
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1", "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "NCCL_DEBUG": "INFO",
        "PYTHONUNBUFFERED": "1", "HF_HOME": "/x", "http_proxy": "p", "SLURM_JOB_ID": "1", "TMPDIR": "/tmp", "CI": "1",
        "LOCAL_WORLD_SIZE": "1", "ROLE_RANK": "0", "DATA_ROOT": "/d", "MODEL_DIR": "/m", "PYTEST_CURRENT_TEST": "t",
        "TORCHINDUCTOR_CACHE_DIR": "/c", "STRICT_ENV": "1",
    }  # fmt: skip
    assert tg.read_config(env) == (tg.read_config({})[0], [])


def test_launch_variables_must_be_integers():
    """RANK, WORLD_SIZE and LOCAL_RANK from a launcher; nonsense is one clear error."""
    assert tg.read_launch({}) == (0, 1, 0)
    assert tg.read_launch({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == (3, 8, 1)
    with pytest.raises(tg.UserError, match="WORLD_SIZE"):
        tg.read_launch({"WORLD_SIZE": "two"})


# ---- presets and cross-field checks ---------------------------------------------------------------------------------


@every_preset
def test_presets_are_defaults(preset):
    """A preset is valid, says what it is, uses known fields and allowed values, and yields to explicit variables."""
    row = tg.PRESETS[preset]
    fields = {field.name: field for field in dataclasses.fields(tg.Config)}
    assert row.text and set(row.values) <= set(fields)
    for name, value in row.values.items():
        assert type(value) is type(fields[name].default), name
        if name != "tokenizer_path":
            tg.parse_knob(name.upper(), fields[name], str(int(value)) if isinstance(value, bool) else str(value))
    cfg, warnings = tg.read_config({"PRESET": preset})
    assert cfg.preset == preset and not warnings
    assert all(getattr(cfg, name) == value for name, value in row.values.items())
    assert tg.read_config({"PRESET": preset, "SEED": "5", "MUON_WD": "0.5"})[0].muon_wd == 0.5


def test_default_preset_and_unknown_preset():
    """record is the default; a name that is no preset is refused with the list."""
    assert tg.read_config({})[0].preset == "record"
    message = refused({"PRESET": "recrod"})
    assert all(name in message for name in PRESETS)


@every_preset
def test_the_official_shape(preset):
    """Every preset but demo keeps the challenge's clock and byte budget by default."""
    cfg, _ = tg.read_config({"PRESET": preset})
    assert cfg.size_limit == 16_000_000 and cfg.eval_budget_seconds <= 600
    if preset != "demo":
        assert 0 < cfg.max_wallclock_seconds <= 600 and cfg.gptq_reserve_seconds > 0


CONTRADICTIONS = {
    "heads": ({"MODEL_DIM": "100", "NUM_HEADS": "8"}, "NUM_HEADS"),
    "groups": ({"NUM_HEADS": "8", "NUM_KV_HEADS": "3"}, "NUM_KV_HEADS"),
    "odd_head": ({"MODEL_DIM": "24", "NUM_HEADS": "8", "ROPE_DIMS": "0"}, "even"),
    "odd_rope": ({"ROPE_DIMS": "7"}, "ROPE_DIMS"),
    "long_rope": ({"ROPE_DIMS": "66"}, "ROPE_DIMS"),
    "loop_order": ({"LOOP_START": "5", "LOOP_END": "4"}, "LOOP_START"),
    "loop_end": ({"LOOP_END": "11"}, "NUM_LAYERS"),
    "recur_layers": ({"RECUR_LAYERS": "4,11"}, "NUM_LAYERS"),
    "recur_many": ({"RECUR_LAYERS": "4," * 300}, "RECUR_LAYERS"),
    "wide_adapters": ({"SEED_MAPS": "mlp", "LORA_RANK_MLP": "513"}, "LORA_RANK_MLP"),
    "linear_layers": ({"LINEAR_LAYERS": "x"}, "NUM_LAYERS"),
    "experts": ({"USE_EIGENSPACE_ROUTING": "1", "NUM_EXPERTS": "7"}, "NUM_EXPERTS"),
    "elsewhere": ({"RUN_ID": "../evil"}, "RUN_ID"),
    "parent": ({"RUN_ID": ".."}, "RUN_ID"),
    "batch": ({"TRAIN_BATCH_TOKENS": "3000"}, "TRAIN_SEQ_LEN"),
    "stride": ({"EVAL_STRIDE": "4096"}, "EVAL_STRIDE"),
    "chunk": ({"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "3000"}, "TTT_CHUNK_TOKENS"),
    "short_chunk": ({"TTT_ENABLED": "1", "TTT_CHUNK_TOKENS": "1024"}, "EVAL_SEQ_LEN"),
    "ttt_stride": (
        {"TTT_ENABLED": "1", "EVAL_SEQ_LEN": "2040", "EVAL_STRIDE": "64", "TTT_CHUNK_TOKENS": "6400"},
        "EVAL_STRIDE",
    ),
    "average": ({"WEIGHTS": "ema", "EMA_DECAY": "0"}, "EMA_DECAY"),
    "gate": ({"ATTN_GATE_DIMS": "513"}, "ATTN_GATE_DIMS"),
    "seeded": ({"SEED_MAPS": "q,upp"}, "SEED_MAPS"),
    "seeded_layer": ({"SEED_LAYERS": "3,11"}, "SEED_LAYERS"),
    "inner_layer": ({"TTT_LINEAR_LAYERS": "2,11"}, "TTT_LINEAR_LAYERS"),
    "value_layer": ({"VE_LAYERS": "x,2"}, "VE_LAYERS"),
    "nothing_left": ({"SEED_BASIS": "none", "LORA_RANK_MLP": "0"}, "SEED_BASIS"),
    "reserve": ({"GPTQ_RESERVE_SECONDS": "580"}, "GPTQ_RESERVE_SECONDS"),
    "size": ({"SIZE_TARGET": "17000000"}, "SIZE_TARGET"),
    "equilibrium": ({"DEQ_LAYER": "11"}, "DEQ_LAYER"),
    "window": ({"DEQ_ANDERSON_WINDOW": "12"}, "DEQ_ANDERSON_WINDOW"),
    "directions": (
        {"USE_EIGENSPACE_ROUTING": "1", "NUM_EXPERTS": "16", "MODEL_DIM": "40", "NUM_HEADS": "4", "ROPE_DIMS": "10"},
        "NUM_EXPERTS",
    ),
    "buckets": ({"BIGRAM_VOCAB_SIZE": "1"}, "BIGRAM_VOCAB_SIZE"),
    "slope": ({"DEQ_SLOPE_PENALTY": "1", "DEQ_GRAD": "unroll"}, "DEQ_GRAD"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case):
    """Knobs that cannot go together are refused by name, with their values."""
    env, name = CONTRADICTIONS[case]
    assert name in refused(env)


def test_every_check_can_fail():
    """No cross-field check is idle: each one is the first to fail for some case above."""
    failing, rules = set(), tg.MODEL_CHECKS + tg.TRAIN_CHECKS
    for env, _ in CONTRADICTIONS.values():
        values = {**tg.PRESETS["record"].values}
        values |= {name.lower(): tg.parse_knob(name, tg.knobs()[name], text) for name, text in env.items()}
        cfg = tg.Config(**values)
        failing.add(next(index for index, (holds, _) in enumerate(rules) if not holds(cfg)))
    assert failing == set(range(len(rules)))


def test_loops_switched_off_lift_their_checks():
    """Without recurrence the segment's bounds do not matter."""
    assert not tg.read_config({"NUM_LOOPS": "0", "LOOP_END": "99"})[0].loops


# ---- purity, help, plan ---------------------------------------------------------------------------------------------


def test_read_config_is_pure(monkeypatch):
    """The result depends on the mapping alone, which is not changed, and neither is the process's environment."""
    monkeypatch.setenv("ITERATIONS", "17")
    frozen = types.MappingProxyType({"SEED": "4"})
    before = dict(os.environ)
    first, second = tg.read_config(frozen)[0], tg.read_config(frozen)[0]
    assert first == second and first.iterations == tg.read_config({})[0].iterations != 17
    assert dict(os.environ) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.seed = 5


def test_base_stands_between_preset_and_variables():
    """Defaults < preset < an artifact's configuration < variables."""
    base = {"preset": "naive", "num_layers": 7, "model_dim": 256}
    cfg, _ = tg.read_config({"MODEL_DIM": "128"}, base=base)
    assert (cfg.preset, cfg.num_layers, cfg.model_dim) == ("naive", 7, 128)


def test_help_lists_every_knob(capsys):
    """--help names every knob with its meaning, every choice and every preset."""
    tg.command(["--help"], {})
    text = capsys.readouterr().out
    for name, field in tg.knobs().items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert field.metadata["text"] in line and "|".join(map(str, field.metadata["choices"])) in line
    assert all(f"  {name} " in text for name in PRESETS)


def test_every_knob_explains_itself():
    """Each knob has a text and a group, and its default lies in its own range."""
    for name, field in tg.knobs().items():
        assert len(field.metadata["text"]) > 4 and field.metadata["group"], name
        text = str(int(field.default)) if isinstance(field.default, bool) else str(field.default)
        assert tg.parse_knob(name, field, text) == field.default


@every_preset
def test_describe_needs_no_data(preset, capsys, tmp_path):
    """The plan of a run is printed without text, tokenizer, GPU or a run folder."""
    env = tiny_env(preset, data_dir=str(tmp_path / "absent"), runs_dir=str(tmp_path / "runs"))
    tg.command(["describe"], env)
    text = capsys.readouterr().out
    assert preset in text and "visits" in text and "muon" in text
    assert list(tmp_path.iterdir()) == []


def test_the_plan_follows_from_its_parts():
    """Steps x ms = the clock; the wire carries what the optimizer exchanges; a measured speed is met on one GPU."""
    cfg, _ = tg.read_config({"PRESET": "pr1783", "ENABLE_LOOPING_AT": "1"})
    plan = {row.name: row.value for row in tg.run_plan(cfg, gpus=8)}
    steps, ms = float(plan["steps"].split()[0]), float(plan["ms a step, loop off / on"].split()[0])
    assert steps * ms / 1e3 == pytest.approx(cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds, rel=0.01)
    matrices = sum(p.numel() for name, p in tg.meta_model(cfg).named_parameters() if tg.owner(name, tg.PARAM_TABLE).kind
                   == "muon")  # fmt: skip
    small = sum(p.numel() for p in tg.meta_model(cfg).parameters()) - matrices
    assert tg.wire_bytes(cfg, 8) == pytest.approx(7 / 8 * (6 * matrices + 8 * small))
    assert tg.wire_bytes(cfg, 1) == 0
    speed = {row.name: row.value for row in tg.run_plan(cfg, gpus=1)}["tokens/s, loop off / on"]
    assert float(speed.split()[0]) == pytest.approx(1.18, rel=0.02)


def test_the_plan_counts_what_scoring_solves():
    """Sliding windows of an equilibrium take as long as its evaluations in scoring ask, whatever training does."""

    def seconds(**values: str) -> float:
        cfg, _ = tg.read_config({"PRESET": "deq"} | values)
        plan = {row.name: row.value for row in tg.run_plan(cfg, gpus=8)}
        return float(next(value for name, value in plan.items() if name.startswith("sliding")).split()[0])

    assert seconds(DEQ_MAX_ITER_EVAL="24") > 1.8 * seconds(DEQ_MAX_ITER_EVAL="12")
    assert seconds(DEQ_MAX_ITER_TRAIN="8") == seconds(DEQ_MAX_ITER_TRAIN="3")


def test_unknown_commands_are_refused():
    """A command that does not exist names those that do."""
    for arguments in (["trian"], ["eval"], ["eval", "a", "b"], ["describe", "x"], ["pack", "a", "b"]):
        with pytest.raises(tg.UserError, match="describe"):
            tg.command(arguments, {})

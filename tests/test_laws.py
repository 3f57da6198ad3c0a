"""The twelve laws of the design, for every preset and for each optional mechanism alone."""

import contextlib
import hashlib
import importlib.util
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import (
    PRESETS,
    ROOT,
    VOCAB,
    OneOf,
    available_compressors,
    both_loop_states,
    clean_env,
    encode,
    every_preset,
    every_variant,
    finish,
    random_ids,
    random_validation,
    randomise,
    replace,
    run_steps,
    sandbox,
    script,
    single,
    start,
    tg,
    tiny,
    tiny_model,
    train_tokenizer,
    trainer_of,
    write_shard,
)

LENGTH = 24


def config_of(variant, **overrides) -> tg.Config:
    preset, values = variant
    return tiny(preset, **{**values, **overrides})


@torch.no_grad()
def logits(model, ids, looping):
    return model.logits(ids, looping)


# ---- 1: causal ------------------------------------------------------------------------------------------------------


def leak(model, cfg, looping) -> float:
    """Largest change of a logit before t when every token from t on changes (and documents start elsewhere)."""
    ids, worst = random_ids(cfg, 2, LENGTH), 0.0
    before = logits(model, ids, looping)
    for t in (1, 7, 8, LENGTH - 1):
        other = ids.clone()
        other[:, t:] = random_ids(cfg, 2, LENGTH, seed=t)[:, :1].clamp(min=5) + 3
        other[:, t::5] = tg.BOS
        after = logits(model, other, looping)
        assert not torch.equal(before[:, t:], after[:, t:])
        worst = max(worst, float((before[:, :t] - after[:, :t]).abs().max()))
    return worst


@both_loop_states
@every_variant
def test_1_future_tokens_do_not_matter(variant, looping):
    """Law 1, bit for bit."""
    cfg = config_of(variant)
    assert leak(tiny_model(cfg), cfg, looping) == 0.0


@pytest.mark.parametrize("name", ["attention", "mixer", "head"])
def test_1_catches_a_leak(monkeypatch, name):
    """The causality test fails on models that look ahead."""
    cfg = tiny("record", smear_gate=True)
    if name == "attention":
        monkeypatch.setitem(tg.ATTENTION, "math", lambda q, k, v, docs: q + v.mean(1, keepdim=True).repeat(1, 1, 2, 1))
    if name == "mixer":
        monkeypatch.setattr(tg.SmearGate, "forward", lambda self, e, ids: e + 1e-3 * e.roll(-1, 1))
    if name == "head":
        monkeypatch.setitem(tg.PARTS, "logits", lambda x, w, c: tg.head_logits(x + 1e-3 * x.flip(1), w, c))
    assert leak(tiny_model(cfg), cfg, False) > 0


# ---- 2: batch-invariant ---------------------------------------------------------------------------------------------


def mixing(model, cfg, looping) -> float:
    """Largest change of a sequence's logits when the other sequences of its batch change."""
    ids, worst = random_ids(cfg, 4, LENGTH), 0.0
    before = logits(model, ids, looping)
    for keep in range(4):
        other = random_ids(cfg, 4, LENGTH, seed=9 + keep)
        other[keep] = ids[keep]
        worst = max(worst, float((before[keep] - logits(model, other, looping)[keep]).abs().max()))
    alone = torch.cat([logits(model, ids[i : i + 1], looping) for i in range(4)])
    torch.testing.assert_close(alone, before, rtol=0, atol=1e-4)
    return worst


@both_loop_states
@every_variant
def test_2_other_sequences_do_not_matter(variant, looping):
    """Law 2: bit-equal in a batch of the same shape, and the same alone up to rounding."""
    cfg = config_of(variant)
    assert mixing(tiny_model(cfg), cfg, looping) == 0.0


def test_2_catches_mixing(monkeypatch):
    """The batch test fails on a model that normalises over the batch."""
    cfg = tiny("record")
    monkeypatch.setitem(tg.PARTS, "skip", lambda skip, x, s: skip(x, s) + 1e-6 * x.mean(0, keepdim=True))
    with pytest.raises(AssertionError):
        assert mixing(tiny_model(cfg), cfg, False) == 0.0


def score_rows(cfg: tg.Config) -> dict:
    """Each evaluation row of this configuration."""
    return {row.label: row.score for row in tg.EVALS if row.wanted(cfg)}


@pytest.mark.parametrize("label", [row.label for row in tg.EVALS])
@every_variant
def test_2_score_does_not_depend_on_the_batch(variant, label):
    """Law 2: every stage gives the same nats of every target with small and large evaluation batches."""
    cfg = config_of(variant, ttt_enabled=True)
    val, found = random_validation(cfg, 110), []
    for tokens in (32, 4096):
        changed = replace(cfg, val_batch_tokens=tokens)
        model = tiny_model(cfg)
        score, _ = score_rows(changed)[label](single(changed), model, val, cfg.loops, 600.0)
        found.append(score.nll)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 7])
@every_preset
def test_2_score_does_not_depend_on_the_ranks(preset, world_size):
    """Law 2: the ranks' shares of plain and sliding windows add up to one process's score."""
    cfg = tiny(preset)
    val, model = random_validation(cfg, 150), tiny_model(cfg)
    for row in (tg.score_plain, tg.score_sliding):
        whole = row(single(cfg), model, val, cfg.loops, 600.0)[0].nll
        parts = [row(OneOf(cfg, rank, world_size), model, val, cfg.loops, 600.0)[0].nll for rank in range(world_size)]
        assert all(not (a.bool() & b.bool()).any() for i, a in enumerate(parts) for b in parts[:i])
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=0, atol=1e-4)


# ---- 3: normalised --------------------------------------------------------------------------------------------------


@both_loop_states
@every_variant
def test_3_distributions_sum_to_one(variant, looping):
    """Law 3: exp(-nll) over all V targets sums to 1 at every position, and is the softmax of the logits."""
    cfg = config_of(variant)
    model, ids = tiny_model(cfg), random_ids(cfg, 1, 8)
    targets = torch.arange(cfg.vocab_size)[:, None].repeat(1, 8)
    with torch.no_grad():
        nll = model.nll(model.hidden(ids, looping).repeat(cfg.vocab_size, 1, 1), targets)
    chances = nll.T[None].double().neg().exp()
    torch.testing.assert_close(chances.sum(-1), torch.ones(1, 8, dtype=torch.float64), rtol=0, atol=1e-5)
    softmax = logits(model, ids, looping).double().softmax(-1)
    torch.testing.assert_close(chances, softmax, rtol=1e-4, atol=1e-9)
    assert chances.std(-1).min() > 1e-4


# ---- 4: score before update, once -----------------------------------------------------------------------------------


def ttt_config(variant) -> tg.Config:
    return config_of(variant, ttt_enabled=True, ttt_lr=0.5, ttt_epochs=1, ttt_selective=False)


def first_changes(cfg, row, cuts: tuple) -> list[int]:
    """For each cut the first target whose nats change when all tokens from target ``cut`` on change."""
    val = random_validation(cfg, 150)
    streams = [val] + [val._replace(tokens=val.tokens.clone()) for _ in cuts]
    for cut, other in zip(cuts, streams[1:], strict=True):
        other.tokens[cut + 1 :] = (other.tokens[cut + 1 :] + 7) % cfg.vocab_size
    nll = [row(single(cfg), tiny_model(cfg), stream, cfg.loops, 600.0)[0].nll for stream in streams]
    return [int(torch.nonzero(nll[0] != other)[0]) for other in nll[1:]]


@pytest.mark.parametrize("label", [row.label for row in tg.EVALS])
@every_variant
def test_4_a_score_knows_no_later_token(variant, label):
    """Law 4 by behaviour: no stage's score of a target depends on that target's successors, training included."""
    cfg, cuts = ttt_config(variant), (60, 131)
    assert first_changes(cfg, score_rows(cfg)[label], cuts) == list(cuts)


def test_4_catches_training_before_scoring(monkeypatch):
    """The test above fails on a stage that trains on a chunk and scores it afterwards."""
    cfg, score = ttt_config(("record", {})), tg.TestTimeTrainer.score_chunk

    def cheat(self, chunk, nll):
        if chunk < self.chunks - 1:
            self.adapt(chunk, 1)
        score(self, chunk, nll)

    monkeypatch.setattr(tg.TestTimeTrainer, "score_chunk", cheat)
    assert first_changes(cfg, tg.score_ttt, (60,))[0] < 60


@pytest.mark.parametrize("label", [row.label for row in tg.EVALS])
@every_variant
def test_4_the_ledger_is_complete(variant, label, tmp_path):
    """Law 4: every stage's ledger passes its check, covers all targets, and is what scores.npz holds."""
    cfg = ttt_config(variant)
    val = random_validation(cfg, 200)
    score, ledger = score_rows(cfg)[label](single(cfg), tiny_model(cfg), val, cfg.loops, 600.0)
    ledger.check()
    assert len(ledger.order) == len(ledger.trained_before) == len(score.nll) == 200
    assert (score.nll > 0).all()
    assert bool(ledger.trained_before.any()) == (label == "quantized_ttt")
    tg.save_scores(tmp_path / "scores.npz", score, val, ledger)
    with np.load(tmp_path / "scores.npz") as saved:
        kinds = {name: saved[name].dtype.name for name in saved.files}
        assert kinds == dict(nll="float32", nbytes="uint16", order="int64", trained_before="int64")
        bpb = saved["nll"].astype(np.float64).sum() / math.log(2) / saved["nbytes"].sum()
    assert bpb == pytest.approx(score.val_bpb, rel=1e-6)


def test_4_the_ledger_tells_when_it_trained():
    """The third chunk was scored by weights that had seen the first two, and no more."""
    cfg = ttt_config(("record", {}))
    _, ledger = tg.score_ttt(single(cfg), tiny_model(cfg), random_validation(cfg, 200), True, 600.0)
    assert ledger.trained_before.tolist() == [0] * 64 + [64] * 64 + [128] * 64 + [192] * 8


TAMPERED = {
    "twice": lambda order, trained: (np.where(order == 5, 6, order), trained),
    "never": lambda order, trained: (order + 1, trained),
    "trained_on_itself": lambda order, trained: (order, np.where(order == 7, 8, trained)),
    "trained_on_later": lambda order, trained: (order, trained + 1),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_4_tampered_ledgers_are_refused(case, tmp_path):
    """A target scored twice or never, or trained on before it was scored, stops scores.npz from being written."""
    val = random_validation(tiny("record"), 20)
    score = tg.Score(1.0, 1.0, 0.0, 20, 60, torch.ones(20))
    good = np.arange(20), np.maximum(np.arange(20) - 3, 0)
    tg.save_scores(tmp_path / "good.npz", score, val, tg.Ledger(*good))
    with pytest.raises((AssertionError, tg.UserError)):
        tg.save_scores(tmp_path / "bad.npz", score, val, tg.Ledger(*TAMPERED[case](*good)))
    assert not (tmp_path / "bad.npz").exists()


def test_4_windows_score_each_target_once():
    """Plain and sliding windows over random lengths and strides: each target once, with enough context."""
    rng = random.Random(0)
    for _ in range(400):
        length = rng.randrange(1, 40)
        stride, targets = rng.randrange(1, length + 1), rng.randrange(1, 300)
        for windows, context in (
            (tg.plain_windows(targets, length), 0),
            (tg.sliding_windows(targets, length, stride), length - stride),
        ):
            counts = np.zeros(targets, int)
            for begin, lo, hi in zip(*windows, strict=True):
                assert begin <= lo < hi <= min(begin + length, targets)
                assert begin == 0 or lo - begin >= context
                counts[lo:hi] += 1
            assert (counts == 1).all(), (length, stride, targets)


class Flat(torch.nn.Module):
    """A stand-in for the model: every token is equally likely."""

    def hidden(self, ids, looping):
        return torch.zeros(*ids.shape, 4)

    def nll(self, x, targets):
        return torch.full(targets.shape, math.log(VOCAB))


@pytest.mark.parametrize("row", [tg.score_plain, tg.score_sliding])
def test_4_a_uniform_model_scores_log_v(row):
    """bpb of a uniform model is log2(V) x tokens / bytes, whatever the lengths and batches."""
    for targets, stride, batch in ((1, 1, 32), (31, 7, 64), (32, 32, 32), (33, 5, 4096), (200, 8, 96)):
        cfg = tiny("record", eval_stride=stride, val_batch_tokens=batch, ttt_chunk_tokens=64 * stride)
        val = random_validation(cfg, targets)
        score, _ = row(single(cfg), Flat(), val, False, 600.0)
        assert (score.tokens, score.bytes) == (targets, 3 * targets)
        assert score.val_bpb == pytest.approx(math.log2(VOCAB) * targets / (3 * targets), rel=1e-6)


@pytest.mark.parametrize("chunk", [8, 16, 40, 64, 1000])
def test_4_any_chunk_length(chunk):
    """Test-time training scores every target once with chunks shorter than a window, odd, or longer than the text."""
    cfg = replace(ttt_config(("record", {})), ttt_chunk_tokens=chunk)
    score, ledger = tg.score_ttt(single(cfg), tiny_model(cfg), random_validation(cfg, 100), True, 600.0)
    ledger.check()
    assert (score.nll > 0).all()


def test_4_epochs_shrink_to_the_budget():
    """Test-time training without time left scores everything and trains nothing."""
    cfg = ttt_config(("record", {}))
    val = random_validation(cfg, 200)
    score, ledger = tg.score_ttt(single(cfg), tiny_model(cfg), val, True, 0.0)
    assert not ledger.trained_before.any()
    sliding, _ = tg.score_sliding(single(cfg), tiny_model(cfg), val, True, 600.0)
    torch.testing.assert_close(score.nll, sliding.nll, rtol=0, atol=1e-5)


@pytest.mark.parametrize("selective", [False, True])
def test_4_selective_training_freezes_the_rest(selective):
    """TTT_SELECTIVE moves the recurrent layers and the skips only; afterwards every parameter can train again."""
    cfg = replace(ttt_config(("record", {})), ttt_selective=selective)
    model = tiny_model(cfg)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    tg.TestTimeTrainer(single(cfg), model, random_validation(cfg, 200), True).evaluate(600.0)
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    chosen = {name for name in before if name.startswith(("blocks.2.", "blocks.3.", "skips."))}
    assert moved == (chosen if selective else set(before))
    assert all(param.requires_grad for param in model.parameters())


# ---- 5: bytes are the text's ----------------------------------------------------------------------------------------

NASTY = [
    "plain words over there", "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m", "emoji \U0001f600\U0001f468\u200d\U0001f469!",
    "double  spaces   inside", " leading space", "  two leading", "trailing  ", "tab\tand\nline\r\n", "x", "",
    "\u4e2d\u6587 \u0416", "<s> is text here", "\u2581 literal mark", "12345 67890",
]  # fmt: skip

TOKENIZERS = {
    "dummy_prefix": {},
    "no_dummy_prefix": dict(add_dummy_prefix=False),
    "nfkc": dict(normalization_rule_name="nmt_nfkc"),
    "nfkc_no_dummy_prefix": dict(normalization_rule_name="nmt_nfkc", add_dummy_prefix=False),
    "squeezing": dict(remove_extra_whitespaces=True),
}


def counted_bytes(pieces, texts: list[str]) -> list[int]:
    """Bytes of each document by the table, from the stream of all of them (plus a last BOS)."""
    tokens = np.array([*encode(pieces, texts), tg.BOS])
    counted = tg.byte_table(pieces).count(tokens[:-1], tokens[1:])
    starts = np.flatnonzero(tokens == tg.BOS)
    return [int(counted[begin : end - 1].sum()) for begin, end in zip(starts[:-1], starts[1:], strict=True)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_5_bytes_equal_the_decoded_text(kind):
    """Law 5: the counted bytes of each document equal those of its decoded text, and BOS counts nothing."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(**TOKENIZERS[kind]))
    texts = [text for text in NASTY if kind != "squeezing" or "\u2581" not in text]  # it eats a mark at the start
    decoded = [pieces.decode(pieces.encode(text)) for text in texts]
    assert counted_bytes(pieces, texts) == [len(text.encode()) for text in decoded]
    if kind == "dummy_prefix":
        assert all(a == b for a, b in zip(decoded, texts, strict=True) if "\u2581" not in b)


def test_5_validation_bytes_are_the_documents(validation, corpus):
    """Law 5: the denominator of the score is the UTF-8 length of the documents that were tokenized."""
    assert int(validation.nbytes.sum()) == sum(len(text.encode()) for text in corpus.texts)


def test_5_sidecar_is_used_and_checked(corpus, tmp_path):
    """The byte sidecar overrides the table; one of another length, or far from the decoded text, is refused."""
    shutil.copy(corpus.folder / "fineweb_val_000000.bin", tmp_path)
    cfg = tiny("record", data_path=str(tmp_path), tokenizer_path=str(corpus.tokenizer))
    pieces, sidecar = tg.load_tokenizer(cfg), tmp_path / "fineweb_val_bytes_000000.bin"
    table = tg.load_validation(cfg, pieces).nbytes.numpy()
    original = np.concatenate([[0], table])
    original[1] += 1
    write_shard(sidecar, original)
    assert int(tg.load_validation(cfg, pieces).nbytes.sum()) == table.sum() + 1
    for wrong in (original[1:], 2 * original):
        write_shard(sidecar, wrong)
        with pytest.raises(tg.UserError, match="sidecar"):
            tg.load_validation(cfg, pieces)


def test_5_a_wrong_byte_table_is_caught(validation, corpus, monkeypatch):
    """The check against decoded documents fails when the table is off by one byte somewhere."""
    cfg, right = tiny("record", **corpus.knobs()), tg.byte_table
    monkeypatch.setattr(tg, "byte_table", lambda pieces: right(pieces)._replace(base=right(pieces).base + np.uint16(1)))
    with pytest.raises(tg.UserError, match="byte count"):
        tg.load_validation(cfg, tg.load_tokenizer(cfg))


def test_5_a_vocabulary_without_a_lone_space_is_refused():
    """Without the piece U+2581 bytes cannot be counted: a clear error."""
    lines = ["abab abba baab"] * 50
    model = train_tokenizer(lines, vocab_size=12, byte_fallback=False, hard_vocab_limit=False, model_type="word")
    with pytest.raises(tg.UserError, match="2581"):
        tg.byte_table(sentencepiece.SentencePieceProcessor(model_proto=model))


SHARED = ROOT.parent / "shared" / "data" / "tokenizers"


@pytest.mark.parametrize("size", [1024, 4096, 8192])
def test_5_real_tokenizers(size):
    """Law 5 with the challenge's own tokenizers, on text with accents, emoji, spaces and byte fallback."""
    path = SHARED / f"fineweb_{size}_bpe.model"
    if not path.exists():
        pytest.skip("the challenge's tokenizers are not here")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [text for text in NASTY if text] * 2
    assert counted_bytes(pieces, texts) == [len(pieces.decode(pieces.encode(text)).encode()) for text in texts]


# ---- 6: the artifact's own score ------------------------------------------------------------------------------------


def packed_artifact(preset: str, corpus, folder: Path, **overrides) -> tuple[tg.Config, bytes]:
    """A trained, quantized, packed tiny model of a preset, in a folder of its own."""
    cfg = tiny(preset, ttt_enabled=True, **corpus.knobs(), **overrides)
    trainer = trainer_of(cfg)
    run_steps(trainer, 2, 2)
    hessians = tg.collect_hessians(trainer.run, trainer.model, tg.calibration_rows(trainer), cfg.loops)
    blob = tg.pack(cfg, tg.quantize(cfg, trainer.model.state_dict(), hessians), cfg.loops, quick=True)
    folder.mkdir(parents=True)
    (folder / "final_model.ptz").write_bytes(blob)
    return cfg, blob


def eval_process(folder: Path, corpus, **values) -> tuple:
    """The eval command in a fresh process that knows the data, and nothing of how the artifact was made."""
    env = clean_env(corpus.env(), {"DEVICE": "cpu", "THREADS": "1"}, values)
    return finish(start(script("eval", folder / "final_model.ptz"), env, cwd=folder))


@pytest.fixture(scope="module")
def rescored(corpus, tmp_path_factory) -> dict:
    """preset -> (config, blob, how the fresh process ended, its folder)."""
    root = tmp_path_factory.mktemp("rescored")
    made = {preset: packed_artifact(preset, corpus, root / preset) for preset in PRESETS}
    env = clean_env(corpus.env(), {"DEVICE": "cpu", "THREADS": "1"})
    ended = sandbox({preset: (["eval", root / preset / "final_model.ptz"], env) for preset in PRESETS}, root)
    return {preset: (*made[preset], ended[preset], root / preset) for preset in PRESETS}


@every_preset
def test_6_a_fresh_process_gives_the_same_score(rescored, preset, validation):
    """Law 6: eval.json of a fresh process equals scoring unpack(artifact) here, stage by stage."""
    cfg, blob, ended, folder = rescored[preset]
    assert ended.code == 0, ended.err
    stages = json.loads((folder / "eval.json").read_text())["stages"]
    assert set(stages) == {"quantized", "sliding", "ttt"}
    artifact = tg.unpack(blob)
    for row in tg.EVALS:
        model = tg.build_model(cfg, single(cfg))
        model.load_state_dict(artifact.state())
        score, _ = row.score(single(cfg), model, validation, artifact.looping, 600.0)
        told = stages[tg.STAGE_NAMES.get(row.label, row.label)]
        assert told["val_bpb"] == pytest.approx(score.val_bpb, rel=1e-6)
        assert (told["tokens"], told["bytes"]) == (validation.targets, int(validation.nbytes.sum()))


@every_preset
def test_6_the_ledger_file_recomputes_the_score(rescored, preset):
    """Laws 4-6: scores.npz alone gives the final stage's bpb, and its ledger holds."""
    *_, folder = rescored[preset]
    told = json.loads((folder / "eval.json").read_text())["stages"]["ttt"]
    with np.load(folder / "scores.npz") as saved:
        bpb = saved["nll"].astype(np.float64).sum() / math.log(2) / saved["nbytes"].astype(np.int64).sum()
        tg.Ledger(saved["order"], saved["trained_before"]).check()
    assert bpb == pytest.approx(told["val_bpb"], rel=1e-6)


@every_preset
def test_6_the_audit_passes(rescored, preset, corpus, capsys):
    """The reviewer's page on every preset's artifact, as the fresh process left it: nothing fails."""
    *_, folder = rescored[preset]
    (folder / "train_gpt_packed.py").write_bytes(tg.packed_script(tg.script_source()))
    tg.audit_command(folder, {**corpus.env(), "DEVICE": "cpu"})
    page = capsys.readouterr().out
    assert "FAIL" not in page and page.count("ok ") >= 8, page


def test_6_the_audit_knows_sidecars_and_limits(rescored, corpus, tmp_path, capsys):
    """A sidecar may count a byte that the decoded text lacks; a part of the text is not all of it, whoever set so."""
    text, cfg = shutil.copytree(corpus.folder, tmp_path / "text"), tiny("record", **corpus.knobs())
    nbytes = tg.load_validation(cfg, tg.load_tokenizer(cfg)).nbytes.numpy()
    nbytes[0] += 1
    write_shard(text / "fineweb_val_bytes_000000.bin", np.concatenate([[0], nbytes]))
    data = {**corpus.env(), "DATA_PATH": str(text), "DEVICE": "cpu", "THREADS": "1", "TTT_ENABLED": "0"}
    jobs = {name: {**data, "VAL_TOKENS_LIMIT": limit} for name, limit in (("whole", "0"), ("part", "300"))}
    for name in jobs:
        (tmp_path / name).mkdir()
        shutil.copy(rescored["record"][3] / "final_model.ptz", tmp_path / name)
        (tmp_path / name / "train_gpt_packed.py").write_bytes(tg.packed_script(tg.script_source()))
    ended = sandbox(
        {name: (["eval", tmp_path / name / "final_model.ptz"], clean_env(env)) for name, env in jobs.items()}, tmp_path
    )
    assert all(end.code == 0 for end in ended.values()), ended
    tg.audit_command(tmp_path / "whole", jobs["whole"])
    assert "FAIL" not in capsys.readouterr().out
    with pytest.raises(tg.UserError, match="every target scored: 299 scores"):
        tg.audit_command(tmp_path / "part", jobs["part"])


def test_6_eval_knows_where_the_run_had_its_text(tmp_path):
    """By its config.json, unless the environment names another text, which may have another tokenizer."""
    ran = dict(data_dir="/a", dataset="b", data_path="", tokenizer_path="/t", device="cpu", threads=1, model_dim=8)
    tg.write_json(tmp_path / "config.json", ran)
    assert tg.places_of(tmp_path, {}) == {name: value for name, value in ran.items() if name != "model_dim"}
    assert tg.places_of(tmp_path, {"DATASET": "c"}) == dict(device="cpu", threads=1)
    assert tg.places_of(tmp_path / "none", {}) == {}


def test_6_eval_needs_only_the_artifact(corpus, tmp_path):
    """An artifact with unusual lengths is scored in a clean environment: the training's knobs do not matter."""
    folder = tmp_path / "odd"
    packed_artifact("record", corpus, folder, train_seq_len=40, train_batch_tokens=120, eval_seq_len=40)
    ended = eval_process(folder, corpus, NUM_LAYERS="many", MATRIX_LR="9")
    assert ended.code == 0, ended.err
    assert re.findall("warning: (.*) is .*, the artifact's", ended.out) == ["NUM_LAYERS"]


# ---- 7: transparent at start, alive after one step ------------------------------------------------------------------

ADD_ONS = {
    "smear": (dict(smear_gate=False), dict(smear_gate=True), 2),
    "sparse_gate": (dict(attn_gate="none"), dict(attn_gate="sparse"), 6),
    "ttt_linear": (dict(attn_gate="none"), dict(attn_gate="none", ttt_linear_layers="1,4", ttt_linear_chunk=5), 4),
    "bigram": (dict(bigram_vocab_size=0), dict(bigram_vocab_size=97, bigram_dim=8), 3),
    "resid_mix": (dict(resid_mix=False), dict(resid_mix=True), 6),
}


@both_loop_states
@pytest.mark.parametrize("name", ADD_ONS)
def test_7_add_ons_start_as_the_identity(name, looping):
    """Law 7: a model with random weights gives the same logits when the add-on joins with its own initial values."""
    off, on, count = ADD_ONS[name]
    without, cfg = tiny("record", **off), tiny("record", **on)
    base = tiny_model(without)
    model = tg.build_model(cfg, single(cfg))
    missing = model.load_state_dict(base.state_dict(), strict=False).missing_keys
    assert len(missing) == count
    ids = random_ids(cfg, 2, LENGTH)
    expected = logits(base, ids, looping)
    assert torch.equal(logits(model, ids, looping), expected)
    randomise(model)
    model.load_state_dict(base.state_dict(), strict=False)
    assert not torch.equal(logits(model, ids, looping), expected)


def test_7_the_rest_says_why_not():
    """Mechanisms that are not the identity at the start say so in their docstring."""
    for kind in (tg.ExcludeSelf, tg.GatedSkip, tg.AddedSkip, tg.ValueEmbedding):
        assert "start" in kind.__doc__ or "ot transparent" in kind.__doc__


@every_variant
def test_7_a_fresh_block_adds_nothing(variant):
    """Law 7: attention and MLP start with zero output, so that depth and recurrence start as the identity."""
    cfg = config_of(variant)
    model = tg.build_model(cfg, single(cfg))
    ids = random_ids(cfg, 1, LENGTH)
    for looping in (False, True):
        with torch.no_grad():
            x, out = tg.embed(model, ids), model.hidden(ids, looping)
            torch.testing.assert_close(tg.norm(out), tg.norm(x), rtol=0, atol=1e-5)
            changed = randomise(tg.build_model(cfg, single(cfg))).hidden(ids, looping)
            assert (tg.norm(changed) - tg.norm(x)).abs().max() > 0.1


def used_rows(model: tg.GPT, name: str, ids: torch.Tensor, looping: bool) -> list[torch.Tensor]:
    """Rows of a table that is read by token, or by visit, and nothing else; empty for every other parameter."""
    part, alone = name.split(".")[-1], model.cfg.pass_controls and name.endswith(("_scale", "resid_mix"))
    visits = model.get_parameter(name).dim() > 1 + (part == "resid_mix")
    first_only = part in ("basis_scale", "depth", "step_gate") or name.startswith("carries.resonance.")
    if not looping and (first_only or (alone and visits)):
        return [torch.zeros(1, dtype=torch.long)]  # without the recurrence there is one visit
    if name in ("values.table", "mixers.input.table") or (name == "embed" and model.head is not None):
        return [ids.flatten()]
    if name == "mixers.bigram.table":
        bigram = model.mixers["bigram"]
        return [bigram.bucket(ids, which).flatten() for which in range(bigram.hashes)]
    return []


@every_variant
def test_7_every_row_learns(variant, corpus):
    """Law 7: after the first optimizer steps every row of every parameter has a gradient.

    Output maps start at zero and block what is upstream of them for one step; an untied head starts at zero too and
    blocks the output maps for one more, and so do adapters' outer factors, TTT-Linear's gate and the experts' scales,
    zero too; what predicts a pass's change needs one that changes something, and an output map of its own. Exempt:
    rows of an untied table whose token or bucket is not in the batch, and of visits that are not made.
    """
    cfg = config_of(variant, train_batch_tokens=512, micro_batch_tokens=512, **corpus.knobs())
    trainer = trainer_of(cfg)
    blocked = (not cfg.tie_embeddings, cfg.seed_maps != "none", cfg.ttt_linear_layers != "", cfg.use_td_recurrence,
               cfg.use_td_recurrence, cfg.use_eigenspace_routing)  # fmt: skip
    run_steps(trainer, 1 + sum(blocked), 1000)
    for looping in (False, True):
        rows = trainer.stream.batch(64, 16)
        trainer.model.zero_grad(set_to_none=True)
        trainer.accumulate(rows, looping)
        for name, param in trainer.model.named_parameters():
            if param.grad is None and not looping and name.startswith(("carries.", "skips.")):
                continue  # joins passes that are not made
            grad = param.grad if param.dim() != 1 else param.grad[:, None]
            alive = grad.flatten(1).any(1) if grad.dim() else grad.bool()[None]
            if used := used_rows(trainer.model, name, rows[:, :-1].long(), looping):
                alive = alive[torch.cat(used).unique()]
            assert alive.all(), f"{name}: {int((~alive).sum())} dead rows"


# ---- 8: deterministic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_8_data_do_not_depend_on_the_ranks(corpus, world_size):
    """Law 8: the ranks' batches, put together, are one process's batches, token for token."""
    cfg = tiny("record", train_batch_tokens=5 * 32, **corpus.knobs())
    stream = tg.TrainStream(cfg)
    whole = tg.Prefetcher(single(cfg), stream, 3)
    parts = [tg.Prefetcher(OneOf(cfg, rank, world_size), stream, 3) for rank in range(world_size)]
    for _ in range(3):
        assert torch.equal(torch.cat([part.next() for part in parts]), whole.next())
    for prefetcher in (whole, *parts):
        prefetcher.close()


PINNED_ORDERS = {
    "shuffled": "bef8e333e29b44d60c779f3df796e5b21fc834e1c2b8f43e1a62bc14e2bc9dd0",
    "coprime": "7a0613e1fe89843c983c688c3aa1d364cc6042f0f563d954e4efe3c2256757e5",
}


@pytest.mark.parametrize("name", PINNED_ORDERS)
def test_8_the_data_order_is_pinned(tmp_path, name):
    """Law 8: the order of an epoch is a function of SEED and the epoch alone, the same on every machine, for ever."""
    for index, tokens in enumerate((1000, 777)):
        write_shard(tmp_path / f"fineweb_train_{index:06d}.bin", np.arange(tokens) % VOCAB)
    digest = hashlib.sha256()
    for seed in (0, 1337):
        stream = tg.TrainStream(tiny("record", seed=seed, data_path=str(tmp_path), data_order=name))
        for epoch in (0, 1):
            order, phases = stream.epoch(epoch)
            digest.update(np.asarray([*order, *phases], "<i8").tobytes())
    assert digest.hexdigest() == PINNED_ORDERS[name]


@every_preset
def test_8_initial_weights_depend_on_the_seed_alone(preset):
    """Law 8: the same seed gives the same weights whatever was drawn before; another seed others."""
    cfg = tiny(preset)
    first = tg.build_model(cfg, single(cfg)).state_dict()
    torch.randn(77)
    second = tg.build_model(cfg, single(cfg)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tg.build_model(replace(cfg, seed=cfg.seed + 1), single(cfg)).state_dict()
    assert not torch.equal(first["embed"], other["embed"])


def same(a, b) -> bool:
    """Whether two nested states are bit-equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@every_variant
def test_8_resuming_is_exact(variant, corpus, tmp_path):
    """Law 8: two runs are bit-equal, and so are 10 + 10 resumed steps and 20: weights, average, optimizers.

    A mechanism alone, and the presets that are not run by default, take 3 + 3 steps.
    """
    steps = 20 if variant in (("record", {}), ("demo", {})) else 6
    cfg = config_of(variant, iterations=steps, train_batch_tokens=64, **corpus.knobs())
    whole, again, half = trainer_of(cfg), trainer_of(cfg), trainer_of(cfg, tmp_path)
    losses = run_steps(whole, steps, steps)
    assert run_steps(again, steps, steps) == losses
    assert same(whole.state_dict(), again.state_dict())
    first = run_steps(half, steps // 2, steps)
    half.save()
    second = trainer_of(cfg, tmp_path)
    assert not same(second.state_dict()["model"], half.state_dict()["model"])
    second.resume(tmp_path)
    assert first + run_steps(second, steps // 2, steps) == losses
    assert same(second.state_dict(), whole.state_dict())


def test_8_a_finished_run_resumes_with_its_recurrence_on(corpus, tmp_path):
    """Resuming after the last step takes no step and keeps the loop state that is exported."""
    cfg = tiny("record", iterations=4, **corpus.knobs())
    first = trainer_of(cfg, tmp_path)
    val = tg.load_validation(cfg, tg.load_tokenizer(cfg))
    assert first.train(0.0, val)["looping"]
    again = trainer_of(cfg, tmp_path)
    again.resume(tmp_path)
    assert again.train(0.0, val)["looping"] and again.step == 4


@pytest.mark.parametrize("change", [{"seed": 99}, {"train_shards": 1}])
def test_8_resuming_with_another_order_of_data_is_refused(change, corpus, tmp_path):
    """SEED and the shards decide the order of the data; a checkpoint of another order is refused."""
    first = trainer_of(tiny("record", **corpus.knobs()), tmp_path)
    assert len(first.stream.shards) > 1
    first.save()
    with pytest.raises(tg.UserError, match="RESUME=1"):
        trainer_of(tiny("record", **corpus.knobs(), **change), tmp_path).resume(tmp_path)


def test_10_out_of_memory_halves_the_micro_batch(corpus, monkeypatch):
    """Warm-up tries smaller micro-batches until one fits, and says so when none does."""
    cfg = tiny("record", warmup_steps=1, micro_batch_tokens=128, **corpus.knobs())
    trainer, real = trainer_of(cfg), tg.Trainer.accumulate

    def limited(self, rows, *state):
        if len(rows) > most:
            raise torch.OutOfMemoryError("no memory")
        return real(self, rows, *state)

    monkeypatch.setattr(tg.Trainer, "accumulate", limited)
    most = 1
    assert trainer.micro == 4
    trainer.warm_up()
    assert trainer.micro == 1
    most = 0
    with pytest.raises(tg.UserError, match="does not fit"):
        trainer.warm_up()


def test_8_resuming_with_other_knobs_is_refused(corpus, tmp_path):
    """A checkpoint of another model or schedule is refused by the knob's name."""
    trainer = trainer_of(tiny("record", **corpus.knobs()), tmp_path)
    trainer.save()
    for change in (dict(matrix_lr=0.5), dict(mlp_slope=0.25)):
        other = trainer_of(tiny("record", **corpus.knobs(), **change), tmp_path)
        with pytest.raises(tg.UserError, match=next(iter(change)).upper()):
            other.resume(tmp_path)


def test_8_micro_batches_do_not_change_the_step(corpus):
    """Accumulation over micro-batches gives the whole batch's loss and gradients."""
    cfg, found = tiny("record", train_batch_tokens=256, **corpus.knobs()), []
    for micro in (32, 96, 256):
        trainer = trainer_of(replace(cfg, micro_batch_tokens=micro))
        randomise(trainer.model)
        loss = trainer.accumulate(trainer.stream.batch(0, 8), True)
        found.append((loss, [param.grad for param in trainer.model.parameters()]))
    for loss, grads in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grads, found[0][1], rtol=1e-4, atol=1e-7)


def test_8_every_rank_has_text_to_calibrate_on(corpus):
    """Fewer sequences than ranks would leave some with nothing to average."""
    values = dict(train_batch_tokens=256, gptq_calibration_batches=1, gptq_batch_tokens=64, fisher_tokens=32)
    cfg = tiny("record", **values, **corpus.knobs())
    run = OneOf(cfg, 0, 8)  # the one whose share is empty where there are too few
    trainer = tg.Trainer(run)
    rows = tg.calibration_rows(trainer)
    assert len(rows) == 8 and math.isfinite(tg.mean_loss(run, trainer.model, rows, False))
    hessians, fisher, *_ = tg.calibrate(run, trainer.model, trainer.model.state_dict(), rows, False, {})
    assert hessians["head.weight"].any() and fisher["head.weight"].any()


# ---- 9: inside the clock --------------------------------------------------------------------------------------------


class FakeTime:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def __getattr__(self, name):
        import time

        return getattr(time, name)


def test_9_whichever_binds_drives():
    """Steps or clock less reserve, whichever is further, is the fraction of the run; at 1 it is over."""
    cfg = tiny("record", iterations=100, max_wallclock_seconds=60, gptq_reserve_seconds=10)
    assert tg.progress(cfg, 0, 0.0) == (0.0, False)
    assert tg.progress(cfg, 50, 5.0) == (0.5, False)
    assert tg.progress(cfg, 10, 40.0) == (0.8, False)
    assert tg.progress(cfg, 10, 50.0) == (1.0, True)
    assert tg.progress(cfg, 100, 0.0) == (1.0, True)
    assert tg.progress(replace(cfg, max_wallclock_seconds=0.0), 10, 1e9) == (0.1, False)
    assert tg.progress(replace(cfg, iterations=0), 0, 0.0).done


@every_preset
def test_9_learning_rate_schedule(preset):
    """1 until the warmdown, then a straight line to MIN_LR; never rises, never leaves [MIN_LR, 1]."""
    cfg, late = replace(tg.read_config({"PRESET": preset})[0], min_lr=0.1), 10**6
    values = [tg.lr_scale(cfg, late, i / 1000) for i in range(1001)]
    assert values[0] == 1.0 and values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(values[:-1], values[1:], strict=True))
    middle = 1 - cfg.warmdown_frac / 2
    assert tg.lr_scale(cfg, late, middle) == pytest.approx(0.55)
    assert tg.lr_scale(cfg, late, 1 - cfg.warmdown_frac - 1e-6) == 1.0
    assert {tg.lr_scale(replace(cfg, warmdown_frac=0.0), late, i / 10) for i in range(11)} == {1.0}


def test_9_learning_rate_warm_up():
    """Over LR_WARMUP_STEPS the rate rises step by step from above 0 to 1, and not at all without a warm-up."""
    cfg = tiny("record", lr_warmup_steps=4)
    rise = [tg.lr_scale(cfg, step, 0.0) for step in range(6)]
    assert 0 < rise[0] and rise[4:] == [1.0, 1.0]
    assert all(a < b for a, b in zip(rise[:4], rise[1:5], strict=True))
    assert tg.lr_scale(replace(cfg, lr_warmup_steps=0), 0, 0.0) == 1.0


@every_preset
def test_9_momentum_schedule(preset):
    """Momentum rises in a straight line over its warm-up and stays."""
    cfg = tg.read_config({"PRESET": preset})[0]
    steps = cfg.muon_momentum_warmup_steps
    assert tg.muon_momentum(cfg, 0) == cfg.muon_momentum_warmup_start
    assert tg.muon_momentum(cfg, steps) == pytest.approx(cfg.muon_momentum) == tg.muon_momentum(cfg, 10 * steps)
    half = (cfg.muon_momentum + cfg.muon_momentum_warmup_start) / 2
    assert tg.muon_momentum(cfg, steps // 2) == pytest.approx(half, abs=1e-3)
    assert tg.muon_momentum(replace(cfg, muon_momentum_warmup_steps=0), 0) == cfg.muon_momentum


def test_9_looping_switches_once():
    """The recurrence comes on at its fraction of the run and stays; without loops it never does."""
    cfg = tiny("record", enable_looping_at=0.35)
    assert [bool(tg.looping_at(cfg, f)) for f in (0, 0.349, 0.35, 1)] == [False, False, True, True]
    assert not tg.looping_at(tiny("naive"), 1.0)


def clocked_run(cfg, monkeypatch, folder, seconds_a_step) -> tuple[tg.Trainer, dict, list]:
    """Train with a fake clock; returns the trainer, what it measured, and (fraction, looping) of every step."""
    clock, trainer, seen = FakeTime(), trainer_of(cfg, folder), []
    monkeypatch.setattr(tg, "time", clock)

    def step(rows, fraction):
        seen.append((fraction, bool(tg.looping_at(cfg, fraction))))
        clock.now += seconds_a_step
        trainer.step += 1
        return torch.tensor(1.0), torch.tensor(1.0)

    def save(needed):
        clock.now += 500

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer, "save", save)
    return trainer, trainer.train(0.0, None), seen


def test_9_training_stops_inside_the_cap(corpus, monkeypatch, tmp_path):
    """The clock, not the step count, ends this run, before the reserve; checkpoints are off the clock."""
    cfg = tiny("record", iterations=1000, max_wallclock_seconds=100, gptq_reserve_seconds=20, checkpoint_every=7,
               enable_looping_at=0.5, **corpus.knobs())  # fmt: skip
    trainer, result, seen = clocked_run(cfg, monkeypatch, tmp_path, 3.0)
    assert 80 <= trainer.seconds < 83 and trainer.step == len(seen) == 27
    assert [fraction for fraction, _ in seen] == pytest.approx([3 * i / 80 for i in range(27)])
    assert [looping for _, looping in seen] == [3 * i >= 40 for i in range(27)]
    assert result["looping"] is True


def test_9_training_stops_at_the_last_step(corpus, monkeypatch, tmp_path):
    """With time to spare exactly ITERATIONS steps are done."""
    cfg = tiny("record", iterations=9, max_wallclock_seconds=100, gptq_reserve_seconds=20, **corpus.knobs())
    trainer, _, seen = clocked_run(cfg, monkeypatch, tmp_path, 1.0)
    assert trainer.step == len(seen) == 9 and trainer.seconds == pytest.approx(9)


def test_9_the_clock_pauses(monkeypatch):
    """Only the time between start and pause counts, and a resumed clock goes on from where it stood."""
    fake = FakeTime()
    monkeypatch.setattr(tg, "time", fake)
    clock = tg.Clock(single(tiny("record")), seconds=5.0)
    for spent, idle in ((2.0, 100.0), (3.0, 7.0)):
        clock.start()
        fake.now += spent
        clock.pause()
        fake.now += idle
    assert clock.seconds == clock.read()[0] == pytest.approx(10.0)


def test_9_one_authority():
    """With several ranks the clock is rank 0's, and any rank's signal reaches all."""
    cfg = tiny("record")
    run = OneOf(cfg, 1, 3)
    run.signal, seen = 15, []
    run.vote = lambda vote: seen.append(vote.clone()) or vote
    assert tg.Clock(run, seconds=9.0).read() == (0.0, 15)
    main = OneOf(cfg, 0, 3)
    assert tg.Clock(main, seconds=9.0).read() == (9.0, 0)
    assert len(seen) == 1


@every_preset
def test_9_warm_up_changes_nothing(preset, corpus):
    """Compiling steps before the clock leave weights, optimizers and average as they were."""
    cfg = tiny(preset, warmup_steps=2, **corpus.knobs())
    trainer, fresh = trainer_of(cfg), trainer_of(cfg)
    trainer.warm_up()
    assert same(trainer.state_dict(), fresh.state_dict())
    assert run_steps(trainer, 2, 4) == run_steps(fresh, 2, 4)


# ---- 10: fails early, loses nothing ---------------------------------------------------------------------------------


def train_in_process(cfg_values: dict, monkeypatch, folder: Path) -> list:
    """The train command up to its first step, in this process; returns the steps it took."""
    steps = []
    monkeypatch.setattr(tg.Trainer, "accumulate", lambda *args: steps.append(1) or pytest.fail("a step was taken"))
    cfg = tiny("record", runs_dir=str(folder), run_id="r", warmup_steps=1, **cfg_values)
    tg.train_command(cfg, tg.Launch(0, 1, 0), [])
    return steps


@pytest.mark.parametrize("compressor", list(tg.COMPRESSORS))
def test_10_a_missing_compressor(corpus, monkeypatch, tmp_path, compressor):
    """Law 10: the package is looked for before the first step, and named."""
    package, find = tg.COMPRESSORS[compressor].package, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(tg.UserError, match=f"pip install {package}"):
        train_in_process({**corpus.knobs(), "compressor": compressor}, monkeypatch, tmp_path)


def test_10_a_full_disk(corpus, monkeypatch, tmp_path):
    """Law 10: too little space for checkpoints is found before the first step."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(tg.UserError, match="free"):
        train_in_process(corpus.knobs(), monkeypatch, tmp_path)


def test_10_a_model_that_cannot_fit(corpus, monkeypatch, tmp_path):
    """Law 10: a model over the byte budget at the coarsest steps is refused before the first step, with exit code 4."""
    with pytest.raises(tg.OverBudget, match="SIZE_LIMIT") as caught:
        train_in_process({**corpus.knobs(), "size_limit": 60_000}, monkeypatch, tmp_path)
    assert caught.value.code == 4


def test_10_packing_is_tried_first(corpus, monkeypatch, tmp_path):
    """Law 10: a codec that loses something is found before the first step."""
    real = tg.pack

    def lossy(cfg, stored, *rest, **options):
        return real(cfg, {n: v if isinstance(v, tg.Quantized) else 0 * v for n, v in stored.items()}, *rest, **options)

    monkeypatch.setattr(tg, "pack", lossy)
    with pytest.raises(tg.UserError, match="survive"):
        train_in_process(corpus.knobs(), monkeypatch, tmp_path)


def test_10_the_guard_of_these_tests_works(corpus, monkeypatch, tmp_path):
    """Without a fault the run above does reach its first step."""
    with pytest.raises(pytest.fail.Exception, match="a step was taken"):
        train_in_process(corpus.knobs(), monkeypatch, tmp_path)


def test_10_an_interrupted_write_keeps_the_old_file(monkeypatch, tmp_path):
    """Law 10: a write that fails leaves the file that was there, no debris, and one clear error."""
    path = tmp_path / "checkpoint.pt"
    tg.atomic_write(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full)
    with pytest.raises(tg.UserError, match="No space left"):
        tg.atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ignored", [False, True], ids=["session", "nohup"])
def test_10_a_session_that_ends(ignored):
    """SIGHUP asks for a checkpoint like SIGTERM, but where nohup has it ignored."""
    run, before = single(tiny("record")), signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with run.watching_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert run.signal == (0 if ignored else signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_10_what_can_be_spared(corpus, monkeypatch, tmp_path, capsys):
    """A checkpoint that nobody waits for and a line of the log may fail; one that RESUME=1 is told of may not."""
    trainer = trainer_of(tiny("record", **corpus.knobs()), tmp_path / "run")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tg.os, "fsync", full)
    trainer.step = 1
    trainer.save(needed=False)
    assert "No space left" in capsys.readouterr().out
    with pytest.raises(tg.UserError, match="No space left"):
        trainer.save()
    shutil.rmtree(tmp_path / "run")
    trainer.run.log("a line")
    trainer.run.log("another")
    assert capsys.readouterr().err.count("cannot write") == 1


@pytest.mark.parametrize("case", ["knob", "tensor", "entry"])
def test_10_a_checkpoint_of_another_version(case, corpus, tmp_path):
    """What this script cannot continue from is one clear error."""
    cfg = tiny("record", **corpus.knobs())
    trainer_of(cfg, tmp_path).save()
    state = tg.load_tensors(tmp_path / "checkpoint.pt")
    if case == "knob":
        state["config"]["old_knob"] = 1
    elif case == "tensor":
        state["model"]["embed"] = state["model"]["embed"][:-1]
    else:
        del state["looping"]
    tg.save_tensors(tmp_path / "checkpoint.pt", state)
    with pytest.raises(tg.UserError, match="another version .* set another RUN_ID"):
        trainer_of(cfg).resume(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"datasets": null}', '{"datasets": [1]}'])
def test_10_a_damaged_manifest(text, tmp_path):
    """What is no manifest is one clear error."""
    (tmp_path / "manifest.json").write_text(text)
    paths = tg.data_paths(tiny("record", data_dir=str(tmp_path)))
    with pytest.raises(tg.UserError, match="manifest.json is no manifest; delete it"):
        tg.read_manifest(paths)


def test_10_attention_without_its_package(monkeypatch):
    """FlashAttention 3 is looked for before training, and named."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tg.UserError, match="ATTENTION_BACKEND=fa3 needs"):
        tg.attention_by_feature(tiny("record", attention_backend="fa3"), torch.device("cuda"))


def test_10_damaged_checkpoints(tmp_path):
    """A missing or damaged checkpoint is one clear error; a pickle in its place is not executed."""
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(tg.UserError, match="does not exist"):
        tg.load_tensors(path)
    tg.save_tensors(path, {"a": torch.ones(3)})
    assert torch.equal(tg.load_tensors(path)["a"], torch.ones(3))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(tg.UserError, match="damaged"):
        tg.load_tensors(path)
    torch.save({"run": Payload(tmp_path / "owned")}, path)
    with pytest.raises(tg.UserError, match="damaged"):
        tg.load_tensors(path)
    assert not (tmp_path / "owned").exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---- 11: safe to open -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=available_compressors())
def artifact(request) -> tuple[tg.Config, bytes]:
    cfg = tiny("record", compressor=request.param, num_layers=2, loop_start=0, loop_end=0, xsa_last_n=1)
    model = tiny_model(cfg)
    return cfg, tg.pack(cfg, tg.quantize(cfg, model.state_dict(), {}), True, quick=True)


def parts_of(blob: bytes) -> tuple[dict, bytes]:
    """(header, streams) of an artifact."""
    (size,) = struct.unpack("<I", blob[8:12])
    return json.loads(lzma.decompress(blob[44 : 44 + size])), blob[44 + size :]


def sealed(header, streams: bytes, raw: bytes | None = None) -> bytes:
    """An artifact with a correct checksum around any header and streams."""
    text = lzma.compress(json.dumps(header).encode(), format=lzma.FORMAT_ALONE) if raw is None else raw
    body = text + streams
    return tg.MAGIC + struct.pack("<I", len(text)) + hashlib.sha256(body).digest() + body


def refuse(blob: bytes) -> None:
    with pytest.raises(tg.UserError, match="artifact"):
        tg.unpack(blob)


def test_11_sealing_is_faithful(artifact):
    """The test's own sealing gives back a readable artifact, so that the refusals below mean something."""
    cfg, blob = artifact
    state = tg.unpack(sealed(*parts_of(blob))).state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tg.unpack(blob).state().items())


def test_11_truncation(artifact):
    """Law 11: an artifact cut anywhere, or with something appended, is refused."""
    _, blob = artifact
    for size in {*range(0, 120), *range(0, len(blob), 997), len(blob) - 1}:
        refuse(blob[:size])
    refuse(blob + b"\0")


def test_11_bit_flips(artifact):
    """Law 11: one flipped bit anywhere is refused."""
    _, blob = artifact
    rng = random.Random(0)
    for position in {*range(0, 100), *(rng.randrange(len(blob)) for _ in range(150))}:
        bad = bytearray(blob)
        bad[position] ^= 1 << rng.randrange(8)
        refuse(bytes(bad))


def test_11_flips_under_a_good_checksum(artifact):
    """Law 11: with the checksum recomputed, damage is refused or gives tensors of the declared shapes; nothing else."""
    _, blob = artifact
    rng, shapes = random.Random(1), {name: t.shape for name, t in tg.unpack(blob).state().items()}
    for _ in range(60):
        body = bytearray(blob[44:])
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        try:
            found = tg.unpack(blob[:12] + hashlib.sha256(body).digest() + bytes(body)).state()
        except tg.UserError:
            continue
        assert sorted(map(str, (t.shape for t in found.values()))) == sorted(map(str, shapes.values()))


BIG = 1 << 40
HOSTILE = {
    "huge_tensor": lambda h: h["tensors"][0].__setitem__(1, [BIG, BIG]),
    "large_tensor": lambda h: h["tensors"][0].__setitem__(1, [1 << 15, 1 << 15]),
    "negative": lambda h: h["tensors"][0].__setitem__(1, [-4, -16]),
    "one_negative": lambda h: h["tensors"][0].__setitem__(1, [-1, 64]),
    "fraction": lambda h: h["tensors"][0].__setitem__(1, [VOCAB + 0.0, 64]),
    "half_row": lambda h: h["tensors"][0].__setitem__(1, [VOCAB / 2 + 0.5, 64]),
    "text_shape": lambda h: h["tensors"][0].__setitem__(1, ["320", 64]),
    "no_shape": lambda h: h["tensors"][0].__setitem__(1, []),
    "null_shape": lambda h: h["tensors"][0].__setitem__(1, None),
    "transposed": lambda h: h["tensors"][0].__setitem__(1, [64, VOCAB]),
    "other_codec": lambda h: h["tensors"][0].__setitem__(2, "half"),
    "zero_rows": lambda h: h["tensors"].append(["x", [0, 5], "int"]) or h["tensors"][0].__setitem__(1, [1, 1]),
    "many_tensors": lambda h: h["tensors"].extend([[f"t{i}", [0], "half"] for i in range(5000)]),
    "dict_name": lambda h: h["tensors"][0].__setitem__(0, {}),
    "short_row": lambda h: h["tensors"][0].pop(),
    "no_tensors": lambda h: h.__setitem__("tensors", []),
    "tensors_text": lambda h: h.__setitem__("tensors", "abc"),
    "counts": lambda h: h["counts"].__setitem__(8, h["counts"][8] + 1),
    "huge_counts": lambda h: h.__setitem__("counts", [BIG] * 9),
    "wide": lambda h: h["counts"].__setitem__(slice(6, 8), [3, 3]),
    "wide_text": lambda h: h["counts"].__setitem__(slice(6, 8), ["3", "3"]),
    "no_counts": lambda h: h.__setitem__("counts", []),
    "flat": lambda h: h["tensors"][0].__setitem__(1, [VOCAB * 64]),
    "deep": lambda h: h["tensors"][0].__setitem__(1, [VOCAB, 8, 8]),
    "true_shape": lambda h: h["tensors"][0].__setitem__(1, [True, VOCAB * 64]),
    "empty_rows": lambda h: h["tensors"].append(["x", [BIG, 0], "int"]),
    "unknown_codec": lambda h: h["tensors"][0].__setitem__(2, "pickle"),
    "null_codec": lambda h: h["tensors"][0].__setitem__(2, None),
    "list_codec": lambda h: h["tensors"][0].__setitem__(2, []),
    "unheard_trellis": lambda h: h["tensors"][0].__setitem__(2, "trellis32"),
    "same_names": lambda h: h["tensors"][0].__setitem__(0, h["tensors"][1][0]),
    "many_steps": lambda h: h["tensors"].append(["x", [0, tg.LIMITS["columns"]], "trellis8"]),
    "stream_longer": lambda h: h["streams"].__setitem__(0, h["streams"][0] + 1),
    "stream_negative": lambda h: h.__setitem__("streams", [h["streams"][0] + 10, h["streams"][1] - 10 - 10**6]),
    "stream_shifted": lambda h: h.__setitem__("streams", [h["streams"][0] + 1, h["streams"][1] - 1]),
    "stream_fraction": lambda h: h.__setitem__("streams", [h["streams"][0] + 0.5, h["streams"][1] - 0.5]),
    "no_streams": lambda h: h.__setitem__("streams", []),
    "more_streams": lambda h: h["streams"].append(0),
    "compressor": lambda h: h.__setitem__("compressor", "pickle"),
    "compressor_list": lambda h: h.__setitem__("compressor", []),
    "missing_key": lambda h: h.pop("streams"),
    "missing_config": lambda h: h.pop("config"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_11_hostile_headers(artifact, case):
    """Law 11: oversized, negative, contradictory or malformed declarations are refused under a correct checksum."""
    header, streams = parts_of(artifact[1])
    HOSTILE[case](header)
    refuse(sealed(header, streams))


@pytest.mark.parametrize("raw", [b"", b"{}", b"\0" * 64, lzma.compress(b"[" * 5000, format=lzma.FORMAT_ALONE),
                                 lzma.compress(b"null"), lzma.compress(b"\xff\xfe{}")])  # fmt: skip
def test_11_headers_that_are_none(raw):
    """Law 11: what is no LZMA, no JSON or no object is refused, deep nesting included."""
    refuse(sealed(None, b"", raw))


HOSTILE_CONFIG = {
    "unknown": dict(no_such_knob=1),
    "text": dict(num_layers="two"),
    "huge_model": dict(model_dim=1 << 20, num_heads=4),
    "huge_vocabulary": dict(vocab_size=1 << 30),
    "many_layers": dict(num_layers=1 << 20, num_loops=0),
    "many_loops": dict(num_loops=1 << 30),
    "long_windows": dict(eval_seq_len=1 << 30),
    "negative": dict(num_heads=-4),
    "zero_heads": dict(num_heads=0),
    "not_a_number": dict(logit_softcap=float("nan")),
    "other_shape": dict(model_dim=128),
    "preset": dict(preset="nothing"),
    "choice": dict(skip_kind="everything"),
    "list": dict(rope_base=[1]),
}


@pytest.fixture(scope="module")
def hostile_evals(corpus, tmp_path_factory) -> dict:
    """How eval ends on artifacts whose configuration is hostile, and on a sound one."""
    cfg = tiny("record", **corpus.knobs())
    blob = tg.pack(cfg, tg.quantize(cfg, tiny_model(cfg).state_dict(), {}), True, quick=True)
    root, jobs = tmp_path_factory.mktemp("hostile"), {}
    env = clean_env(corpus.env(), {"DEVICE": "cpu", "THREADS": "1"})
    for case, change in {**HOSTILE_CONFIG, "sound": {}}.items():
        header, streams = parts_of(blob)
        header["config"] |= change
        path = root / case / "final_model.ptz"
        path.parent.mkdir()
        path.write_bytes(sealed(header, streams))
        jobs[case] = (["eval", path], env)
    return sandbox(jobs, root, seconds=8)


def test_11_the_sandbox_scores_a_sound_artifact(hostile_evals):
    """The sandbox itself leaves enough room for an honest artifact."""
    ended = hostile_evals["sound"]
    assert ended.code == 0 and "val_bpb" in ended.out, ended.err


@pytest.mark.parametrize("case", HOSTILE_CONFIG)
def test_11_hostile_configurations(hostile_evals, case):
    """Law 11: a configuration that contradicts the tensors or the knobs' ranges is one error line, in time."""
    ended = hostile_evals[case]
    assert ended.code == 2, ended.err[-600:]
    assert len(ended.err.splitlines()) == 1 and ended.err.startswith("error:")


def zeros(kind: str, megabytes: int) -> bytes:
    """That many megabytes of zeros, compressed."""
    block = bytes(1 << 20)
    if kind == "lzma":
        coder = lzma.LZMACompressor(preset=0)
        return b"".join([*(coder.compress(block) for _ in range(megabytes)), coder.flush()])
    if kind == "zstd":
        import zstandard

        coder = zstandard.ZstdCompressor(level=3).compressobj()
        return b"".join([*(coder.compress(block) for _ in range(megabytes)), coder.flush()])
    if kind == "ans":  # every symbol is a zero of probability 1; how many there are is for the header to say
        return tg.ans_encode(bytes(megabytes << 10), np.zeros(megabytes << 10, np.uint8))
    import brotli

    coder = brotli.Compressor(quality=5, lgwin=24)
    return b"".join([*(coder.process(block) for _ in range(megabytes)), coder.finish()])


@pytest.mark.parametrize("kind", list(tg.COMPRESSORS))
def test_11_decompression_bombs(kind, tmp_path):
    """Law 11: a stream that unfolds to far more than the 64 KB that are declared is refused within 48 MB of memory."""
    if kind not in available_compressors():
        pytest.skip(f"{kind} is not installed")
    header = dict(config={}, looping=False, compressor=kind, tensors=[["x", [1 << 15], "half"]],
                  counts=[1 << 15, 1 << 15, *[0] * 7], streams=[0])  # fmt: skip
    bomb = zeros(kind, 128)
    header["streams"] = [len(bomb)]
    (tmp_path / "bomb").write_bytes(sealed(header, bomb))
    code = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt as tg, pathlib\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try:\n tg.unpack(pathlib.Path('bomb').read_bytes())\n"
        "except tg.UserError:\n print((peak() - before) // 1024)\n"
    )
    ended = finish(start([sys.executable, "-c", code], clean_env(), cwd=tmp_path))
    assert ended.code == 0, ended.err
    assert int(ended.out) < 48


def test_11_few_bytes_declare_no_gigabytes(artifact):
    """Law 11: what a file of this size cannot hold is refused, although a code of zero bits a symbol could say it."""
    header, streams = parts_of(artifact[1])
    header["tensors"].append(["x", [1 << 13, 1 << 13], "int"])
    refuse(sealed(header, streams))


def some_place(rng: random.Random, value) -> tuple:
    """(container, key) of something in a header, at any depth."""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if not (isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8):
            return value, key
        value = value[key]


def test_11_fuzz(artifact):
    """Law 11: seconds (FUZZ_SECONDS of them) of random damage under a good checksum, in the streams and at any depth of
    the header: one clear error or none, each within seconds, and no memory to speak of."""
    header, streams = parts_of(artifact[1])
    rng, until, tried, slowest = random.Random(2), time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 3)), 0, 0.0
    odd = (None, -1, 0, 1, 255, 1 << 16, 1 << 31, 1 << 62, 0.5, float("nan"), True, "", "x", "int", [], {}, [[]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while (begin := time.monotonic()) < until:
        body, text = bytearray(streams), json.loads(json.dumps(header))
        for _ in range(rng.randrange(5)):
            at, count = rng.randrange(len(body)), rng.randrange(1, 9)
            body[at : at + count] = rng.choice((b"", rng.randbytes(count), b"\xff" * count, b"\0" * count))
        for _ in range(rng.choice((0, 1, 1, 3))):
            (place, key), (other, name) = some_place(rng, text), some_place(rng, text)
            place[key] = json.loads(json.dumps(rng.choice((rng.choice(odd), other[name]))))
        with contextlib.suppress(tg.UserError):
            tg.unpack(sealed(text, bytes(body))).state()
        tried, slowest = tried + 1, max(slowest, time.monotonic() - begin)
    assert tried > 10 and slowest < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


def test_11_memory_stays_bounded(artifact):
    """Law 11: refusing a header that declares gigabytes allocates next to nothing."""
    header, streams = parts_of(artifact[1])
    header["tensors"][0][1] = [1 << 20, 1 << 12]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(sealed(header, streams))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("case", ["absent", "folder", "text"])
def test_11_eval_of_what_is_no_artifact(case, tmp_path):
    """eval of a missing file, a folder or something else is one clear error."""
    path = tmp_path / "file" if case != "folder" else tmp_path
    if case == "text":
        path.write_text("not an artifact")
    with pytest.raises(tg.UserError, match=str(path.name)):
        tg.eval_command(path, {}, tg.Launch(0, 1, 0))


# ---- 12: composable -------------------------------------------------------------------------------------------------


def factors() -> dict[str, list]:
    """Every switch and every named choice of model, training, quantization and evaluation, and a few numbers."""
    found: dict[str, list] = {}
    for name, field in tg.knobs().items():
        if field.metadata["group"] not in ("model", "train", "quant", "eval") or name == "SAVE_SCORES":
            continue
        if isinstance(field.default, bool):
            found[field.name] = [False, True]
        elif field.metadata["choices"]:
            found[field.name] = list(field.metadata["choices"])
    found["compressor"] = available_compressors()
    numbers = dict(num_loops=[0, 1, 3], parallel_residual_start=[-1, 0, 3], xsa_last_n=[0, 3], rope_dims=[0, 8],
                   mlp_slope=[0.0, 0.5], num_kv_heads=[1, 4], matrix_bits=[4, 6, 8], ema_decay=[0.0, 0.99],
                   deq_layer=[-1, 0, 3], seed_maps=["none", "all", "q,up"],
                   mod_layers=["", "2,4-5@0.5"], ttt_linear_layers=["", "0,3"], linear_layers=["", "0,-1"],
                   recur_layers=["", "4,1"], num_passes=[1, 2], parallel_start_layer=[0, 2], k_rank=[0, 4],
                   bigram_vocab_size=[0, 97])  # fmt: skip
    return found | numbers


def all_pairs(options: dict[str, list]) -> list[dict]:
    """A small set of rows in which any two values of any two knobs meet (greedy, always the same)."""
    names, rng, rows = list(options), random.Random(0), []
    left = {(a, i, b, j) for x, a in enumerate(names) for b in names[x + 1 :]
            for i in range(len(options[a])) for j in range(len(options[b]))}  # fmt: skip
    while left:
        best: tuple[int, dict] = (-1, {})
        a, i, b, j = min(left)
        for _ in range(60):
            row = {name: rng.randrange(len(options[name])) for name in names} | {a: i, b: j}
            gain = sum((p, row[p], q, row[q]) in left for x, p in enumerate(names) for q in names[x + 1 :])
            best = max(best, (gain, row), key=lambda pair: pair[0])
        row = best[1]
        left -= {(p, row[p], q, row[q]) for x, p in enumerate(names) for q in names[x + 1 :]}
        rows.append({name: options[name][index] for name, index in row.items()})
    return rows


ROWS = all_pairs(factors())


def test_12_the_matrix_is_complete():
    """Any two values of any two mechanism knobs meet in some row below."""
    options = factors()
    for a in options:
        for b in options:
            met = {(row[a], row[b]) for row in ROWS}
            assert a == b or met == {(x, y) for x in options[a] for y in options[b]}


def dense(stored: dict) -> dict:
    return tg.Artifact({}, False, stored).state()


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_12_mechanisms_compose(index, corpus):
    """Law 12: two steps, Hessians, packing, unpacking and every evaluation row, for all pairs of knobs."""
    if ROWS[index]["weights"] == "ema" and not ROWS[index]["ema_decay"]:
        with pytest.raises(tg.UserError, match="WEIGHTS=ema"):
            tiny("record", **ROWS[index], **corpus.knobs())
        return
    cfg = tiny("record", **ROWS[index], **corpus.knobs())
    trainer = trainer_of(cfg)
    losses = run_steps(trainer, 2, 2)
    assert all(map(math.isfinite, losses)) and losses[1] != losses[0]
    state, rows = trainer.model.state_dict(), tg.calibration_rows(trainer)
    hessians = tg.collect_hessians(trainer.run, trainer.model, rows, cfg.loops) if cfg.gptq else {}
    stored = tg.quantize(cfg, state, hessians)
    artifact = tg.unpack(tg.pack(cfg, stored, cfg.loops, quick=True))
    assert same(artifact.state(), dense(stored)) and list(artifact.state()) == list(state)
    assert tg.read_config({}, base=artifact.config)[0].model_dim == cfg.model_dim
    val, found = random_validation(cfg, 130), []
    for weights in (dense(stored), artifact.state()):
        model = tg.build_model(cfg, trainer.run)
        model.load_state_dict(weights)
        found.append([row(trainer.run, model, val, cfg.loops, 600.0)[0].nll for row in score_rows(cfg).values()])
    assert same(*found) and all(torch.isfinite(nll).all() for nll in found[0])

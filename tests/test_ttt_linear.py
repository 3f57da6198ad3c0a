"""TTT-Linear inside the model: the chunked dual form against single tokens, the bound of the inner step, documents."""

import itertools

import pytest
import torch
from conftest import random_ids, run_steps, single, tg, tiny, tiny_model, trainer_of


def inputs(batch: int = 2, time: int = 29, heads: int = 4, groups: int = 2, size: int = 8, like: float = 0.0):
    """q, k of unit length, v, rates, and documents; ``like`` is what all keys have in common."""
    noise = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, time, n, size, generator=noise) for n in (heads, groups, groups))
    q, k = (torch.nn.functional.normalize(x + like, dim=-1) for x in (q, k))
    rate = torch.rand(batch, time, groups, generator=noise)
    docs = (torch.rand(batch, time, generator=noise) < 0.15).cumsum(1)
    return [x.double() for x in (q, k, v, rate)], docs


def one_by_one(q, k, v, rate, docs, chunk: int) -> torch.Tensor:
    """What the dual form stands for, a token and a head at a time: every W_i is formed."""
    out, per_group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for b, h, t in itertools.product(range(len(q)), range(q.shape[2]), range(q.shape[1])):
        if t == 0 or docs[b, t] != docs[b, t - 1]:
            W, now, begin = None, torch.zeros(v.shape[-1], k.shape[-1], dtype=q.dtype), t
        if W is None or t % chunk == 0:
            W, begin = now, t
        keys, values, rates = (x[b, begin : t + 1, h // per_group] for x in (k, v, rate))
        bound = ((keys @ keys.T).abs() @ rates).max().clamp_min(1.0)
        gradient = sum(r * torch.outer(W @ x - y, x) for x, y, r in zip(keys, values, rates, strict=True))
        now = W - gradient / bound
        out[b, t, h] = now @ q[b, t, h]
    return out


@pytest.mark.parametrize("chunk", [1, 4, 8, 29, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_the_dual_form_is_the_recurrence(chunk, packed):
    """Chunked products equal one state a token, within documents too, for lengths that are no multiple of a chunk."""
    tensors, docs = inputs()
    dual = tg.ttt_linear(*(x.float() for x in tensors), docs if packed else None, chunk)
    expected = one_by_one(*tensors, docs if packed else torch.zeros_like(docs), chunk)
    torch.testing.assert_close(dual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("like", [0.0, 1.0, 100.0])
def test_the_inner_step_is_stable(like):
    """Step times the largest eigenvalue of the curvature is at most 1 in every prefix, for keys however alike."""
    (_, k, _, rate), docs = inputs(time=16, like=like)
    k, rate = k.movedim(1, 2), rate.movedim(1, 2)[..., None]
    same = torch.ones(16, 16, dtype=torch.bool)
    step = tg.inner_steps(k @ k.mT, rate, same)
    for i in range(16):
        curvature = k[..., : i + 1, :].mT @ (rate[..., : i + 1, :] * k[..., : i + 1, :])
        largest = torch.linalg.eigvalsh(curvature)[..., -1]
        assert (step[..., i, 0] * largest <= 1 + 1e-9).all()
    assert (step > 0).all() and (step <= 1).all()


def test_a_long_sequence_does_not_blow_up():
    """4,096 tokens of nearly equal keys, whose step of 0.135 |k|^2 of PR #2114 would diverge: outputs stay values."""
    (q, k, v, rate), _ = inputs(batch=1, time=4096, like=2.0)
    z = tg.ttt_linear(q.float(), k.float(), v.float(), rate.float(), None, 16)
    assert z.abs().max() < 4 * v.abs().max()


def test_it_learns_what_it_is_shown():
    """A linear relation between keys and values is found in context: the error falls by a factor of ten."""
    (_, k, _, rate), _ = inputs(batch=1, time=512, heads=1, groups=1)
    truth = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = k @ truth.T
    error = (tg.ttt_linear(k, k, v, rate + 0.5, None, 8).double() - v).norm(dim=-1)[0, :, 0]
    assert error[-64:].mean() < 0.1 * error[:64].mean()


def test_the_scan_and_its_gradient():
    """affine_scan's hand-written gradient is autograd's."""
    noise = torch.Generator().manual_seed(1)
    A, B = (torch.randn(2, 5, 3, 4, 4, generator=noise, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(tg.AffineScan.apply, (A, B))


@pytest.mark.parametrize("chunk", [4, 16])
def test_documents_are_alone(chunk):
    """PACK_DOCS: a document's logits do not depend on what stands before it."""
    cfg = tiny("record", ttt_linear_layers="0,3", ttt_linear_chunk=chunk, pack_docs=True, rope_dims=0)
    model, ids = tiny_model(cfg), random_ids(cfg, 1, 24)
    other = ids.clone()
    other[:, 1:8] = 7
    with torch.no_grad():
        first, second = model.logits(ids, True), model.logits(other, True)
    assert torch.equal(first[:, 8:], second[:, 8:]) and not torch.equal(first[:, 1:8], second[:, 1:8])


@pytest.mark.parametrize("preset", ["pr2114", "record", "seed_lora", "mod", "deq"])
def test_it_trains_in_every_system(preset, corpus):
    """Two steps, finite and different, a causal model, and the same weights from the artifact."""
    layers = "0" if preset == "deq" else "1,2"
    cfg = tiny(preset, ttt_linear_layers=layers, ttt_linear_chunk=8, **corpus.knobs())
    trainer = trainer_of(cfg)
    losses = run_steps(trainer, 3, 3)
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in trainer.model.parameters())
    assert any(name.endswith("inner_gate") and p.any() for name, p in trainer.model.named_parameters())
    model, ids = tiny_model(cfg), random_ids(cfg, 2, 24)
    other = ids.clone()
    other[:, 13:] = 9
    with torch.no_grad():
        assert torch.equal(model.logits(ids, cfg.loops)[:, :13], model.logits(other, cfg.loops)[:, :13])
    stored = tg.quantize(cfg, trainer.model.state_dict(), {})
    artifact = tg.unpack(tg.pack(cfg, stored, cfg.loops))
    again, _ = tg.read_config({}, base=artifact.config)
    assert again.ttt_linear_chunk == 8
    tg.build_model(again, single(cfg)).load_state_dict(artifact.state())


def test_bf16_is_close():
    """In bf16 the state stays fp32: the output differs by the rounding of its inputs."""
    (q, k, v, rate), docs = inputs(time=64)
    exact = tg.ttt_linear(q, k, v, rate, docs, 16)
    half = tg.ttt_linear(q.bfloat16(), k.bfloat16(), v.bfloat16(), rate.float(), docs, 16)
    assert half.dtype == torch.float32 and (half - exact).norm() < 0.02 * exact.norm()

"""The arithmetic: optimizer, quantizer, fitting, averaging, rotation, attention, the schedule of layers, the data."""

import dataclasses
import hashlib
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    VOCAB,
    available_compressors,
    both_loop_states,
    every_preset,
    random_ids,
    randomise,
    replace,
    round_to_nearest,
    single,
    tg,
    tiny,
    tiny_model,
    write_shard,
)


def call(function, *arguments):
    """A part of the model, with the plain kernels where it takes kernels."""
    more = {"ops": tg.PLAIN} if "ops" in inspect.signature(function).parameters else {}
    return function(*arguments, **more)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Muon -----------------------------------------------------------------------------------------------------------


def with_spectrum(rows: int, columns: int, smallest: float) -> torch.Tensor:
    """A matrix with singular values spread evenly (in logarithm) from 1 down to ``smallest``."""
    rank = min(rows, columns)
    u, v = torch.linalg.qr(noise(rows, rank))[0], torch.linalg.qr(noise(columns, rank, seed=1))[0]
    return (u * torch.logspace(0, math.log10(smallest), rank)) @ v.T


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
@pytest.mark.parametrize(("kind", "low", "high"), [("quintic", 0.6, 1.3), ("polar", 0.85, 1.15)])
def test_newton_schulz_flattens_the_spectrum(kind, low, high, shape):
    """After five iterations singular values over a range of 30 lie in a band around 1, each on its own side."""
    g = torch.stack([with_spectrum(*shape, 1 / 30), noise(*shape)[:, : shape[1]]])
    x = tg.newton_schulz(g[:1], 5, tg.MUON_COEFFICIENTS[kind], torch.float32)
    values = torch.linalg.svdvals(x[0])
    assert low < values.min() and values.max() < high
    u, _, vt = torch.linalg.svd(g[0], full_matrices=False)
    assert F.cosine_similarity(x[0].flatten(), (u @ vt).flatten(), dim=0) > 0.98
    both = tg.newton_schulz(g, 5, tg.MUON_COEFFICIENTS[kind], torch.float32)
    torch.testing.assert_close(both[0], x[0], rtol=1e-4, atol=1e-5)


def test_newton_schulz_of_nothing_is_nothing():
    """A zero gradient gives a zero update, not 0/0."""
    assert not tg.newton_schulz(torch.zeros(1, 8, 16), 5, tg.MUON_COEFFICIENTS["quintic"], torch.float32).any()


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_muon_agrees_with_torch(shape):
    """Three steps move a matrix in the direction of torch.optim.Muon's (which works in bf16)."""
    start = noise(*shape)
    param = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon([param], lr=0.1, weight_decay=0.0, momentum=0.9)
    momentum, total = torch.zeros(1, *shape), torch.zeros(shape)
    for step in range(3):
        param.grad = noise(*shape, seed=10 + step)
        theirs.step()
        total -= tg.muon_update(
            noise(1, *shape, seed=10 + step), momentum, 0.9, False,
            lambda g: tg.newton_schulz(g, 5, tg.MUON_COEFFICIENTS["quintic"], torch.float32),
        )[0]  # fmt: skip
    assert F.cosine_similarity((param.detach() - start).flatten(), total.flatten(), dim=0) > 0.99


def test_muon_update_by_hand():
    """Nesterov momentum, in place; factor sqrt(rows / columns) for tall matrices; rows of any length count alike."""
    g, m = noise(2, 12, 3), noise(2, 12, 3, seed=1)
    wanted_m = 0.9 * m + g
    update = tg.muon_update(g, m, 0.9, False, lambda x: x)
    torch.testing.assert_close(m, wanted_m)
    torch.testing.assert_close(update, 2 * (g + 0.9 * wanted_m))
    scaled = g * torch.logspace(-3, 3, 12)[:, None]
    a, b = (tg.muon_update(x, torch.zeros_like(g), 0.9, True, lambda x: x) for x in (g, scaled))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a.norm(dim=-1), torch.full((2, 12), 2.0))


def test_gradient_clipping_is_global(corpus):
    """The returned norm is that of all gradients; clipping leaves AdamW's direction and Muon's alone."""
    run = single(tiny("record", grad_clip_norm=0.1, **corpus.knobs()))
    model = tg.build_model(run.cfg, run)
    optimizers = tg.Optimizers(model, run)
    for index, param in enumerate(model.parameters()):
        param.grad = noise(*param.shape, seed=index)
    wanted = math.sqrt(sum(float(param.grad.square().sum()) for param in model.parameters()))
    assert float(optimizers.step(1.0, 0.9)) == pytest.approx(wanted, rel=1e-5)
    assert all(param.grad is None for param in model.parameters())
    first = sum(float(state["exp_avg"].square().sum()) for state in optimizers.adam.state.values())
    moved = sum(float(bank.momentum.square().sum()) for bank in optimizers.banks)
    assert math.sqrt(first / 0.1**2 + moved) == pytest.approx(0.1, rel=1e-3)


def test_learning_rate_zero_moves_nothing(corpus):
    """All updates, weight decay included, scale with the learning rate."""
    run = single(tiny("record", **corpus.knobs()))
    model = tg.build_model(run.cfg, run)
    before = [param.detach().clone() for param in model.parameters()]
    optimizers = tg.Optimizers(model, run)
    for scale in (0.0, 1.0):
        for index, param in enumerate(model.parameters()):
            param.grad = noise(*param.shape, seed=index)
        optimizers.step(scale, 0.9)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(moved) if scale else not any(moved)


# ---- average --------------------------------------------------------------------------------------------------------


def averaged(cfg: tg.Config, steps: int) -> list[float]:
    """The average of one weight that is ``step`` after each step, having started at 1000."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1000.0)
    ema, out = tg.Ema(model, cfg), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(step)
        out.append(float(ema.averages[0]["weight"]) if ema.averages else None)
    return out


def test_ema_forgets_the_random_start():
    """After the first step nothing of the initial weights is left."""
    values = averaged(tiny("record", ema_decay=0.9965, ema_window_fracs="0.06"), 100)
    assert values[0] == 1.0 and max(values) < 100


def test_ema_window_grows_then_stays():
    """The memory is EMA_WINDOW_FRAC of the steps so far, at most 1 / (1 - EMA_DECAY)."""
    values = averaged(tiny("record", ema_decay=0.98, ema_window_fracs="0.1"), 2000)
    average = 1000.0
    for step, value in enumerate(values, 1):
        average += (step - average) / max(1.0, min(50.0, 0.1 * step))
        assert value == pytest.approx(average, rel=1e-4)
    assert 2000 - values[-1] == pytest.approx(49, abs=1)
    assert 200 - values[199] == pytest.approx(200 * 0.1 / 1.1, rel=0.1)


def test_ema_off():
    """EMA_DECAY=0 keeps no average."""
    assert averaged(tiny("record", ema_decay=0.0), 3) == [None] * 3


def test_swapped_gives_back():
    """Other weights inside the block, its own after it, even when the block fails."""
    model = tiny_model(tiny("record"))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in own.items()}
    with pytest.raises(ZeroDivisionError), tg.swapped(model, other):
        assert all(torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())
        _ = 1 / 0
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


# ---- quantization ---------------------------------------------------------------------------------------------------


def correlated(columns: int, samples: int = 2000) -> torch.Tensor:
    """H = X^T X / n of inputs that share a few strong directions."""
    x = noise(samples, columns) * 0.3 + noise(samples, 4, seed=1) @ noise(4, columns, seed=2)
    return x.T @ x / samples


def steps_of(W: torch.Tensor, over: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of a stack: a share of each row's standard deviation, and columns alike."""
    return over * W.std(-1), torch.ones_like(W[:, 0])


def gptq(W, H, row, col, **options) -> torch.Tensor:
    return tg.gptq(W, tg.factor(H, 0.01), row, col, **options)


def loss(W, q, row, col, H) -> float:
    """tr(E H E^T) of a stack."""
    error = W - q.float() * row[..., None] * col[:, None, :]
    return float(torch.einsum("nrc,ncd,nrd->", error, H.to(error.dtype), error))


@pytest.mark.parametrize("over", [1.0, 0.4, 0.1])
def test_gptq_beats_rounding(over):
    """On correlated inputs the H-weighted error is well below round-to-nearest's, for every matrix of the stack."""
    W, H = noise(3, 24, 64), torch.stack([correlated(64), 5 * correlated(64), correlated(64).roll((3, 3), (0, 1))])
    row, col = steps_of(W, over)
    q, nearest = gptq(W, H, row, col), round_to_nearest(W, row, col)
    for i in range(3):
        one = slice(i, i + 1)
        ours, plain = (loss(W[one], x[one], row[one], col[one], H[one]) for x in (q, nearest))
        assert ours < 0.6 * plain
    assert q.dtype == torch.int16


def test_gptq_with_independent_inputs_rounds():
    """With H = identity there is nothing to feed back: round to nearest."""
    W = noise(2, 16, 40)
    row, col = steps_of(W, 0.3)
    q = gptq(W, torch.eye(40).expand(2, 40, 40), row, col)
    assert torch.equal(q, round_to_nearest(W, row, col))


def test_gptq_blocks_do_not_matter():
    """Lazy updates by blocks give the result of one block."""
    W, H = noise(1, 16, 96).double(), correlated(96)[None].double()
    row, col = steps_of(W, 0.2)
    whole = gptq(W, H, row, col, blocksize=96)
    for size in (1, 7, 32):
        assert (gptq(W, H, row, col, blocksize=size) != whole).double().mean() < 1e-3


def test_gptq_orders_by_activation():
    """Act-order: permuting the columns permutes the result and changes nothing else."""
    W, H = noise(1, 16, 48).double(), (correlated(48) * torch.outer(*[torch.linspace(0.5, 2, 48)] * 2))[None].double()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    row, col = steps_of(W, 0.4)
    col = torch.linspace(0.5, 2, 48).double()[None]
    straight = gptq(W, H, row, col)
    mixed = gptq(W[:, :, order], H[:, order][:, :, order], row, col[:, order])
    assert (mixed != straight[:, :, order]).double().mean() < 1e-3


def test_the_spread_is_the_error_that_feedback_leaves():
    """GPTQ's final loss is the sum of its rounding errors over the spread, squared: the basis of the column steps."""
    W, H = noise(2, 64, 32).double(), torch.stack([correlated(32), correlated(32, 500)]).double()
    known = tg.factor(H, 1e-9)
    row, col = steps_of(W, 0.05)
    col = known.spread()
    final = loss(W, tg.gptq(W, known, row, col), row, col, H)
    assert final == pytest.approx(float((row.square() / 12).sum() * 32), rel=0.1)


def test_columns_by_their_spread_are_better_than_alike():
    """At one rate (the same mean log step), steps in proportion to the spread lose less than equal ones."""
    W, H = noise(1, 64, 48), (correlated(48) * torch.outer(*[torch.logspace(-1, 1, 48)] * 2))[None]
    known = tg.factor(H, 0.01)
    log2 = known.spread().log2()
    row, alike = steps_of(W, 0.1)
    filled = 2 ** (log2 - log2.mean())
    losses = [loss(W, tg.gptq(W, known, row, col), row, col, H) for col in (filled, alike)]
    assert losses[0] < 0.5 * losses[1]


@pytest.mark.parametrize("states", [1, 8])
def test_dead_columns_are_stored_as_zeros(states):
    """Inputs that never fire are stored as zeros (or what a trellis has next to it) and disturb no other column."""
    cfg = tiny("record", trellis_states=states)
    state, H = {"blocks.0.mlp.up.weight": noise(16, 32)}, correlated(32).clone()
    dead = torch.tensor([0, 5, 31])
    H[dead], H[:, dead] = 0, 0
    live = torch.tensor([i for i in range(32) if i not in dead])
    (stored,) = tg.quantize(cfg, state, {"blocks.0.mlp.up.weight": H}).values()
    assert (stored.values()[:, dead].abs() <= (states > 1)).all() and stored.q[:, live].any()
    error = (state["blocks.0.mlp.up.weight"] - stored.dense())[:, live]
    assert float(error.square().mean()) < 0.05


def test_gptq_singular_hessian():
    """A Hessian of rank one is damped until it can be inverted; one that is no number is a clear error."""
    x = noise(1, 24)
    W, H = noise(1, 8, 24), (x.T @ x)[None]
    row, col = steps_of(W, 0.2)
    assert loss(W, gptq(W, H, row, col), row, col, H) < loss(W, round_to_nearest(W, row, col), row, col, H)
    with pytest.raises(tg.UserError, match="Hessian"):
        tg.cholesky_of_inverse(-torch.eye(4)[None], 0.01)


def test_gptq_does_not_change_its_input():
    """Weights and Hessians can be used again."""
    W, H = noise(1, 8, 16), correlated(16)[None]
    copies = W.clone(), H.clone()
    gptq(W, H, *steps_of(W, 0.2))
    assert torch.equal(W, copies[0]) and torch.equal(H, copies[1])


def test_sdclip_steps():
    """Step = sigmas x standard deviation / top, with a floor for constant rows; one mean log step in every mode."""
    cfg = tiny("record")
    W = noise(1, 3, 4000)
    W[0, 1] *= 7
    W[0, 2] = 5.0
    row, col = tg.sdclip_steps(cfg, tg.Stack([], tg.TENSOR_PLAN[1], W, None, None))
    torch.testing.assert_close(2 ** row[0, :2], 12.85 * W[0, :2].std(-1) / 31, rtol=1e-3, atol=0)
    assert row[0, 2] == -14 and not col.any()
    state = {f"blocks.{i}.mlp.up.weight": (1 + i) * noise(16, 32, seed=i) for i in range(3)}
    hessians = {name: correlated(32) * (i + 1) for i, name in enumerate(state)}
    fisher = {name: noise(16, seed=i).square() for i, name in enumerate(state)}
    means = []
    for kind in tg.STEPS:
        quantizer = tg.Quantizer(replace(cfg, quant_steps=kind), state, hessians, fisher)
        found = [(row, col) for _, row, col in quantizer.exponents(1.0)]
        means.append(sum(float(row.float().mean() + col.float().mean()) for row, col in found) / tg.GRID)
    assert max(means) - min(means) < 0.05


def test_water_filling_equalises_the_marginal_loss():
    """gain step^2 / spread^2, the loss that one more bit saves, is the same for all rows, columns and matrices."""
    state = {f"blocks.{i}.mlp.up.weight": (1 + i) * noise(64, 32, seed=i) for i in range(3)}
    hessians = {name: correlated(32) * (i + 1) for i, name in enumerate(state)}
    fisher = {name: 1 + noise(64, seed=i).square() for i, name in enumerate(state)}
    quantizer = tg.Quantizer(tiny("record"), state, hessians, fisher)
    ((stack, row, col),) = quantizer.exponents(1.0)
    step = tg.powers(row)[:, :, None] * tg.powers(col)[:, None]
    marginal = stack.gain[:, :, None] * (step / stack.known.spread()[:, None]) ** 2
    assert float(marginal.log2().std()) < 2.5 / tg.GRID


def test_nothing_is_clipped():
    """Wherever the steps come out, no integer leaves its range: the error stays half a step, a step in a trellis."""
    state = {"blocks.0.mlp.up.weight": noise(8, 500)}
    state["blocks.0.mlp.up.weight"][3, 7] = 1e4
    for coarse in (1e-3, 1.0):
        (value,) = tg.quantize(tiny("record"), state, {}, coarse).values()
        error = (state["blocks.0.mlp.up.weight"] - value.dense()).abs()
        assert int(value.q.abs().max()) <= tg.TOP
        assert (error <= 1.001 * tg.powers(value.row)[:, None] * tg.powers(value.col)).all()
    (value,) = tg.quantize(tiny("record"), {"blocks.0.mlp.up.weight": torch.zeros(3, 8)}, {}).values()
    assert not value.dense().any()


def test_fisher_is_the_mean_of_squared_gradients(corpus, monkeypatch):
    """Random signs give, in the mean, the sum over tokens of their own squared gradients; of the outputs, whitened by
    their inputs, the sum of their outer products."""
    monkeypatch.setattr(tg, "FISHER_PASS", 16)
    shape = dict(num_layers=2, loop_start=0, loop_end=0, xsa_last_n=1, tie_embeddings=True)
    cfg = tiny("record", gptq_rows=8, **shape, **corpus.knobs())
    run, model = single(cfg), tiny_model(cfg)
    rows = random_ids(cfg, 2, 9)
    hessians = tg.collect_hessians(run, model, rows, True)
    inverse = {n: torch.linalg.inv(next(tg.dampings(H[None], cfg.percdamp)))[0] for n, H in hessians.items()}
    exact = {name: torch.zeros(len(p)) for name, p in model.named_parameters() if p.dim() == 2}
    outer, rowwise = dict.fromkeys(exact, 0.0), {name: [] for name in ("embed", "values.table")}
    for nll in model(*tg.shifted(rows), True).flatten():
        grads = torch.autograd.grad(nll, [dict(model.named_parameters())[name] for name in exact], retain_graph=True)
        for name, grad in zip(exact, grads, strict=True):
            exact[name] += grad.square().sum(-1) / 16
            outer[name] += grad @ inverse[name] @ grad.T if name in inverse else 0
            if name in rowwise:
                rowwise[name].append(grad)
    second = {}
    for name, grads in rowwise.items():  # each row's over its Fisher sum
        sums = exact[name] + 0.01 * exact[name].mean()
        second[name] = sum(grad.T @ (grad / sums[:, None]) for grad in grads)
    many, outputs, tables = tg.collect_fisher(run, model, rows.repeat(256, 1), True, hessians)
    assert set(tables) == {"embed", "values.table"}
    for name, found in tables.items():
        even = second[name] / second[name].diagonal().mean()
        assert (found - even).norm() < 0.3 * even.norm(), name
    for name in many:
        assert float(many[name].sum() / exact[name].sum()) == pytest.approx(1, rel=0.5), name
    assert {"blocks.0.attn.q.weight", "blocks.1.mlp.up.weight"} <= set(outputs) and "embed" not in outputs
    for name, found in outputs.items():
        scale = outer[name].diagonal().clamp_min(1e-30).rsqrt()
        wanted = tg.TRUST * outer[name] * scale * scale[:, None]
        off = ~torch.eye(len(wanted), dtype=bool)
        assert 0.7 < (found * wanted)[off].sum() / wanted[off].square().sum() < 1.1, name
        assert (found - wanted)[off].norm() < 0.5 * wanted[off].norm(), name
        torch.testing.assert_close(found.diagonal(), torch.ones(len(found)))
    assert all(param.grad is None for param in model.parameters())


def by_spans(q, k, v, spans, longest):
    """What a kernel for spans computes: causal attention inside each, nothing elsewhere."""
    out = torch.full_like(q, math.nan)
    for begin, end in itertools.pairwise(spans.tolist()):
        assert 0 <= end - begin <= longest
        if end > begin:
            part = slice(begin, end)
            out[part] = tg.sdpa(q[None, part], k[None, part], v[None, part], None)[0]
    return out


def test_spans_are_the_documents(monkeypatch):
    """Training's attention over spans is that of the mask, gradients too; scores take the mask; more documents than
    a sequence has room for become one, and no token is left out."""
    monkeypatch.setitem(tg.SPAN_ATTENTION, "math", by_spans)
    B, T = 3, 512
    q, k, v = (noise(B, T, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 1))
    v = v.expand(B, T, 2, 8)
    few, many = ((torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < p).cumsum(1) for p in (0.006, 0.2))
    found, wanted = tg.attend(q, k, v, few, "math"), tg.sdpa(q, k, v, few)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k)) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(tg.attend(q, k, v, many, "math"), tg.sdpa(q, k, v, many))
    assert not tg.attend(q, k, v, many, "math").isnan().any()
    for docs in (few, many):
        spans, room = tg.document_spans(docs), 8
        assert len(spans) == B * room + 1 and spans[-1] == B * T
        for row, told in enumerate(spans[:-1].view(B, room).tolist()):
            starts = [row * T + i for i in range(T) if i == 0 or docs[row, i] != docs[row, i - 1]]
            assert told == (starts + room * [row * T + T])[:room]


def test_torch_has_attention_over_spans():
    """The operation that a GPU runs takes these arguments, grouped heads too, and has a gradient."""
    q, k, v = (torch.empty(2, 256, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (8, 4, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    docs = torch.zeros(2, 256, device="meta", dtype=torch.long)
    y = tg.attend(*inputs, docs, "cudnn")
    assert y.shape == q.shape and "flash" in str(y.grad_fn.next_functions[0][0]).lower()
    assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [x.shape for x in inputs]


def test_a_kernel_that_fails_is_not_taken(monkeypatch):
    """One that agrees with the mask is; one that raises, or does something else, is named and told."""

    def raises(*_):
        raise RuntimeError("no such kernel\nand more")

    kernels = {
        "math": by_spans,
        "cudnn": raises,
        "flash": lambda q, k, v, spans, longest: 1.1 * by_spans(q, k, v, spans, longest),
    }
    monkeypatch.setattr(tg, "SPAN_ATTENTION", kernels)
    tg.span_trouble.cache_clear()
    found = {name: tg.span_trouble(name, 16, torch.device("cpu")) for name in (*kernels, "efficient")}
    tg.span_trouble.cache_clear()
    assert found["math"] == found["efficient"] == "" and found["cudnn"] == "RuntimeError: no such kernel"
    assert found["flash"].startswith("it is off by")


def test_rare_tokens_are_worth_what_tokens_are_worth():
    """Fisher sums of a table of tokens from little text come nearer to what much text would say, by the frequencies of
    all of it and by what occurrences are worth, and stay with it; other tables keep theirs."""
    cfg, draw = tiny("record", vocab_size=512), torch.Generator().manual_seed(1)
    often = 1 / torch.arange(1.0, 513)
    worth = (0.5 * noise(512)).exp()
    truth = often / often.sum() * worth
    rows = torch.multinomial(often, 256_000, replacement=True, generator=draw).view(256, -1)

    def sums(read: torch.Tensor) -> torch.Tensor:
        """Each occurrence is worth what its token is, times the square of a Gaussian."""
        each = worth[read.flatten()] * torch.randn(read.numel(), generator=draw).square()
        return torch.zeros(512).index_add(0, read.flatten(), each) / read.numel()

    def miss(found: torch.Tensor) -> float:
        return float(((found + 1e-9) / truth).log().square().mean())

    little = sums(rows[:1])
    names = ("embed", "mixers.bigram.table", "blocks.0.attn.q.weight")
    found = tg.steadied(cfg, dict.fromkeys(names, little), rows, rows[:1])
    assert found["mixers.bigram.table"] is little and found["blocks.0.attn.q.weight"] is little
    alone = tg.steadied(cfg, {"embed": little}, rows[:1], rows[:1])["embed"]
    assert 1.3 * miss(found["embed"]) < miss(alone) < 0.1 * miss(little)
    much = sums(rows)
    assert miss(tg.steadied(cfg, {"embed": much}, rows, rows)["embed"]) < min(miss(much), 0.15)
    assert float(found["embed"].sum() / truth.sum()) == pytest.approx(1, rel=0.2)


def test_no_file_is_packed_that_cannot_be_read():
    """Steps so coarse that hardly a weight is left: a reader would refuse the file, so fitting does."""
    state = {f"blocks.{i}.mlp.up.weight": noise(1024, 512, seed=i) for i in range(3)}
    cfg = tiny("record", size_target=20_000, trellis_states=1)
    with pytest.raises(tg.OverBudget, match="cannot hold 1572864 weights in so few bytes, 20000"):
        tg.fit(cfg, tg.Quantizer(cfg, state, {}, {}), True, 0)
    cfg = replace(cfg, size_target=100_000)
    packed = tg.fit(cfg, tg.Quantizer(cfg, state, {}, {}), True, 0)
    assert 80_000 < len(packed.blob) <= 100_000 and len(tg.unpack(packed.blob).state()) == 3


def test_rows_are_fed_back_where_curvature_is_known():
    names = ("blocks.0.mlp.up.weight", "embed", "head.weight", "blocks.0.attn.q.lora_A", "skips.0_1.skip_gate")
    for settings, wanted in (({}, names[:1]), (dict(gptq=False), ()), (dict(quant_steps="sdclip"), ()),
                             (dict(gptq_rows=0), ())):  # fmt: skip
        assert tuple(tg.fed_back(tiny("record", **settings), names)) == wanted


@pytest.mark.parametrize("states", [1, 8])
def test_rows_absorb_errors(states):
    """Where outputs matter together, blocks of rows that make up for each other's errors lose less at the same rate,
    the more blocks the less, and as much less as their gains say; one block is the plain way."""
    n, r, c = 2, 64, 48
    W, mixing = noise(n, r, c), noise(r, r, seed=2) * torch.logspace(0, -1, r)
    known, H = tg.factor(correlated(c).expand(n, c, c), 1e-4, sort=False), correlated(c).expand(n, c, c)
    G = (mixing @ mixing.T).expand(n, r, r)
    gain = G.diagonal(dim1=-2, dim2=-1)
    correlation = G * gain.rsqrt()[:, :, None] * gain.rsqrt()[:, None, :]
    V = tg.cholesky_of_inverse(tg.curvature(gain, correlation), 1e-6)

    def lost(block: int) -> tuple[float, float]:
        own = tg.conditional_gain(V, block) if block else gain
        stack = tg.Stack([], tg.TENSOR_PLAN[1], W, known, own, V if block else None)
        row, col = tg.fisher_steps(tiny("record"), stack)
        row, col = tg.on_grid(row - row.mean() - 4), tg.on_grid(col)
        q = tg.round_stack(stack, tg.powers(row), tg.powers(col), states, block)
        E = W - torch.stack([tg.Quantized(*parts, states).dense() for parts in zip(q, row, col, strict=True)])
        return float(torch.einsum("nij,njc,ncd,nid->", G, E, H, E)), float(own.log().mean().exp())

    plain, one, four, all_ = (lost(block) for block in (0, r, 16, 1))
    assert one == pytest.approx(plain, rel=1e-3)
    assert all_[0] < four[0] < 0.75 * plain[0]
    for found, gains in (four, all_):
        assert found / plain[0] == pytest.approx(gains / plain[1], rel=0.3)


def test_shrinking_takes_what_sampling_explains():
    """Correlations of independent outputs all but vanish, those of like ones stay."""
    X = noise(32, 400)
    alike = X + 3 * noise(1, 400, seed=5)
    for data, least, most in ((X, 0.0, 0.3), (alike, 0.95, 1.0)):
        measured = torch.corrcoef(data)
        off = ~torch.eye(32, dtype=bool)
        kept = tg.shrink_(measured.clone(), 400)[off].norm() / measured[off].norm()
        assert least <= float(kept) <= most


def test_an_export_heeds_both_curvatures():
    """GPTQ_ROWS: the ledger predicts tr(G E H E^T) / 2, and feedback over rows makes it less at the same rate."""
    name, mixing = "blocks.0.mlp.up.weight", noise(48, 48, seed=2) * torch.logspace(0, -1, 48)
    G, H = mixing @ mixing.T, correlated(32)
    state, gain = {name: noise(48, 32)}, G.diagonal()
    known = ({name: H}, {name: gain * H.trace()}, {name: G * gain.rsqrt() * gain.rsqrt()[:, None]})

    def exported(rows: int) -> tuple[float, float, float]:
        quantizer = tg.Quantizer(tiny("record", gptq_rows=rows), state, *known[:2], known[2] if rows else {})
        stored = quantizer.at(0.1)
        error = state[name] - stored[name].dense()
        row = tg.ledger(quantizer, stored, quantizer.fisher)[name]
        return row["loss"], float(torch.trace(G @ error @ H @ error.T)) / 2, row["bits"]

    plain, fed = exported(0), exported(8)
    assert fed[0] == pytest.approx(fed[1], rel=1e-4)
    assert fed[1] < 0.5 * plain[1] and fed[2] == pytest.approx(plain[2], abs=0.3)


@pytest.mark.parametrize("tied", [False, True])
def test_hessians_are_the_inputs_second_moment(corpus, tied):
    """H of a map is the mean of x x^T over its inputs, every visit of a looped layer counted; the head's too."""
    cfg = tiny("record", tie_embeddings=tied, **corpus.knobs())
    run, model = single(cfg), tiny_model(cfg)
    rows = torch.cat([random_ids(cfg, 6, 32), torch.zeros(6, 1, dtype=torch.long)], 1)
    seen: dict[str, list] = {"blocks.2.mlp.up": [], "blocks.4.attn.proj": []}
    plain = {name: model.get_submodule(name) for name in seen}
    hessians = tg.collect_hessians(run, model, rows, True)
    for name, module in plain.items():
        module.tap = lambda x, name=name: seen[name].append(x.detach().flatten(0, -2).double())
    with torch.no_grad():
        hidden = model.hidden(rows[:, :-1], True)
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        wanted = x.T @ x / (6 * 32)
        torch.testing.assert_close(hessians[f"{name}.weight"].double(), wanted, rtol=1e-4, atol=1e-4)
    assert len(seen["blocks.2.mlp.up"]) == 1 + cfg.num_loops and len(seen["blocks.4.attn.proj"]) == 1
    x = tg.norm(hidden).flatten(0, 1).double()
    head = hessians["embed" if tied else "head.weight"]
    torch.testing.assert_close(head.double(), x.T @ x / (6 * 32), rtol=1e-4, atol=1e-4)
    quantized = {name for name in model.state_dict() if tg.owner(name, tg.TENSOR_PLAN).codec == "int"}
    looked_up = {"values.table"} if tied else {"values.table", "embed"}
    assert set(hessians) == quantized - looked_up


def test_planes_and_back():
    """Byte planes are inverted exactly, odd lengths and nothing included."""
    for size in (0, 1, 2, 3, 10, 257):
        data = bytes(range(256))[:size] if size < 257 else bytes(range(256)) + b"x"
        assert tg.interleaved(tg.planes(data)) == data
    assert tg.planes(b"aAbBcC") == b"abcABC"


def integers(rows: int, cols: int, size: float = 5.0) -> tg.Quantized:
    """Integers whose spread differs from row to row and from column to column."""
    spread = size * torch.logspace(-0.5, 0.5, rows)[:, None] * torch.logspace(-0.5, 0.5, cols)
    q = (noise(rows, cols) * spread).round().to(torch.int16)
    return tg.Quantized(q, torch.zeros(rows, dtype=torch.int8), torch.zeros(cols, dtype=torch.int8))


def test_code_bytes():
    """The ideal length: known cases, and the packed file is within 1 % of it (and a few bytes)."""
    flat = integers(4, 256)._replace(q=torch.full((4, 256), -31, dtype=torch.int16))
    uniform = flat._replace(q=torch.tensor([-8, 8], dtype=torch.int16).repeat(4, 128))
    assert tg.code_bytes({"a": flat})["a"] == pytest.approx(0, abs=1)
    assert tg.code_bytes({"a": uniform})["a"] == pytest.approx(4 * 256 / 8, abs=1)
    stored = {"a": integers(512, 384), "b": noise(700).half()}
    ideal = sum(tg.code_bytes(stored).values())
    packed = len(tg.pack(tiny("record", compressor="ans"), stored, True))
    assert ideal < packed < 1.01 * ideal + 5000  # header and tables


def test_contexts_pay():
    """Where spreads differ, ans is well below brotli on the same integers."""
    stored = {"a": integers(512, 384)}
    sizes = {name: len(tg.pack(tiny("record", compressor=name), stored, True)) for name in ("ans", "brotli")}
    assert sizes["ans"] < 0.985 * sizes["brotli"]


@pytest.mark.parametrize("name", available_compressors())
def test_compressors_give_back_what_they_got(name):
    """decode(encode(x)) == x, quick and slow, empty and large, few and many contexts."""
    coder, rng = tg.COMPRESSORS[name], np.random.default_rng(0)
    for data in (b"", b"x", bytes(1 << 20), rng.bytes(100_000)):
        for contexts in (np.zeros(len(data), np.uint8), rng.integers(0, 256, len(data)).astype(np.uint8)):
            for quick in (True, False):
                assert coder.decode(coder.encode(data, contexts, quick), contexts) == data


def test_ans_is_pinned():
    """The code of given symbols never changes: artifacts stay readable."""
    data = bytes(i * i % 7 for i in range(5000))
    contexts = np.array([i % 3 for i in range(5000)], np.uint8)
    digest = hashlib.sha256(tg.ans_decode(tg.ans_encode(data, contexts), contexts)).hexdigest()
    assert digest == hashlib.sha256(data).hexdigest()
    body = tg.ans_encode(data, contexts)
    assert hashlib.sha256(body[4 + int.from_bytes(body[:4], "little") :]).hexdigest()[:16] == "fb411e5b9839393b"


def test_frequencies_add_up():
    """Shares sum to 2^FREQ_BITS, nothing that occurs gets none, and unused contexts stay empty."""
    counts = np.random.default_rng(0).integers(0, 3, (5, 256)) ** 20
    counts[2], counts[3] = 0, 1
    scaled = tg.frequencies(counts)
    assert list(scaled.sum(1)) == [1 << tg.FREQ_BITS, 1 << tg.FREQ_BITS, 0, *[1 << tg.FREQ_BITS] * 2]
    assert ((scaled > 0) == (counts > 0)).all()


def fit_problem() -> tuple[tg.Config, dict]:
    cfg = tiny("record", model_dim=128, vocab_size=1024, num_layers=4, loop_start=1, loop_end=2, xsa_last_n=1)
    return cfg, randomise(tg.build_model(cfg, single(cfg))).state_dict()


def fit(cfg: tg.Config, state: dict, target: int, code: int = 0) -> tg.Export:
    cfg = replace(cfg, size_target=target)
    return tg.fit(cfg, tg.Quantizer(cfg, state, {}, {}), True, code)


@pytest.mark.parametrize("target", [250_000, 420_000])
def test_fit_lands_under_the_target(target):
    """Code plus artifact come within 10 KB under SIZE_TARGET, in few packs, and the artifact reads back."""
    cfg, state = fit_problem()
    packed = fit(cfg, state, target, 30_000)
    assert target - 10_000 <= len(packed.blob) + 30_000 <= target
    assert packed.packs <= 4
    back = tg.unpack(packed.blob).state()
    assert all(
        torch.equal(back[name], tensor) for name, tensor in tg.Artifact({}, False, packed.stored).state().items()
    )


def test_fit_uses_what_is_free_and_refuses_what_cannot_fit():
    """A loose target gives the finest steps, a tight one coarser steps, an impossible one OverBudget."""
    cfg = tiny("record", num_layers=2, loop_start=0, loop_end=0, xsa_last_n=1)
    state = tiny_model(cfg).state_dict()
    loose, tight = fit(cfg, state, 5_000_000), fit(cfg, state, 30_000)
    assert loose.coarse == 2 ** tg.COARSE_RANGE[0] < tight.coarse
    with pytest.raises(tg.OverBudget):
        fit(cfg, state, 3_000)


def test_coarser_steps_pack_smaller():
    """Size falls strictly with the steps' multiplier."""
    cfg, state = fit_problem()
    sizes = [len(tg.pack(cfg, tg.quantize(cfg, state, {}, 2.0**x), True, quick=True)) for x in (-1, 0, 1, 2)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


# ---- rotation, attention, layers ------------------------------------------------------------------------------------


def test_rotary_positions_are_distinct():
    """In fp32 all 2,048 positions have rows of their own, also in the lowest frequency alone."""
    cos, sin = tg.rotary_table(2048, 16, 10000.0, 2048, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2048, 8)
    both = torch.cat([cos, sin], 1)
    assert len(both.unique(dim=0)) == 2048
    assert len(torch.stack([cos[:, -1], sin[:, -1]], 1).unique(dim=0)) == 2048


def test_rotary_angles():
    """Angle = position x base^(-2j/dims), with the base stretched beyond the trained length (NTK)."""
    position = np.arange(64)[:, None]
    for length, trained in ((64, 64), (64, 128), (64, 16)):
        base = 10000.0 * (4 ** (16 / 14) if trained == 16 else 1)
        cos, sin = tg.rotary_table(length, 16, 10000.0, trained, torch.device("cpu"))
        angle = position * base ** (-2 * np.arange(8) / 16)
        np.testing.assert_allclose(cos.numpy(), np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin.numpy(), np.sin(angle), atol=1e-6)


def test_rotation_is_relative():
    """q . k depends on the distance alone, lengths are kept, and unrotated dimensions pass."""
    rope = tg.rotary_table(32, 8, 100.0, 32, torch.device("cpu"))
    q, k = (noise(1, 1, 1, 12, seed=seed).expand(1, 32, 1, 12) for seed in (0, 1))
    rq, rk = tg.rotate(q, rope)[0, :, 0], tg.rotate(k, rope)[0, :, 0]
    products = rq @ rk.T
    for distance in (0, 3, 10):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert (products.diagonal(-3) - products.diagonal(-10)[0]).abs().min() > 1e-3
    torch.testing.assert_close(rq.norm(dim=-1), q[0, :, 0].norm(dim=-1))
    assert torch.equal(rq[:, 8:], q[0, :, 0, 8:])


def naive_attention(q, k, v, docs):
    """Causal grouped-query attention in fp64, one head and one position at a time."""
    q, k, v = (x.double() for x in (q, k, v))
    out, share = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = [s for s in range(t + 1) if docs is None or docs[b, s] == docs[b, t]]
            for h in range(q.shape[2]):
                keys, values = k[b, seen, h // share], v[b, seen, h // share]
                out[b, t, h] = (keys @ q[b, t, h] / q.shape[3] ** 0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_definition(groups, documents):
    """attend() against a naive fp64 reference, with and without document boundaries."""
    q, k, v = noise(2, 13, 4, 8), noise(2, 13, groups, 8, seed=1), noise(2, 13, groups, 8, seed=2)
    docs = (noise(2, 13, seed=3) > 0.8).cumsum(1) if documents else None
    backend = tg.select_attention(tiny("record"), torch.device("cpu"))
    got = tg.attend(q, k, v, docs, backend)
    torch.testing.assert_close(got.double(), naive_attention(q, k, v, docs), rtol=1e-5, atol=1e-5)


def test_packed_documents_are_separate():
    """With PACK_DOCS a document's logits do not depend on the documents before it in its sequence."""
    cfg = tiny("record", pack_docs=True, rope_dims=0, smear_gate=True)
    model = tiny_model(cfg)
    ids = random_ids(cfg, 1, 24)
    other = ids.clone()
    other[:, :8] = random_ids(cfg, 1, 24, seed=5)[:, :8]
    assert ids[0, 8] == other[0, 8] == tg.BOS
    with torch.no_grad():
        a, b = model.logits(ids, True), model.logits(other, True)
    assert torch.equal(a[:, 8:], b[:, 8:]) and not torch.equal(a[:, :8], b[:, :8])


def test_exclude_self_is_orthogonal():
    """XSA leaves nothing along the position's own value, and leaves the rest alone."""
    y, v = noise(2, 5, 4, 8), noise(2, 5, 2, 8, seed=1)
    out = tg.ExcludeSelf(tiny("record"), "xsa")(y, tg.Heads(y, v, v, y, None), tg.PLAIN)
    own = v.repeat_interleave(2, dim=2)
    torch.testing.assert_close((out * own).sum(-1), torch.zeros(2, 5, 4), rtol=0, atol=1e-5)
    removed = y - out
    cosine = F.cosine_similarity(removed, own, dim=-1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-4)


def test_norm_and_softcap():
    """norm gives unit mean square; the cap is C tanh(z / C)."""
    x = 100 * noise(3, 64)
    torch.testing.assert_close(tg.norm(x).square().mean(-1), torch.ones(3))
    weight = noise(10, 64)
    z = (tg.norm(x) @ weight.T).double()
    wanted = 5 * torch.tanh(z / 5)
    torch.testing.assert_close(tg.head_logits(x, weight, 5.0).double(), wanted, rtol=1e-4, atol=1e-5)
    targets = torch.tensor([1, 9, 0])
    nll = -wanted.log_softmax(-1)[torch.arange(3), targets]
    torch.testing.assert_close(call(tg.head_nll, x, weight, targets, 5.0).double(), nll, rtol=1e-5, atol=1e-5)


def test_mlp_activation():
    """down(leaky_relu(up x)^2), the slope on negative inputs."""
    cfg = tiny("record", mlp_slope=0.25)
    mlp = tg.MLP(cfg, "mlp")
    with torch.no_grad():
        mlp.down.weight.copy_(noise(*mlp.down.weight.shape))
    x = noise(3, 64)
    h = x @ mlp.up.weight.T * 0.5
    wanted = torch.where(h > 0, h, 0.25 * h).square() @ mlp.down.weight.T * 3.0
    got = call(mlp.forward, x, torch.tensor(0.5), torch.full((64,), 3.0))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ---- the schedule and the census ------------------------------------------------------------------------------------


def full(preset: str) -> tg.Config:
    return tg.read_config({"PRESET": preset})[0]


def test_virtual_order_of_pr1783():
    """Layers 3-5 run four times: 20 visits, halved as the public logs print them; 11 without the loop."""
    cfg = full("pr1783")
    encoder, decoder = tg.halves(cfg, True)
    assert encoder == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3] and decoder == [4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert len(tg.virtual_order(cfg, True)) == 20
    assert tg.virtual_order(cfg, False) == list(range(11))


def test_skip_pairs_of_pr1783():
    """The U-Net pairs do not change when the recurrence is switched on."""
    cfg = full("pr1783")
    pairs = tg.skip_pairs(cfg)
    assert pairs == {6: 3, 7: 2, 8: 1, 9: 0}
    for looping in (False, True):
        used = {visit.layer: visit.skip_from for visit in tg.schedule(cfg, looping) if visit.skip_from is not None}
        assert used == pairs


@both_loop_states
@every_preset
def test_schedules_can_be_walked(preset, looping):
    """Every skip has its source kept before it is wanted, once; every layer runs; only the segment repeats."""
    for cfg in (full(preset), tiny(preset), tiny("record", num_layers=3, loop_start=1, loop_end=1, xsa_last_n=1)):
        kept = set()
        for visit in tg.schedule(cfg, looping):
            if visit.skip_from is not None:
                kept.remove(visit.skip_from)
            if visit.keep:
                kept.add(visit.place)
        assert not kept
        order = tg.virtual_order(cfg, looping)
        for layer in range(cfg.num_layers):
            assert order.count(layer) == 1 + looping * cfg.repeats.count(layer)


def meta_model(cfg: tg.Config, monkeypatch) -> tg.GPT:
    """The model's shapes without its memory."""
    monkeypatch.setattr(tg, "select_attention", lambda cfg, device: "math")
    with torch.device("meta"):
        return tg.GPT(cfg, torch.device("meta"), torch.float32)


def test_census_of_pr1783(monkeypatch):
    """66 matrices with 31,719,424 weights and an embedding of 4,194,304 at SP8192."""
    params = dict(meta_model(full("pr1783"), monkeypatch).named_parameters())
    matrices = {name: p for name, p in params.items() if tg.owner(name, tg.PARAM_TABLE).kind == "muon"}
    assert len(matrices) == 66
    assert sum(p.numel() for p in matrices.values()) == 31_719_424
    assert params["embed"].numel() == 4_194_304 and tuple(params["embed"].shape) == (8192, 512)


def test_census_of_the_baseline(monkeypatch):
    """The baseline's nine layers: 54 matrices, 16,515,072 weights, a tied embedding of 1024 x 512."""
    params = dict(meta_model(full("naive"), monkeypatch).named_parameters())
    matrices = [p for name, p in params.items() if tg.owner(name, tg.PARAM_TABLE).kind == "muon"]
    assert (len(matrices), sum(p.numel() for p in matrices)) == (54, 16_515_072)
    assert params["embed"].numel() == 1024 * 512 and "head.weight" not in params


@both_loop_states
@every_preset
def test_flops_count_every_visit(preset, looping, monkeypatch):
    """6 x weights applied (every visit and the head) + 6 T D a visit; of a routed visit its share, and its router.

    Seeded and low-rank maps are applied as dense ones of the same shape.
    """
    cfg = dataclasses.replace(full(preset), seed_maps="none", k_rank=0)
    params = dict(meta_model(cfg, monkeypatch).named_parameters())
    total = 0
    for layer in tg.virtual_order(cfg, looping):
        of_layer = (p.numel() for name, p in params.items() if name.startswith(f"blocks.{layer}.") and "weight" in name)
        c, routed = (cfg.mod_capacity, 6 * cfg.model_dim) if f"blocks.{layer}.router" in params else (1, 0)
        pairs = c * c * 6 * cfg.train_seq_len * cfg.model_dim
        total += tg.visits_of(cfg, layer).flops * (c * 6 * sum(of_layer) + pairs) + routed
    assert tg.flops_per_token(cfg, looping) == pytest.approx(total + 6 * cfg.vocab_size * cfg.model_dim, rel=1e-12)


# ---- data -----------------------------------------------------------------------------------------------------------


def stream_of(folder, sizes: list[int], **values) -> tg.TrainStream:
    """A stream over shards whose token values tell where they stand (no two windows are alike)."""
    begin = 0
    for index, size in enumerate(sizes):
        write_shard(folder / f"fineweb_train_{index:06d}.bin", np.arange(begin, begin + size) % 60000)
        begin += size
    return tg.TrainStream(tiny("record", data_path=str(folder), vocab_size=60000, **values))


@pytest.mark.parametrize("order", ["shuffled", "coprime"])
def test_every_window_once_an_epoch(tmp_path, order):
    """An epoch covers each shard's disjoint windows once, in a shuffled order, and the next epoch another order."""
    stream, sizes = stream_of(tmp_path, [1000, 33, 32, 5, 640], data_order=order), [1000, 33, 32, 5, 640]
    windows = sum((size - 1) // 32 for size in sizes)
    assert stream.total == windows == 31 + 1 + 0 + 0 + 19
    orders = []
    for epoch in range(3):
        rows = stream.batch(epoch * windows, windows)
        assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.ones(windows, 32, dtype=torch.int32))
        first = rows[:, 0].tolist()
        covered = sorted(token for begin in first for token in range(begin, begin + 32))
        assert len(set(covered)) == len(covered) == 32 * windows
        assert first != sorted(first)
        orders.append(first)
    assert len({tuple(order) for order in orders}) == 3


def test_coprime_strides_spread_every_shard(tmp_path):
    """Any stretch of an epoch holds each shard in proportion to its length, and strides through it."""
    stream = stream_of(tmp_path, [32 * 300 + 1, 32 * 100 + 1], data_order="coprime")
    order, _ = stream.epoch(0)
    small = order >= 300
    assert all(abs(int(small[begin : begin + 80].sum()) - 20) <= 1 for begin in range(0, 400, 80))
    steps = np.diff(order[small]) % 100
    assert len(set(steps)) == 1 and math.gcd(int(steps[0]), 100) == 1


def test_the_stream_wraps(tmp_path):
    """Batches run across the end of an epoch, and any slicing of the stream gives the same windows."""
    stream = stream_of(tmp_path, [300, 200])
    whole = stream.batch(0, 60)
    assert stream.total == 15
    for size in (1, 7, 30):
        parts = [stream.batch(begin, min(size, 60 - begin)) for begin in range(0, 60, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_more_ranks_than_shards(tmp_path):
    """Eight ranks share one shard; ranks beyond the batch's sequences get none."""
    stream = stream_of(tmp_path, [2000], train_batch_tokens=32 * 6)
    run = single(stream_config := tiny("record", data_path=str(tmp_path), vocab_size=60000, train_batch_tokens=32 * 6))
    run.world_size, parts = 8, []
    assert stream_config.train_batch_tokens == 192
    for rank in range(8):
        run.rank = rank
        share = run.split(6)
        parts.append(stream.batch(share.start, len(share)))
    assert torch.equal(torch.cat(parts), stream.batch(0, 6))


def test_the_seed_sets_the_order(tmp_path):
    """The same seed gives the same batches, another seed others."""
    a = stream_of(tmp_path, [3000]).batch(0, 20)
    assert torch.equal(a, stream_of(tmp_path, [3000]).batch(0, 20))
    assert not torch.equal(a, stream_of(tmp_path, [3000], seed=7).batch(0, 20))


def test_split_covers_everything():
    """Contiguous shares of any number of ranks, no gap, no overlap, sizes within one."""
    run = single(tiny("record"))
    for world_size in (1, 2, 3, 8):
        for count in (0, 1, 5, 8, 100):
            run.world_size, shares = world_size, []
            for rank in range(world_size):
                run.rank = rank
                shares.append(run.split(count))
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


DAMAGE = {
    "magic": lambda b: b"\1" + b[1:],
    "version": lambda b: b[:4] + b"\2" + b[5:],
    "endianness": lambda b: np.frombuffer(b[:1024], "<i4").astype(">i4").tobytes() + b[1024:],
    "truncated": lambda b: b[:-2],
    "odd": lambda b: b[:-1],
    "longer": lambda b: b + b"\0\0",
    "header_only": lambda b: b[:1024],
    "half_a_header": lambda b: b[:500],
    "empty": lambda b: b"",
    "negative": lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:],
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(case, tmp_path):
    """Every kind of damage to a shard is one clear error that names the file."""
    path = write_shard(tmp_path / "fineweb_train_000000.bin", range(100))
    assert tg.read_shard(path).tolist() == list(range(100))
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(tg.UserError, match="fineweb_train_000000"):
        tg.read_shard(path)


def test_an_empty_shard_is_read_or_refused(tmp_path):
    """A shard of no tokens is an empty array or a clear error, never a traceback."""
    path = write_shard(tmp_path / "fineweb_train_000000.bin", [])
    try:
        assert len(tg.read_shard(path)) == 0
    except tg.UserError as error:
        assert "fineweb_train_000000" in str(error)


def test_tokens_beyond_the_vocabulary(tmp_path):
    """Training text of another tokenizer is refused when it is read."""
    write_shard(tmp_path / "fineweb_train_000000.bin", np.full(100, VOCAB))
    stream = tg.TrainStream(tiny("record", data_path=str(tmp_path)))
    with pytest.raises(tg.UserError, match="VOCAB_SIZE"):
        stream.batch(0, 1)


def test_too_little_text(tmp_path):
    """No training shard, or none as long as a sequence: a clear error."""
    with pytest.raises(tg.UserError, match="fineweb_train"):
        tg.TrainStream(tiny("record", data_path=str(tmp_path)))
    write_shard(tmp_path / "fineweb_train_000000.bin", range(32))
    with pytest.raises(tg.UserError, match="TRAIN_SEQ_LEN"):
        tg.TrainStream(tiny("record", data_path=str(tmp_path)))

"""Mixture of depths: who is taken, that the rest is skipped, the causal rule, capacities, gradients, telemetry."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    random_ids,
    random_validation,
    replace,
    run_steps,
    single,
    tg,
    tiny,
    tiny_model,
    trainer_of,
)
from test_laws import leak, mixing

RULES = list(tg.MOD_RULES)
CAPACITIES = (0.25, 0.5, 0.75)


def routed(**values) -> tg.Config:
    """A tiny mixture of depths, of all layers unless said otherwise."""
    return tiny("mod", **{"mod_layers": "all", **values})


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- who is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 16, 31])
def test_exactly_the_best_are_taken(rows):
    """Training takes the k highest scores of each sequence; of equal scores the first."""
    score = noise(5, 32)
    taken = tg.best_of_sequence(score, rows)
    assert torch.equal(taken, torch.zeros_like(taken).scatter(1, score.topk(rows).indices, True))
    ties = tg.best_of_sequence(torch.zeros(2, 32), rows)
    assert ties[:, :rows].all() and not ties[:, rows:].any()


def test_the_quantile_rule_by_hand():
    """A token is wanted when fewer than the capacity's share of the tokens so far (in its document) are ahead of it."""
    score, rows = noise(3, 20), 8
    score[1] = 0
    docs = (torch.arange(20) >= torch.tensor([20, 7, 3])[:, None]).long()
    for of in (None, docs):
        found = tg.above_quantile(score, of, None, rows)
        for b in range(3):
            for t in range(20):
                past = [j for j in range(t + 1) if of is None or of[b, j] == of[b, t]]
                ahead = sum(bool(score[b, j] > score[b, t]) for j in past)
                assert found[b, t] == (ahead < rows / 20 * len(past))


@pytest.mark.parametrize("rows", [1, 5, 16, 40])
def test_the_bucket_by_hand(rows):
    """The closed form is the loop n = min(n + wanted, budget); never more than k, and never more than the budget."""
    time, burst = 40, min(rows, math.ceil(2 * math.sqrt(rows)))
    for share in (0.1, 0.5, 1.0):
        wanted = torch.rand(4, time, generator=torch.Generator().manual_seed(rows)) < share
        taken = tg.within_budget(wanted, rows)
        assert not (taken & ~wanted).any() and int(taken.sum(1).max()) <= rows
        for b in range(4):
            count = 0
            for t in range(time):
                more = min(count + int(wanted[b, t]), (rows - burst) * (t + 1) // time + burst)
                assert bool(taken[b, t]) == (more > count)
                count = more


def test_a_greedy_sequence_is_thinned_not_cut():
    """Where everything is wanted the budget is spent evenly: the last tokens get their share."""
    taken = tg.within_budget(torch.ones(1, 2048, dtype=torch.bool), 1024)[0].float()
    assert taken.sum() == 1024 and 0.4 < taken[-64:].mean() < 0.6


def test_like_scores_are_taken_at_the_capacity():
    """Scores without order in time: the causal rule takes the capacity's share, and mostly the same tokens as top-k."""
    score = noise(64, 512)
    for capacity in CAPACITIES:
        rows = int(512 * capacity)
        taken = tg.within_budget(tg.above_quantile(score, None, None, rows), rows)
        assert taken.float().mean() == pytest.approx(capacity, abs=0.02)
        assert (taken == tg.best_of_sequence(score, rows)).float().mean() > 0.95


# ---- gather, run, scatter -------------------------------------------------------------------------------------------


def test_moves_and_their_gradients():
    """Packing and unpacking are what indexing does, and each one's gradient is what autograd makes of indexing."""
    x = noise(2, 6, 3).double().requires_grad_()
    passes = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    index, live = torch.tensor([[0, 2, 3], [4, 5, 5]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    slot = (passes.cumsum(1) - 1).clamp(0, 2)
    packed = tg.Move.apply(x, index, live, slot, passes)
    assert torch.equal(packed[0], x[0, [0, 2, 3]]) and torch.equal(packed[1, 0], x[1, 4]) and not packed[1, 1:].any()
    back = tg.Move.apply(packed, slot, passes, index, live)
    assert torch.equal(back, torch.where(passes[..., None], x, 0))
    assert torch.autograd.gradcheck(lambda x: tg.Move.apply(x, index, live, slot, passes), x)
    y = noise(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: tg.Move.apply(y * live[..., None], slot, passes, index, live), y)


def masked_attention(passes):
    """Attention over all T tokens in which the keys of tokens that were not taken are hidden."""

    def attend(q, k, v, docs):
        index = torch.arange(q.shape[1])
        mask = (index[:, None] >= index) & (passes[:, None, :] | (index[:, None] == index))
        if docs is not None:
            mask = mask & (docs[:, :, None] == docs[:, None, :])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True).transpose(1, 2)

    return attend


@pytest.mark.parametrize("exact", [False, True], ids=["rule", "best"])
@pytest.mark.parametrize("layer", [1, 4], ids=["sequential", "parallel"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "docs"])
def test_packed_is_masked(exact, layer, packed, monkeypatch):
    """What k packed rows give equals computing all T tokens and masking; a skipped token keeps its stream's bits."""
    cfg = routed(attn_gate="sparse")
    model, ids = tiny_model(cfg), random_ids(cfg, 3, 32)
    block, x, x0 = model.blocks[layer], noise(3, 32, 64, seed=1), noise(3, 32, 64, seed=2)
    rope = tg.rotary_table(32, 8, 1e4, 32, torch.device("cpu"))
    docs = (ids == tg.BOS).cumsum(1) if packed else None
    block.trace = []
    with torch.no_grad():
        found = block.visit(tg.PARTS, x, x0, rope, docs, tg.PLAIN, None, tg.Route(None, 0.5, exact))
        _, chosen = block.trace[0]
        monkeypatch.setitem(tg.ATTENTION, "math", masked_attention(chosen.passes))
        change = chosen.weight[..., None] * (block(x, x0, rope, docs, tg.PLAIN) - x)
    wanted = torch.where(chosen.passes[..., None], x + change, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[~chosen.passes], x[~chosen.passes]) and change.abs().max() > 0.1
    assert (chosen.passes.sum(1) == 16).all() if exact else (chosen.passes.sum(1) <= 16).all()


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_skipping_is_real(capacity):
    """Every map of a routed layer sees k rows a sequence; the Hessians count those that hold a token, and no others."""
    cfg = routed(mod_capacity=capacity, mod_layers="1,4")
    model, ids, seen = tiny_model(cfg), random_ids(cfg, 3, 30), {}
    rows = 3 * math.ceil(capacity * 30)
    maps = {name: m for name, m in model.named_modules() if isinstance(m, tg.DenseLinear) and not name.endswith(".k")}
    for name, module in maps.items():
        module.tap = lambda x, name=name: seen.update({name: x.flatten(0, -2).shape[0]})
    for block in (model.blocks[1], model.blocks[4]):
        block.trace = []
    with torch.no_grad():
        model.hidden(ids, False)
    assert all(count == (rows if name.startswith(("blocks.1.", "blocks.4.")) else 90) for name, count in seen.items())
    hessians: dict[str, torch.Tensor] = {}
    with torch.no_grad(), tg.tapped(model, hessians):
        model.hidden(ids, False)
    for layer in (1, 4):  # the input of q is normed: a row adds its width to the trace
        taken = int(model.blocks[layer].trace[0][1].passes.sum())
        trace = float(hessians[f"blocks.{layer}.attn.q.weight"].trace())
        assert trace / cfg.model_dim == pytest.approx(taken, rel=1e-4)


# ---- laws -----------------------------------------------------------------------------------------------------------

ROUTERS = {
    "random": lambda model, router: router,
    "equal_scores": lambda model, router: 0 * router,
    "huge": lambda model, router: 1e4 * router,
    "wants_starts": lambda model, router: 50 * tg.norm(model.embed[tg.BOS]).expand_as(router),
    "hates_starts": lambda model, router: -50 * tg.norm(model.embed[tg.BOS]).expand_as(router),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("capacity", CAPACITIES)
@torch.no_grad()
def test_causal_and_alone_whatever_the_router(capacity, rule):
    """Laws 1 and 2, bit for bit: random routers and those that an adversary would choose."""
    cfg = routed(mod_capacity=capacity, mod_rule=rule, num_layers=4, loop_start=1, loop_end=2, num_loops=1)
    for kind, change in ROUTERS.items():
        model = tiny_model(cfg)
        for block in model.blocks:
            block.router.copy_(change(model, block.router))
        assert leak(model, cfg, True) == 0.0, kind
        assert mixing(model, cfg, True) == 0.0, kind


@pytest.mark.parametrize("rule", RULES)
def test_causal_once_trained(rule, corpus):
    """Law 1 with trained routers."""
    cfg = routed(mod_rule=rule, num_loops=1, **corpus.knobs())
    trainer = trainer_of(cfg)
    run_steps(trainer, 4, 4)
    assert leak(trainer.model, cfg, True) == 0.0 and mixing(trainer.model, cfg, True) == 0.0


def test_the_training_choice_would_be_a_leak(monkeypatch):
    """The causality test fails on a model that evaluates by the best of the sequence."""
    cfg = routed()
    model = tiny_model(cfg)
    monkeypatch.setattr(
        model, "logits", lambda ids, looping: tg.head_logits(model.hidden(ids, looping, True), model.embed, 30.0)
    )
    assert leak(model, cfg, False) > 0


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_router_learns(rule, corpus):
    """After one step every router has a gradient under both choices, and the threshold moves towards the capacity."""
    cfg = routed(mod_rule=rule, mod_z_loss=1e-3, **corpus.knobs())
    trainer = trainer_of(cfg)
    run_steps(trainer, 1, 100)
    for exact in (True, False):
        trainer.model.zero_grad()
        trainer.accumulate(trainer.stream.batch(0, 4), True, exact)
        for block in trainer.model.blocks:
            assert block.router.grad.flatten(1).any(1).all()
            assert block.threshold is None or block.threshold.grad.all()


def test_the_balance_loss_finds_the_capacity():
    """Descent on it brings a sequence's mean sigmoid to the capacity."""
    cfg = routed(num_loops=0, mod_balance_loss=1.0)
    block, x = tiny_model(cfg).blocks[1], noise(8, 512, 64)
    block.per_token = 1 / 4096
    router = torch.randn(64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias = torch.ones(8, 512, 1)
    x = torch.cat([x[..., :-1], bias], -1)  # a coordinate by which all scores can move
    for _ in range(300):
        chosen = tg.choose(block, x, router, None, None, 128, True)
        gradient = torch.autograd.grad(chosen.weight.mean() * 0, router)[0]
        with torch.no_grad():
            router -= 20.0 * gradient
    assert (chosen.weight / 2).mean(1).sub(0.25).abs().max() < 0.02


def test_the_threshold_finds_the_capacity():
    """Descent on the threshold's loss ends where the capacity's share of scores is above it."""
    cfg = routed(mod_rule="threshold", num_loops=0)
    block, x = tiny_model(cfg).blocks[1], noise(8, 512, 64)
    block.per_token = 1 / 4096
    for capacity in (0.25, 0.75):
        threshold = torch.zeros((), requires_grad=True)
        for _ in range(150):
            chosen = tg.choose(block, x, block.router[0].detach(), threshold, None, int(512 * capacity), False)
            chosen.weight.sum().backward()
            with torch.no_grad():
                threshold -= 0.05 * threshold.grad
                threshold.grad = None
        score = torch.logit(chosen.weight / 2)
        assert (score > threshold).float().mean() == pytest.approx(capacity, abs=0.04)


def test_phases(corpus, monkeypatch):
    """The first part of the run takes the best of each sequence, the last part and everything else the causal rule."""
    cfg = routed(mod_causal_at=0.5, iterations=4, warmup_steps=1, **corpus.knobs())
    trainer, seen = trainer_of(cfg), []
    hidden = trainer.model.hidden
    monkeypatch.setattr(trainer.model, "hidden", lambda *args: seen.append(args[1:]) or hidden(*args))
    run_steps(trainer, 4, 4)
    assert [state[1] for state in seen[::2]] == [True, True, False, False]
    seen.clear()
    trainer.warm_up()
    assert set(seen) == {(looping, exact) for looping in (False, True) for exact in (False, True)}
    seen.clear()
    tg.mean_loss(trainer.run, trainer.model, trainer.stream.batch(0, 2), True)
    tg.score_plain(trainer.run, trainer.model, random_validation(cfg, 60), True, 600.0)
    assert not any(state[1:] == (True,) for state in seen)
    assert not tg.exact_at(tiny("record"), 0.0)


# ---- capacities -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "": [()] * 6,
    "1,3-4@0.25": [(), (0.5,), (), (0.25, 0.25), (0.25,), ()],
    "inner": [(), (0.5,), (0.5, 0.5), (0.5, 0.5), (0.5,), ()],
    "odd,5@1": [(), (0.5,), (), (0.5, 0.5), (), (1.0,)],
    "loop": [(), (), (0.5, 0.5), (0.5, 0.5), (), ()],
}


def test_the_capacity_column():
    """MOD_LAYERS, MOD_CAPACITY and MOD_PASS_CAPACITY fill the column; the schedule hands each pass its own."""
    base = dict(num_loops=1, mod_capacity=0.5)
    for text, rows in COLUMNS.items():
        assert tg.capacities(tiny("record", mod_layers=text, **base)) == rows
    cfg = tiny("record", num_loops=3, mod_pass_capacity="1,0.5,0.25")
    assert tg.capacities(cfg)[1:4] == [(), (1.0, 0.5, 0.25, 0.25), (1.0, 0.5, 0.25, 0.25)]
    found = [(visit.layer, *visit.route[0][:2]) for visit in tg.schedule(cfg, True) if visit.route]
    assert found == [(layer, turn, c) for turn, c in enumerate((1.0, 0.5, 0.25, 0.25)) for layer in (2, 3)]
    assert [visit.route[0] for visit in tg.schedule(cfg, False, True) if visit.route] == [tg.Route(None, 1.0, True)] * 2


BAD = [dict(mod_layers="9"), dict(mod_layers="some"), dict(mod_layers="1@2"), dict(mod_layers="1@x"),
       dict(mod_pass_capacity="1,no"), dict(mod_capacity=0.0), dict(mod_layers="3-1-2"),
       dict(mod_layers="all", mod_capacity=0.5, deq_layer=2)]  # fmt: skip


@pytest.mark.parametrize("values", BAD, ids=str)
def test_what_cannot_be_is_refused(values):
    """A capacity column that cannot be read, or that routes an equilibrium, stops the run by the knob's name."""
    with pytest.raises(tg.UserError, match="MOD_"):
        tiny("record", **values)


def test_the_count_of_flops_is_honest():
    """A routed visit counts c of its matrices and c^2 of its attention, plus the router; all dense counts as before."""
    dense, half = tiny("pr1783"), routed(mod_capacity=0.5)
    layer = 64 * (2 * 64 + 2 * 32 + 2 * 128)
    visits = len(tg.virtual_order(dense, True))
    head = 64 * dense.vocab_size
    assert tg.flops_per_token(dense, True) == 6 * (visits * (layer + 32 * 64) + head)
    assert tg.flops_per_token(half, True) == 6 * (visits * (0.5 * layer + 0.25 * 32 * 64 + 64) + head)


COMPOSED = [
    dict(mod_rule="threshold", pack_docs=True, smear_gate=True, attn_gate="sparse", tie_embeddings=False),
    dict(mod_layers="0-1,4", mod_capacity=0.25, deq_layer=5, skip_kind="add", resid_mix=False),
    dict(mod_layers="odd", mod_capacity=1.0, mod_pass_capacity="1,0.3", parallel_residual_start=-1, ema_decay=0.0),
]


@pytest.mark.parametrize("values", COMPOSED, ids=["docs_gates", "equilibrium", "passes"])
def test_composes(values, corpus):
    """Law 12: two steps, Hessians, packing and every evaluation row beside other mechanisms."""
    cfg = routed(ttt_enabled=True, **values, **corpus.knobs())
    trainer = trainer_of(cfg)
    assert all(map(math.isfinite, run_steps(trainer, 2, 2)))
    hessians = tg.collect_hessians(trainer.run, trainer.model, tg.calibration_rows(trainer), cfg.loops)
    artifact = tg.unpack(tg.pack(cfg, tg.quantize(cfg, trainer.model.state_dict(), hessians), cfg.loops, quick=True))
    model = tg.build_model(cfg, trainer.run)
    model.load_state_dict(artifact.state())
    val = random_validation(cfg, 130)
    for row in tg.EVALS:
        assert math.isfinite(row.score(trainer.run, model, val, cfg.loops, 600.0)[0].val_bpb)


# ---- telemetry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_report(rule, corpus, validation):
    """The object ``mod`` of result.json: every visit, every class of token, the gap; the model is left as it was."""
    cfg = routed(mod_rule=rule, mod_layers="odd", mod_capacity=0.5, val_batch_tokens=512, **corpus.knobs())
    model = tiny_model(cfg)
    report = tg.probe(single(cfg), model, validation, True)["mod"]
    assert [(v["layer"], v["turn"]) for v in report["visits"]] == [(1, None), (3, 0), (3, 1), (3, 2), (3, 3), (5, None)]
    for visit in report["visits"]:
        assert visit["used"] <= visit["used_training"] == 0.5
        assert 0 < visit["entropy"] <= 1 and 0.3 < visit["agreement"] <= 1
    assert report["gap"] == pytest.approx(report["bpb"]["rule"] - report["bpb"]["training"])
    skipped = 1 - sum(visit["used"] for visit in report["visits"]) / 6
    for table in report["skipped"].values():
        assert sum(row["tokens"] for row in table.values()) == report["tokens"]
        total = sum(row["tokens"] * (row["skipped"] or 0) for row in table.values())
        assert total / report["tokens"] == pytest.approx(skipped)
    assert all(block.trace is None for block in model.blocks if isinstance(block, tg.Routed))
    plain = replace(cfg, mod_layers="")
    assert tg.probe(single(plain), tiny_model(plain), validation, True) == {}


def test_classes_of_tokens(corpus):
    """Letters with and without a space before, digits, punctuation, bytes and control pieces are told apart."""
    cfg = routed(**corpus.knobs())
    pieces = tg.load_tokenizer(cfg)
    names = [list(tg.TOKEN_CLASSES)[i] for i in tg.token_classes(pieces, cfg.vocab_size)]
    named = {pieces.id_to_piece(token): name for token, name in enumerate(names)}
    assert named["<0x41>"] == "byte_fallback" and named["<s>"] == "control" and named["."] == "punctuation"
    assert named["e"] == "letters" and names.count("byte_fallback") == 256
    assert any(name == "space_led" for piece, name in named.items() if piece[0] == "\u2581" and piece[1:].isalpha())

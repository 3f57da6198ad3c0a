"""What PR #1435 and PR #298 bring, each alone: the laws, the start, and identities against slow references."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    OneOf,
    random_ids,
    random_validation,
    replace,
    run_steps,
    single,
    tg,
    tiny,
    tiny_env,
    tiny_model,
    trainer_of,
)

LENGTH = 20
LOOPED = dict(num_layers=3, loop_start=1, loop_end=1, num_loops=2, xsa_last_n=1, ve_layers="-1", enable_looping_at=0.0)
DOCS = dict(pack_docs=True)

# name -> knobs, over a record stack of three layers whose middle one runs three times
ALONE = {
    "recur_layers": dict(recur_layers="0,1,1"),
    "num_passes": dict(num_passes=2),
    "pass_controls": dict(pass_controls=True),
    "skip_over": dict(skip_over="visits"),
    "lanes": dict(parallel_start_layer=1),
    "lanes_parallel": dict(parallel_start_layer=1, parallel_residual_start=0),
    "k_rank": dict(k_rank=4),
    "input_table": dict(input_table=True),
    "linear": dict(linear_layers="0,1", **DOCS),
    "experts": dict(use_eigenspace_routing=True),
    "resonance": dict(use_resonant_encoding=True, **DOCS),
    "state": dict(use_selective_state=True, **DOCS),
    "confidence": dict(use_confidence_conditioning=True),
    "memory": dict(use_gradient_memory=True),
    "td": dict(use_td_recurrence=True, td_alpha=0.1),
    "exit": dict(use_adaptive_depth=True),
    "exit_in_lanes": dict(use_adaptive_depth=True, parallel_start_layer=1),
}
alone = pytest.mark.parametrize("name", ALONE)


def config(**values) -> tg.Config:
    return tiny("record", **{**LOOPED, **values})


def logits(model: tg.GPT, ids: torch.Tensor, looping: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(ids, looping)


def fresh(cfg: tg.Config) -> tg.GPT:
    return tg.build_model(cfg, single(cfg))


# ---- the laws, alone ------------------------------------------------------------------------------------------------


@alone
def test_causal_and_batch_invariant(name):
    """Laws 1 and 2, bit for bit, in both loop states."""
    cfg = config(**ALONE[name])
    model, ids = tiny_model(cfg), random_ids(cfg, 2, LENGTH)
    for looping, t in itertools.product((False, True), (1, 9, LENGTH - 1)):
        before, later, other = logits(model, ids, looping), ids.clone(), ids.clone()
        later[:, t:] = random_ids(cfg, 2, LENGTH, seed=t)[:, :1].clamp(min=5) + 3
        other[1] = random_ids(cfg, 1, LENGTH, seed=5)[0]
        assert torch.equal(logits(model, later, looping)[:, :t], before[:, :t])
        assert torch.equal(logits(model, other, looping)[0], before[0])


TRANSPARENT = {
    "pass_controls": 0, "lanes": 5, "input_table": 1, "experts": 6, "resonance": 2, "state": 4,
    "confidence": 1, "memory": 2, "td": 3, "exit": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_starts_as_the_identity(name):
    """Law 7: joined with its own initial values to a model with random weights it changes nothing; later it does."""
    off = {"pack_docs": ALONE[name].get("pack_docs", False)}
    on = {**ALONE[name], "td_alpha": 0.0}
    base, model = tiny_model(config(**off)), fresh(config(**on))
    state = dict(base.state_dict())
    if name == "pass_controls":
        state |= {key: value.expand(own.shape) for key, own in model.state_dict().items()
                  if (value := state[key]).shape != own.shape}  # fmt: skip
    assert len(model.load_state_dict(state, strict=False).missing_keys) == TRANSPARENT[name]
    ids = random_ids(config(), 2, LENGTH)
    torch.testing.assert_close(logits(model, ids), logits(base, ids), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(model, ids, False), logits(base, ids, False), rtol=0, atol=2e-5)
    changed = tiny_model(config(**on), seed=1)
    changed.load_state_dict(state, strict=False)
    if name not in ("pass_controls", "exit"):
        assert (logits(changed, ids) - logits(base, ids)).abs().max() > 1e-4


# ---- depth ----------------------------------------------------------------------------------------------------------


def test_three_ways_to_repeat():
    """NUM_LOOPS, RECUR_LAYERS and NUM_PASSES write the same order where they can."""
    loops, listed = config(num_loops=2), config(recur_layers="1,1")
    assert tg.virtual_order(loops, True) == tg.virtual_order(listed, True) == [0, 1, 1, 1, 2]
    assert tg.virtual_order(config(num_passes=3), True) == [0, 1, 2] * 3
    assert tg.virtual_order(config(recur_layers="-1,0"), True) == [0, 1, 2, 2, 0]
    for cfg in (loops, listed, config(num_passes=3)):
        assert tg.virtual_order(cfg, False) == [0, 1, 2]
    ids, first = random_ids(loops, 2, LENGTH), tiny_model(loops)
    assert torch.equal(logits(first, ids), logits(tiny_model(listed), ids))


PASSES = [
    (dict(num_loops=0), True, [0, 3]),
    (dict(num_loops=2), True, [1, 2, 3, 4]),
    (dict(num_loops=2), False, [1, 2]),
    (dict(num_passes=2), True, [0, 3, 6]),
    (dict(recur_layers="0,1,1"), True, [0, 2, 4, 5]),
]


@pytest.mark.parametrize("values,looping,bounds", PASSES)
def test_where_passes_begin(values, looping, bounds):
    """A pass over the repeated layers begins where the order stops to rise, and the last one ends with the list."""
    cfg = config(**values)
    assert tg.pass_bounds(cfg, looping) == bounds
    visits = tg.schedule(cfg, looping)
    assert [at for at, visit in enumerate(visits) if visit.begins >= 0] == bounds[:-1]
    assert [at for at, visit in enumerate(visits) if visit.inside] == list(range(bounds[0], bounds[-1]))


def test_the_switch_by_step():
    """RECUR_START_STEP decides where it is set, ENABLE_LOOPING_AT elsewhere."""
    cfg = config(recur_start_step=3, enable_looping_at=0.5)
    assert [tg.looping_at(cfg, 0.9, step) for step in (0, 2, 3, 9)] == [False, False, True, True]
    cfg = replace(cfg, recur_start_step=0)
    assert [tg.looping_at(cfg, fraction, 9) for fraction in (0.0, 0.49, 0.5)] == [False, False, True]
    assert tg.run_plan(replace(cfg, recur_start_step=10**6, max_wallclock_seconds=600.0), 8)


def test_skips_over_visits():
    """Sources and destinations mirror the looped order, none is the stream itself, and the first pass keeps what it
    has of both."""
    cfg, _ = tg.read_config({"PRESET": "pr298"})
    joined = {at: visit.skip_from for at, visit in enumerate(tg.schedule(cfg, True)) if visit.skip_from is not None}
    assert joined == {5: 2, 6: 1, 7: 0}
    assert not [visit for visit in tg.schedule(cfg, False) if visit.skip_from is not None]
    for order in ("0,1,1", "2,0", "0,0"):
        for looping in (False, True):
            kept = set()
            for visit in tg.schedule(config(recur_layers=order, skip_over="visits"), looping):
                assert visit.skip_from is None or visit.skip_from in kept
                kept |= {visit.place} if visit.keep else set()


def test_matrices_that_wait_do_not_decay(corpus, tmp_path):
    """Before the switch the carries have no gradient: neither decay nor momentum moves them; then they learn. A run
    resumed before the switch goes on as it would have."""
    cfg = config(use_selective_state=True, use_td_recurrence=True, enable_looping_at=0.5, **corpus.knobs())
    trainer = trainer_of(cfg, tmp_path)
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    run_steps(trainer, 2, 8)
    moved = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved and not [name for name in moved if name.startswith("carries.")]
    trainer.save()
    again = trainer_of(cfg, tmp_path)
    again.resume(tmp_path)
    for step, one in itertools.product(range(4, 8), (trainer, again)):
        one.train_step(trainer.stream.batch(4 * step, 4), step / 8)
    assert all(map(torch.equal, trainer.model.parameters(), again.model.parameters()))
    moved = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, before[name])}
    assert {name for name in before if name.startswith("carries.")} <= moved


# ---- lanes ----------------------------------------------------------------------------------------------------------


def lanes_by_hand(block: tg.Block, x: torch.Tensor, x0: torch.Tensor, rope) -> torch.Tensor:
    """The equations of two_lanes with a loop over lanes and branches."""
    a, b = block.resid_mix
    u = [a * lane + b * x0 for lane in x]
    branches = (
        lambda n: block.attn(n, rope, None, block.scale, block.scales()[0], tg.PLAIN, None),
        lambda n: block.mlp(n, block.scale, block.scales()[1], tg.PLAIN),
    )
    entered = list(u)
    for which, branch in enumerate(branches):
        source = u if block.residual == "sequential" else entered
        out = branch(tg.norm(sum(block.lane_read[which, lane] * source[lane] for lane in range(2))))
        u = [u[lane] + block.lane_write[which, lane] * out for lane in range(2)]
    return torch.stack(u)


@pytest.mark.parametrize("start", [-1, 0])
def test_lanes_against_a_loop(start):
    """The block on two lanes is its equations; what one lane's reader writes, the other's reads."""
    cfg = config(parallel_start_layer=1, parallel_residual_start=start, ve_layers="")
    block = tiny_model(cfg).blocks[2]
    x, x0 = torch.randn(2, 1, 8, 64), torch.randn(1, 8, 64)
    rope = tg.rotary_table(8, 8, 1e4, 32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(block(x, x0, rope, None, tg.PLAIN), lanes_by_hand(block, x, x0, rope))


def test_a_skip_reaches_both_lanes():
    """A skip that joins after the lanes opened changes both of them."""
    cfg, seen = config(num_layers=6, num_loops=0, parallel_start_layer=3), {}
    model = tiny_model(cfg)
    model.parts["skip"] = lambda skip, x, s: seen.setdefault(len(seen), (x, skip(x, s)))[1]
    logits(model, random_ids(cfg, 1, LENGTH))
    for x, joined in seen.values():
        assert x.dim() == joined.dim() == 4 and (x != joined).flatten(1).any(1).all()
    assert len(seen) == 2


@pytest.mark.parametrize("values", [dict(deq_layer=2), dict(mod_layers="2@0.5"), dict(seed_maps="all")])
def test_lanes_beside_other_blocks(values):
    """A layer that knows one lane works on their mean; the gradient reaches every parameter."""
    cfg = config(parallel_start_layer=1, **values)
    model, ids = tiny_model(cfg), random_ids(cfg, 2, LENGTH)
    model(ids, ids, True).sum().backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


# ---- maps and layers ------------------------------------------------------------------------------------------------


def test_low_rank_keys():
    """K_RANK's map is a product of two factors of that rank and starts with the norm of an orthogonal one."""
    model = fresh(config(k_rank=4))
    for block in model.blocks:
        W = block.attn.k.matrix(torch.float32).detach()
        assert torch.linalg.matrix_rank(W) == 4 and tuple(block.attn.k.lora_A.shape) == (4, 64)
        torch.testing.assert_close(torch.linalg.svdvals(W)[:4], torch.ones(4), rtol=1e-4, atol=1e-4)
    assert isinstance(fresh(config(k_rank=4, seed_maps="k")).blocks[0].attn.k.basis_scale, torch.nn.Parameter)


def quadratic(q, k, v, docs) -> torch.Tensor:
    """Linear attention by its T x T weights."""
    f, g = (torch.nn.functional.elu(x) + 1 for x in (q, k.repeat_interleave(2, 2)))
    weight = torch.einsum("bthk,bshk->bhts", f, g)
    index = torch.arange(q.shape[1])
    seen = (index[:, None] >= index) & (docs[:, :, None] == docs[:, None, :])
    weight = weight * seen[:, None]
    return torch.einsum("bhts,bshk->bthk", weight / weight.sum(-1, keepdim=True), v.repeat_interleave(2, 2))


@pytest.mark.parametrize("chunk", [1, 4, 29, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_attention_in_chunks(chunk, packed):
    """The chunked form is the quadratic one, within documents too, and so is its gradient."""
    noise = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 29, n, 8, generator=noise, requires_grad=True) for n in (4, 2, 2))
    docs = (torch.rand(2, 29, generator=noise) < 0.15).cumsum(1)
    out = tg.linear_attention(q, k, v, docs if packed else None, chunk)
    expected = quadratic(q, k, v, docs if packed else torch.zeros_like(docs))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_experts_have_orthogonal_bases():
    """The subspaces are orthonormal whatever the weights; equal scores give the plain MLP, others weigh by energy."""
    A = torch.randn(12, 64)
    Q = tg.orthonormal(A)
    torch.testing.assert_close(Q @ Q.T, torch.eye(12), rtol=0, atol=1e-4)
    mlp = tiny_model(config(use_eigenspace_routing=True)).blocks[0].mlp
    x, scale = torch.randn(2, 5, 64), torch.ones(64)
    with torch.no_grad():
        found = mlp(x, torch.tensor(1.0), scale, tg.PLAIN)
        share = (tg.norm(x) @ tg.orthonormal(mlp.basis.weight).T).square().view(2, 5, 4, 4).sum(-1) / 4
        weight = 4 * torch.softmax(mlp.route_scale * share, -1)
        up, down = mlp.up.weight.view(4, -1, 64), mlp.down.weight.view(64, 4, -1)
        act = torch.nn.functional.leaky_relu(torch.einsum("btd,ehd->bteh", x, up), mlp.slope).square()
        expected = torch.einsum("bte,bteh,deh->btd", weight, act, down)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert weight.std() > 0.01


# ---- carries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_the_mean_before_against_a_loop(packed):
    """The parallel scan is the mean over the earlier tokens of the document."""
    x = torch.randn(2, 13, 5)
    docs = torch.tensor([[0] * 4 + [1] * 9, [2] * 1 + [3] * 2 + [4] * 10])
    found = tg.mean_before(x, docs if packed else None)
    for b, t in itertools.product(range(2), range(13)):
        mine = [j for j in range(t) if not packed or docs[b, j] == docs[b, t]]
        expected = x[b, mine].mean(0) if mine else torch.zeros(5)
        torch.testing.assert_close(found[b, t], expected, rtol=1e-5, atol=1e-6)


def walked(cfg: tg.Config, name: str) -> list:
    """(carry's input, memory, output) at every call in a forward pass of a random model."""
    model, calls = tiny_model(cfg), []
    carry = model.carries[name]
    carry.register_forward_hook(lambda module, args, out: calls.append((args, out)))
    logits(model, random_ids(cfg, 2, LENGTH))
    return [carry, *calls]


def test_memory_and_confidence_by_hand():
    """v sums the changes with a decay; c is the cosine of the stream with itself a pass before."""
    carry, first, second = walked(config(use_gradient_memory=True), "memory")
    v = first[0][1]["change"]
    torch.testing.assert_close(first[1][0], first[0][0] + carry.carry_size[0] * v)
    v = second[0][1]["change"] + torch.sigmoid(carry.carry_keep) * v
    torch.testing.assert_close(second[1][0], second[0][0] + carry.carry_size[1] * v)
    carry, *calls = walked(config(use_confidence_conditioning=True), "confidence")
    for row, ((x, memory, *_), (out, _)) in enumerate(calls):
        c = (tg.norm(x) * tg.norm(memory["start"])).mean(-1, keepdim=True)
        torch.testing.assert_close(out, x + c * carry.carry_note[row], rtol=1e-4, atol=1e-5)


def test_td_learns_what_is_to_come():
    """Trained by its own loss alone, V predicts a stream's constant change: change / (1 - 0.9)."""
    cfg = config(use_td_recurrence=True, train_batch_tokens=128)
    carry = fresh(cfg).carries["td"]
    carry.per_token = 1 / tg.TD_WEIGHT
    x, change = torch.randn(1, 16, 64), 0.01 * torch.ones(1, 16, 64)
    adam = torch.optim.Adam(carry.parameters(), lr=0.01)
    for _ in range(400):
        out, _ = carry(x + change, {"start": x, "change": change}, torch.tensor([0]), None)
        adam.zero_grad()
        (0 * out).sum().backward()
        adam.step()
    with torch.no_grad():
        V = carry.up(carry.down(tg.norm(x)))
    assert V.mean() == pytest.approx(0.1, rel=0.1)


def test_a_growing_stream_is_no_larger_loss_to_td():
    """Its loss is relative to the stream: of one ten times as large its gradient is a tenth."""
    carry = fresh(config(use_td_recurrence=True)).carries["td"]
    carry.per_token = 1.0
    x, change, pulls = torch.randn(1, 16, 64), torch.randn(1, 16, 64), []
    for scale in (1.0, 10.0):
        out, _ = carry(scale * (x + change), {"start": scale * x, "change": scale * change}, torch.tensor([0]), None)
        (pull,) = torch.autograd.grad((0 * out).sum(), carry.up.weight)
        pulls.append(pull)
    assert pulls[0].norm() > 0
    torch.testing.assert_close(pulls[1], 0.1 * pulls[0], rtol=1e-3, atol=1e-9)


def test_the_resonance_is_a_wave():
    """x (1 + r cos(t f)), t from the document's start, f learned in hundredths; the first pass has it too."""
    carry, *calls = walked(config(use_resonant_encoding=True), "resonance")
    for row, ((x, _, _, docs), (out, _)) in enumerate(calls):
        t, start = tg.document_start(x, docs)
        wave = torch.cos((t - start)[..., None] * 0.01 * carry.carry_pitch[row])
        torch.testing.assert_close(out, x * (1 + carry.carry_size[row] * wave), rtol=1e-4, atol=1e-5)
        assert wave.std() > 1e-3 and carry.carry_size[row].abs() > 0


def test_the_state_goes_on():
    """A GRU step from the mean; the second pass starts from the first one's state."""
    carry, first, second = walked(config(use_selective_state=True), "state")
    state = None
    for (x, _, _, docs), (out, after) in (first, second):
        m = tg.mean_before(carry.down(tg.norm(x)), docs)
        state = m if state is None else state
        z, r = torch.sigmoid(torch.cat((m, state), -1) @ carry.gates.weight.T).chunk(2, -1)
        h = torch.tanh(torch.cat((m, r * state), -1) @ carry.candidate.weight.T)
        state = (1 - z) * state + z * h
        torch.testing.assert_close(after["state"], state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out, x + state @ carry.up.weight.T, rtol=1e-4, atol=1e-5)


def exit_model(cfg: tg.Config) -> tg.GPT:
    """A random model whose gates send about half of the tokens away at each pass."""
    model = tiny_model(cfg)
    with torch.no_grad():
        model.carries["exit"].carry_bias.fill_(-0.3)
        model.carries["exit"].carry_gate.mul_(20)
    return model


@pytest.mark.parametrize("routed", [{}, dict(mod_pass_capacity="1,0.5")], ids=["all", "routed"])
def test_exits_are_for_good(routed, corpus, validation):
    """A token that left is not changed by later passes and does not come back; computing its MLP or not is the same."""
    cfg = config(use_adaptive_depth=True, loop_start=0, val_batch_tokens=256, **routed, **corpus.knobs())
    model, seen = exit_model(cfg), []
    real = tg.PARTS["leave"]
    model.parts["leave"] = lambda x, start, live: seen.append((start, live, real(x, start, live))) or seen[-1][2]
    logits(model, random_ids(cfg, 2, LENGTH))
    for start, live, out in seen:
        gone = (live == 0)[..., 0]
        assert ((live == 0) | (live == 1)).all() and 0 < gone.sum() < gone.numel()
        assert torch.equal(out[gone], start[gone]) and not torch.equal(out[~gone], start[~gone])
    assert len(seen) == 4 and all((late[1] <= early[1]).all() for early, late in itertools.pairwise(seen))
    model.parts["leave"] = real
    report = tg.probe(single(cfg), model, validation, True)["exits"]
    assert report["difference"] < 1e-5 and 0 < report["stays"][1] < report["stays"][0] < 1
    assert model.parts["leave"] is real and set(report["seconds"]) == {"all", "staying"}


def test_the_gate_learns_from_loss_and_cost():
    """Straight-through: the choice is hard, the gradient that of the probability; a higher cost sends tokens away."""
    for penalty, sign in ((0.0, None), (1e3, 1.0)):
        cfg = config(use_adaptive_depth=True, exit_penalty=penalty)
        model, ids = tiny_model(cfg), random_ids(cfg, 2, LENGTH)
        model.carries["exit"].per_token = 1.0
        model(ids, ids, True).sum().backward()
        gate, bias = (param.grad for param in model.carries["exit"].parameters())
        assert gate.any(1).all() and bias.any(1).all()
        assert sign is None or (bias < 0).all()  # descent raises the bias, and with it the chance to leave


# ---- losses, start, calibration -------------------------------------------------------------------------------------


def test_the_entropy_bonus():
    """Its gradient is that of the mean entropy, the loss stays cross-entropy, and it fades with the run."""
    cfg = config(use_thermo_loss=True)
    model, ids = tiny_model(cfg), random_ids(cfg, 2, LENGTH)
    plain = model(ids, ids, True).sum()
    with_bonus = model(ids, ids, True, False, 0.3).sum()
    assert torch.equal(plain, with_bonus)
    log_p = model.logits(ids, True).log_softmax(-1)
    expected = plain + 0.3 * (log_p.exp() * log_p).sum()
    grads = [torch.autograd.grad(loss, model.blocks[1].mlp.up.weight)[0] for loss in (with_bonus, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert tg.entropy_bonus(cfg, 0.0) == pytest.approx(0.025)
    assert tg.entropy_bonus(cfg, 0.72) == pytest.approx(0.025 / math.e)
    assert tg.entropy_bonus(config(), 0.0) == 0


def test_the_bits_of_the_weights():
    """The closed gradient is autograd's of the mean bits; following it, an entropy coder's bits fall at equal size."""
    model = tiny_model(config(num_loops=0))
    params = {n: p for n, p in model.named_parameters() if tg.owner(n, tg.TENSOR_PLAN).codec != "half"}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    tg.add_weight_bits(model, 0.7)
    count = sum(p.numel() for p in params.values())
    step = {n: 0.4 * p.detach().square().mean().sqrt() for n, p in params.items()}
    bits = 0.7 * sum((1 + (p / step[n]).square()).log2().sum() / 2 for n, p in params.items()) / count
    for (name, param), expected in zip(params.items(), torch.autograd.grad(bits, list(params.values())), strict=True):
        torch.testing.assert_close(param.grad, expected, rtol=1e-4, atol=1e-12, msg=name)
    assert not any(p.grad.any() for n, p in model.named_parameters() if n not in params)
    weight = model.blocks[0].mlp.up.weight.detach()

    def coded(W: torch.Tensor) -> float:
        counts = torch.unique((W / (0.4 * W.square().mean().sqrt())).round(), return_counts=True)[1].double()
        return float(torch.special.entr(counts / counts.sum()).sum() / math.log(2))

    before = coded(weight)
    for _ in range(50):
        model.blocks[0].mlp.up.weight.grad.zero_()
        tg.add_weight_bits(model, 1.0)
        weight -= 30.0 * model.blocks[0].mlp.up.weight.grad
    assert coded(weight) < before - 0.05


def test_the_spectral_start(corpus):
    """Singular vectors of the pair counts, of the configured size, the same again; likely pairs are alike."""
    cfg = config(embed_init="spectral", vocab_size=320, **corpus.knobs())
    trainer, again = trainer_of(cfg), trainer_of(cfg)
    E = trainer.model.embed.detach()
    assert torch.equal(E, again.model.embed) and torch.equal(E, trainer.ema.averages[0]["embed"])
    assert float(E.square().mean().sqrt()) == pytest.approx(cfg.tied_embed_init_std, rel=0.1)
    rows = trainer.stream.batch(0, trainer.stream.total).long()
    C = torch.zeros(320, 320).index_put_((rows[:, :-1].flatten(), rows[:, 1:].flatten()), torch.tensor(1.0), True)
    common = C.sum(1).topk(30).indices
    M = C.log1p()[common]
    similar = torch.nn.functional.cosine_similarity(M[:, None] - M.mean(0), (M - M.mean(0))[None], dim=-1)
    close = torch.nn.functional.cosine_similarity(E[common][:, None], E[common][None], dim=-1)
    off = ~torch.eye(30, dtype=torch.bool)
    assert np.corrcoef(similar[off], close[off])[0, 1] > 0.5


CACHED = {"record": {}, "recur": dict(recur_layers="0,1,1", skip_over="visits"), "lanes": dict(parallel_start_layer=1),
          "carries": dict(use_gradient_memory=True, use_td_recurrence=True, use_adaptive_depth=True),
          "bigram": dict(bigram_vocab_size=97, bigram_dim=8, **DOCS)}  # fmt: skip


@pytest.mark.parametrize("name", [*CACHED, "state", "linear"])
def test_text_grows_as_the_whole_model_reads_it(name):
    """The stream of the last token, by cached keys and values or anew, is that of the whole text."""
    cfg = config(**(CACHED | ALONE)[name])
    model, ids = tiny_model(cfg), random_ids(cfg, 3, 9)
    ids[:, 3] = 7  # generated text is one document
    assert tg.by_token(cfg) == (name in CACHED)
    own = [block.attn.attend for block in model.blocks]
    with torch.no_grad():
        whole = model.hidden(ids, True)
        with tg.growing(model, 9, True) as last_of:
            grown = torch.cat([last_of(ids[:, : t + 1]) for t in range(9)], 1)
    torch.testing.assert_close(grown, whole, rtol=1e-4, atol=1e-4)
    assert own == [block.attn.attend for block in model.blocks]


def test_self_generated_text():
    """As many and as long as asked, one document each, the model's own distribution, whatever the ranks."""
    cfg = config(gptq_calibration="self")
    model, rows = tiny_model(cfg), torch.zeros(64, 6, dtype=torch.int32)
    text = tg.CALIBRATIONS["self"](single(cfg), model, rows, True)
    assert text.shape == rows.shape and text.dtype == torch.int32
    assert (text[:, 0] == tg.BOS).all() and not (text[:, 1:] == tg.BOS).any() and int(text.max()) < cfg.vocab_size
    parts = [tg.self_generated(OneOf(cfg, rank, 3), model, rows, True) for rank in range(3)]
    assert torch.equal(sum(parts), text)
    many = tg.self_generated(single(cfg), model, torch.zeros(4000, 2, dtype=torch.int32), True)[:, 1]
    p = logits(model, torch.full((1, 1), tg.BOS))[0, 0].softmax(-1)
    p[tg.BOS] = 0
    seen = torch.bincount(many.long(), minlength=cfg.vocab_size) / 4000
    assert (seen - p / p.sum()).abs().max() < 0.03


def test_self_calibration_exports(corpus, tmp_path):
    """An export with its own text has a Hessian of every matrix and table, rows' sums that follow the tokens'
    frequencies, and says what the text took."""
    cfg = config(gptq_calibration="self", gptq_calibration_batches=1, gptq_rows=8, **corpus.knobs())
    trainer, result = trainer_of(cfg, tmp_path), {}
    for step in range(3):  # gradients of a head that is zero are
        trainer.train_step(trainer.stream.batch(4 * step, 4), 0.1)
    rows = tg.calibration_rows(trainer)
    learned = tg.calibrate(trainer.run, trainer.model, trainer.model.state_dict(), rows, True, result)
    hessians, fisher, outputs = {**learned[0], **learned[3]}, *learned[1:3]
    assert set(fisher) == set(hessians) and result["calibration_text_seconds"] > 0
    assert set(hessians) - set(outputs) == {"head.weight", "embed", "values.table"}
    assert float(fisher["embed"].min()) > 0  # also of tokens that no text has


def test_flops_of_linear_attention():
    """It costs as much as softmax attention over 2 (C + K) tokens, whatever the length."""
    cfg = config(num_loops=0, linear_layers="1", train_seq_len=512, train_batch_tokens=512)
    less = tg.flops_per_token(replace(cfg, linear_layers=""), False) - tg.flops_per_token(cfg, False)
    assert less == 6 * 64 * (512 - 2 * (64 + 16))


# ---- the presets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset,count", [("pr1435", 32_663_691), ("pr298", 12_814_109)])
def test_census(preset, count):
    """Parameters of the two systems (the seeds had 32,665,181 and 12,836,767)."""
    cfg, _ = tg.read_config({"PRESET": preset})
    assert sum(p.numel() for p in tg.meta_model(cfg).parameters()) == count


@pytest.mark.parametrize("preset", ["pr1435", "pr298"])
def test_presets_train_and_pack(preset, corpus):
    """Steps through the loop switch lower the loss; what is packed comes back."""
    cfg = tiny(preset, **corpus.knobs())
    trainer = trainer_of(cfg)
    losses = run_steps(trainer, 6, 6)
    assert losses[-1] < losses[0] - 0.1
    hessians = tg.collect_hessians(trainer.run, trainer.model, tg.calibration_rows(trainer), True)
    artifact = tg.unpack(tg.pack(cfg, tg.quantize(cfg, trainer.model.state_dict(), hessians), True))
    again, _ = tg.read_config({}, base=artifact.config)
    assert tg.schedule(again, True) == tg.schedule(cfg, True)
    model = tg.build_model(again, single(cfg))
    model.load_state_dict(artifact.state())
    score, _ = tg.score_plain(single(cfg), model, random_validation(cfg, 100), True, 600.0)
    assert math.isfinite(score.val_loss)


# ---- knobs that sleep -----------------------------------------------------------------------------------------------

BARE = dict(num_loops=0, ve_layers="")  # of record: what every row of IDLE but one needs is off
SLEEPING = {name: field for name, field in tg.knobs().items()
            if any(name.startswith(starts) for starts, *_ in tg.IDLE if starts != ("RECUR_LAYERS",))}  # fmt: skip


def another(field) -> Any:
    """A value of a knob that is not its default; None where only a name would do."""
    if field.metadata["choices"]:
        return next(value for value in field.metadata["choices"] if value != field.default)
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, int | float):
        most, kind = field.metadata["hi"], type(field.default)
        double = 2 * field.default or (16 if kind is int else 0.01)
        return max(0, double) if most is None or double <= most else kind(field.default / 2)
    return None


@pytest.fixture(scope="module")
def asleep(corpus) -> list[float]:
    return run_steps(trainer_of(tiny("record", **BARE, **corpus.knobs())), 3, 3)


@pytest.mark.parametrize("name", SLEEPING)
def test_a_knob_told_as_idle_changes_nothing(name, asleep, corpus):
    """Where read_config says that a variable has no effect, three steps are bit for bit those without it."""
    value = another(SLEEPING[name])
    if value is None:
        pytest.skip("its other values are names")
    env = tiny_env("record", **BARE, **corpus.knobs(), **{name.lower(): value})
    cfg, warnings = tg.read_config(env)
    if any(line.startswith(f"{name}=") for line in warnings):
        assert run_steps(trainer_of(cfg), 3, 3) == asleep
    else:
        assert name in ("BIGRAM_VOCAB_SIZE", "DEQ_LAYER"), "one that wakes its mechanism"

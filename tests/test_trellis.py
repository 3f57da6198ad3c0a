"""Trellis-coded quantization: the state machine, the search, the error that it saves, the codec and its limits."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import available_compressors, round_to_nearest, tg, tiny

TRELLISES = [states for states in tg.TRELLISES if states > 1]
every_machine = pytest.mark.parametrize("states", list(tg.TRELLISES))
every_trellis = pytest.mark.parametrize("states", TRELLISES)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, samples: int = 2000) -> torch.Tensor:
    """A Hessian [1, c, c] of inputs that share a few strong directions."""
    x = noise(samples, columns) * 0.3 + noise(samples, 4, seed=1) @ noise(4, columns, seed=2)
    return (x.T @ x / samples)[None]


def slow_values(q: torch.Tensor, states: int) -> torch.Tensor:
    """The reference: one integer after another, as the codes are drawn in textbooks."""
    output, parity = {1: (0, 0), 4: (0b10, 0b01), 8: (0b101, 0b010), 16: (0b1001, 0b0010)}[states]
    values = torch.zeros(q.shape)
    for r, row in enumerate(q.tolist()):
        state = 0
        for c, k in enumerate(row):
            values[r, c] = k + 0.5 if state % 2 else k
            state = (state >> 1) ^ (output if state % 2 else 0) ^ (parity if k % 2 else 0)
    return values


def bits_of(q: torch.Tensor, states: int) -> float:
    """Entropy an integer, given which of the two quantizers it belongs to."""
    half, total = tg.half_steps(q, states), 0.0
    for kind in (0, 1):
        counts = torch.unique(q[half == kind], return_counts=True)[1].double()
        total -= float((counts * (counts / counts.sum()).log2()).sum())
    return total / q.numel()


def searched(W: torch.Tensor, step: float, states: int, **options) -> tuple[torch.Tensor, float]:
    """(integers, mean squared error) of a matrix without a Hessian."""
    steps = torch.full((1, len(W)), step, dtype=W.dtype), torch.ones(1, W.shape[1], dtype=W.dtype)
    q = tg.gptq(W[None], tg.independent(W[None]), *steps, states, **options)[0]
    return q, float((W - step * (q + tg.half_steps(q, states) / 2)).square().mean())


# ---- the machine ----------------------------------------------------------------------------------------------------


@every_trellis
def test_the_machine_is_a_trellis(states):
    """Both parities lead to different states, each state has two ways in, and every state can be reached."""
    ends = tg.machine(states).reshape(states, 2)
    assert (ends[:, 0] != ends[:, 1]).all()
    assert np.bincount(ends.ravel(), minlength=states).tolist() == [2] * states
    seen = {0}
    for _ in range(states):
        seen |= {int(end) for state in seen for end in ends[state]}
    assert seen == set(range(states))


@every_trellis
def test_lattices_that_part_stay_apart(states):
    """The code's free distance, in squared steps: paths that part and meet again differ by so much at least. A scalar
    quantizer of the same density has 1/4."""
    found = {4: 9 / 4, 8: 10 / 4, 16: 11 / 4}[states]
    ends = tg.machine(states).reshape(states, 2).tolist()
    best, shortest = {}, math.inf
    paths = [((ends[s][0], ends[s][1]), 1.0) for s in range(states)]  # integers differ in parity: one step apart
    while paths:
        (a, b), cost = paths.pop()
        if cost >= min(best.get((a, b), math.inf), shortest):
            continue
        best[a, b] = cost
        if a == b:
            shortest = cost
            continue
        for i, j in itertools.product((0, 1), repeat=2):
            apart = 1 / 4 if a % 2 != b % 2 else float(i != j)
            paths.append(((ends[a][i], ends[b][j]), cost + apart))
    assert shortest == found


@every_machine
def test_half_steps_are_those_of_the_machine(states):
    """The formula without a loop gives what the state machine gives, for all widths."""
    for columns in (1, 2, 3, 14, 15, 16, 31, 257, 600):
        q = (3 * noise(5, columns, seed=columns)).round().to(torch.int16)
        value = tg.Quantized(q, torch.zeros(5).to(torch.int8), torch.zeros(columns).to(torch.int8), states)
        assert torch.equal(value.values(), slow_values(q, states))


# ---- the search -----------------------------------------------------------------------------------------------------


@every_machine
def test_the_search_finds_the_best_path(states):
    """No other integers come nearer: tried for all of six columns."""
    W = 2 * noise(6, 6).double()
    q, error = searched(W, 1.0, states)
    offsets = torch.tensor(list(itertools.product((-1, 0, 1), repeat=6)))
    for row, found in zip(W, q, strict=True):
        tried = (row.floor() + offsets).to(torch.int16)
        values = tried + tg.half_steps(tried, states) / 2
        assert float((row - values).square().sum(1).min()) == pytest.approx(
            float((row - found - tg.half_steps(found[None], states)[0] / 2).square().sum())
        )


def test_one_state_rounds():
    """Without a trellis and without a Hessian: round to nearest."""
    W = noise(8, 100)
    q, _ = searched(W, 0.3, 1)
    assert torch.equal(q[None], round_to_nearest(W[None], torch.full((1, 8), 0.3), torch.ones(1, 100)))


def test_more_states_come_closer():
    """On a Gaussian source: less error at the same step, and against the scalar quantizer of the same entropy
    0.85 dB less with 4 states, 0.95 with 8 (1.53 are possible)."""
    W, errors, gaps = noise(400, 256), [], []
    for states in tg.TRELLISES:
        q, error = searched(W, 0.4, states)
        errors.append(error)
        gaps.append(10 * math.log10(error * 4 ** bits_of(q, states)))  # over the rate-distortion bound
    assert errors == sorted(errors, reverse=True)
    assert gaps[0] == pytest.approx(1.59, abs=0.05)
    assert gaps[0] - gaps[1] > 0.85 and gaps[0] - gaps[2] > 0.95 and gaps[2] < 0.65


def test_late_decisions_cost_little():
    """Settling 32 columns behind the search is within 0.06 dB of settling at the end."""
    W = noise(100, 256)
    late, whole = (searched(W, 0.4, 8, blocksize=size)[1] for size in (32, 256))
    assert whole <= late < 1.014 * whole


@pytest.mark.parametrize("over", [0.2, 1.0])
def test_feedback_and_trellis_add_up(over):
    """With a Hessian, at no more bytes than the scalar quantizer takes, the weighted error is lower by a tenth at
    least, whichever the rate; and far below that of a trellis without feedback."""
    W, H = noise(1, 256, 128), correlated(128)
    known, row, col = tg.factor(H, 0.01, sort=False), torch.full((1, 256), over), torch.ones(1, 128)
    found = {}
    for name, states, factors, coarse in (("scalar", 1, known, 1.0), ("ours", 8, known, 1.01),
                                          ("blind", 8, tg.independent(W), 1.0)):  # fmt: skip
        q = tg.gptq(W, factors, coarse * row, col, states)[0]
        error = W[0] - (q + tg.half_steps(q, states) / 2) * coarse * over
        value = tg.Quantized(q, torch.zeros(256).to(torch.int8), torch.zeros(128).to(torch.int8), states)
        found[name] = sum(tg.code_bytes({"a": value}).values()), float(((error @ H[0]) * error).sum())
    assert found["ours"][0] <= 1.001 * found["scalar"][0]
    assert found["ours"][1] < 0.9 * found["scalar"][1] and found["ours"][1] < 0.6 * found["blind"][1]


@every_trellis
def test_narrow_and_odd_shapes(states):
    """One column, one row, a zero matrix, huge weights: in range, finite, and zero stays zero."""
    for shape in ((1, 1), (5, 1), (1, 7), (3, 65)):
        q, error = searched(noise(*shape), 0.5, states)
        assert q.shape == shape and error < 0.25
    assert not searched(torch.zeros(4, 9), 0.5, states)[0].any()
    q, _ = searched(1e9 * noise(4, 40), 0.5, states)
    assert int(q.abs().max()) <= tg.TOP


# ---- the codec ------------------------------------------------------------------------------------------------------


def stored_mix() -> dict:
    """Matrices of every codec, some of one width, with integers at the edges of a byte; and half-precision numbers."""
    stored = {}
    for i, (states, columns) in enumerate(itertools.product(tg.TRELLISES, (40, 7))):
        for rows in (30, 1):
            q = (20 * noise(rows, columns, seed=i)).round().to(torch.int16)
            q[0, :5] = torch.tensor([127, -127, 128, -128, tg.TOP], dtype=torch.int16)
            row = torch.arange(rows, dtype=torch.int8)
            stored[f"{states}.{columns}.{rows}"] = tg.Quantized(q, row, torch.zeros(columns, dtype=torch.int8), states)
    return stored | {"half": noise(3, 5).half()}


@pytest.mark.parametrize("name", available_compressors())
def test_what_is_packed_comes_back(name):
    """Integers, exponents, states and weights are bit-identical, for every codec and coder in one file."""
    stored = stored_mix()
    back = tg.unpack(tg.pack(tiny("record", compressor=name), stored, True)).stored
    assert list(back) == list(stored)
    for key, value in stored.items():
        if isinstance(value, tg.Quantized):
            assert back[key].states == value.states
            for one, other in zip(back[key][:3], value[:3], strict=True):
                assert torch.equal(one, other) and one.dtype == other.dtype
            assert torch.equal(back[key].dense(), value.dense())
        else:
            assert torch.equal(back[key], value)


def test_the_state_is_a_context():
    """The file is within 1 % of the entropy given the quantizer, and below what it would take not to know it."""
    q, _ = searched(noise(600, 256), 1.2, 8)
    value = tg.Quantized(q, torch.zeros(600).to(torch.int8), torch.zeros(256).to(torch.int8), 8)
    ideal, packed = bits_of(q, 8) * q.numel() / 8, len(tg.pack(tiny("record"), {"a": value}, True))
    assert packed < 1.01 * ideal + 3000 and ideal < 0.975 * bits_of(q, 1) * q.numel() / 8
    assert sum(tg.code_bytes({"a": value}).values()) == pytest.approx(ideal, rel=0.02)


@every_machine
def test_the_knob_says_how_matrices_are_stored(states):
    """TRELLIS_STATES reaches every matrix, adapters included, and an act-order is kept only without a trellis."""
    cfg = tiny("seed_lora", trellis_states=states)
    names = ("blocks.0.attn.q.lora_A", "blocks.0.attn.q.lora_B", "embed")
    state = {name: noise(24, 16) if name != names[1] else noise(32, 24) for name in names}
    stored = tg.quantize(cfg, state, {names[0]: correlated(16)[0]})
    assert {value.states for value in stored.values()} == {states}
    stacks = tg.Quantizer(cfg, state, {"embed": correlated(16)[0]}, {}).stacks
    ((order, _),) = [stack.known for stack in stacks if stack.names == ["embed"]]
    assert (order[0].tolist() == list(range(16))) == (states > 1)


@pytest.mark.parametrize("magic", [b"PGOLF001", b"PGOLF002", b"PGOLF004"])
def test_another_version_is_refused(magic):
    """A file of another version says so."""
    blob = tg.pack(tiny("record"), stored_mix(), True)
    with pytest.raises(tg.UserError, match="another version"):
        tg.unpack(magic + blob[8:])


def test_a_search_that_fails_is_told(monkeypatch):
    """The kernel is tried before it is used: what it raises, or loses, is said, and the plain search goes on."""
    device, plain = torch.device("cpu"), tg.gptq
    tg.search_trouble.cache_clear()
    assert "Error" in tg.search_trouble(8, device)  # no kernel runs here
    for states, trouble in ((8, False), (1, True)):
        tg.search_trouble.cache_clear()
        monkeypatch.setattr(tg, "gptq", lambda *parts, fused, own=states: plain(*parts[:4], own if fused else 8))
        assert ("it loses" in tg.search_trouble(8, device)) is trouble
    tg.search_trouble.cache_clear()


@pytest.mark.parametrize(
    "changes, device, trouble, used",
    [
        ({}, "cuda", "", True),
        (dict(model_dim=96, num_heads=2), "cuda", "", True),  # heads of 48: no fused operations, but this kernel
        ({}, "cuda", "slow", False),
        ({}, "cpu", "", False),
        (dict(trellis_states=1), "cuda", "", False),
        (dict(fused="0"), "cuda", "", False),
    ],
)
def test_where_the_kernel_searches(monkeypatch, changes, device, trouble, used):
    """Wherever there is a trellis and Triton, whatever the shapes, unless it was tried and failed or FUSED=0."""
    monkeypatch.setattr(tg, "triton", tg)
    monkeypatch.setattr(tg, "search_trouble", lambda *_: trouble)
    assert tg.fused_search(tiny("record", **changes), torch.device(device)) is used

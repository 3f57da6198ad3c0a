"""Maps made from seeds: pinned bits, exact orthogonality, the two ways to apply a basis, what is stored, factors."""

import hashlib
import json
import lzma
import math
import struct

import numpy as np
import pytest
import torch
from conftest import random_ids, replace, round_to_nearest, single, tg, tiny, tiny_model, trainer_of

BASES = list(tg.BASES)
ORTHOGONAL = [(64, 64), (32, 64), (64, 32), (48, 96), (96, 48), (20, 40), (80, 20), (1, 7)]
SHAPES = [(16, 16), (8, 24), (40, 100), (100, 40), (33, 7), (7, 33), (1, 1)]


def made(kind: str, fan_out: int, fan_in: int, name: str = "blocks.0.attn.q", seed: int = 0, turn: int = 0):
    return tg.BASES[kind](tg.bits_of(seed, name, turn), fan_out, fan_in)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bits as the buffer holds them."""
    return hashlib.sha256(tensor.bfloat16().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()


PINNED = {
    ("hadamard", 64, 64): "36670f86053810e8528bf9f52feafd8af49fe8480fd44880f1ab203e423549de",
    ("hadamard", 96, 40): "e14de5c263b26d80c09a21346474ebce078a44ecbd2b2da941912342a581be95",
    ("rademacher", 64, 64): "f940dbec2240b91bb2d04ec9d60397c82ffade5f27190a99c146555d457d3848",
    ("rademacher", 96, 40): "93c65f6008e0438bb18cd78dc5e4969b246e7f6c06511048d02329c5737b97e8",
    ("gaussian", 64, 64): "bfe4ee4fbd0e00a8266d4b625800056db67ad9747d950eaa890ced038e7d6b68",
    ("gaussian", 96, 40): "7eb87e961384705f297055dd1edd200fdd8a15854a2f99b60fec23d072a2807f",
    ("fastfood", 64, 64): "e013fae172a71506d66508377cac15575b8222d58269b5299e726d493a47e33d",
    ("fastfood", 96, 40): "b8df38a49ac4f55cfe4dad63d02e40b03525c5e0fac41054a4a81345ddd39731",
}


@pytest.mark.parametrize(("kind", "fan_out", "fan_in"), PINNED)
def test_bits_are_pinned(kind, fan_out, fan_in):
    """The same bits on every machine and version, for ever: an artifact holds nothing else of a basis."""
    assert digest(made(kind, fan_out, fan_in).dense()) == PINNED[kind, fan_out, fan_in]


def test_raw_bits_are_pinned():
    """Philox itself, the signs and the integer normals made of it."""
    assert [hex(int(word)) for word in tg.bits_of(0, "blocks.0.attn.q", 0).random_raw(2)] == RAW
    assert tg.random_signs(tg.bits_of(0, "a", 0), 12).tolist() == SIGNS
    assert tg.random_normals(tg.bits_of(0, "a", 0), 8).tolist() == NORMALS
    words = tg.bits_of(0, "a", 0).random_raw(1000)
    assert tg.random_normals(tg.bits_of(0, "a", 0), 1000).tolist() == [int(w).bit_count() - 32 for w in words]


RAW = ["0xd0cb38c0f3c1a98", "0x899ff09003ece5db"]
SIGNS = [-1, 1, -1, -1, 1, -1, 1, -1, -1, 1, -1, -1]
NORMALS = [2, 13, 0, 2, 2, -1, 5, -2]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(("fan_out", "fan_in"), SHAPES)
def test_every_shape(kind, fan_out, fan_in):
    """Any rectangle: dense and transform are the same map, entries have the size that is told."""
    basis = made(kind, fan_out, fan_in)
    dense = basis.dense()
    assert dense.shape == (fan_out, fan_in) and dense.dtype == torch.float32
    assert dense.numel() == 1 or dense.square().mean().sqrt() == pytest.approx(basis.size, rel=0.25)
    x = torch.randn(5, fan_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(basis.apply(x), x @ dense.double().T, rtol=1e-5, atol=1e-5 * basis.size)
    half = basis.apply(x.float().bfloat16()).double()
    assert (half - x @ dense.double().T).norm() <= 0.03 * (x @ dense.double().T).norm() + 1e-9


@pytest.mark.parametrize("order", [1, 2, 12, 20, 24, 40, 64, 80, 96])
def test_hadamard_matrices(order):
    """Entries +-1 and H H^T = n I, in integers; the fast transform is the matrix."""
    assert tg.hadamard_order(order) == order
    core = tg.paley(next(m for m in tg.CORES if order % m == 0 and (order // m) & (order // m - 1) == 0))
    H = tg.hadamard(torch.eye(order, dtype=torch.float64), core).T
    assert (H.abs() == 1).all()
    assert torch.equal(H @ H.T, order * torch.eye(order, dtype=torch.float64))


def test_hadamard_orders():
    assert [tg.hadamard_order(n) for n in (3, 5, 12, 13, 33, 320, 448, 513, 640, 768)] == [
        4, 8, 12, 16, 40, 320, 512, 640, 640, 768
    ]  # fmt: skip


@pytest.mark.parametrize(("fan_out", "fan_in"), ORTHOGONAL)
def test_orthogonal_in_integers(fan_out, fan_in):
    """The short side's vectors have products of exactly zero, and one length, before anything is scaled."""
    basis = made("hadamard", fan_out, fan_in)
    exact = basis.dense().to(torch.int64)
    assert torch.equal(exact.float(), basis.dense())
    short = exact if fan_out <= fan_in else exact.T
    wanted = max(fan_out, fan_in) * int(basis.size) ** 2
    if max(short.shape) % min(short.shape) == 0 and tg.hadamard_order(min(short.shape)) == min(short.shape):
        assert torch.equal(short @ short.T, wanted * torch.eye(len(short), dtype=torch.int64))


def test_fp32_sums_are_exact():
    """Integers in fp32 give what integers in fp64 give, at the largest order of a real model (law 8)."""
    for kind in ("hadamard", "fastfood"):
        blocks = made(kind, 2048, 2048).blocks[0]
        steps = [step for step in blocks if not (step[0] == "diagonal" and step[1].abs().max() < 0.5)]
        rows = torch.eye(2048)[:3]
        assert torch.equal(tg.run_steps(steps, rows, True).double(), tg.run_steps(steps, rows.double(), True))


def test_bases_are_keyed_by_name():
    """Another name, seed or visit is another basis; the size of a neighbour changes nothing."""
    first = made("rademacher", 8, 64)
    for other in (dict(name="blocks.1.attn.q"), dict(seed=1), dict(turn=1)):
        again = made("rademacher", 8, 64, **other).dense()
        assert 0.3 < (again == first.dense()).float().mean() < 0.7
    assert torch.equal(made("rademacher", 8, 64).dense(), first.dense())


def bases_of(model: tg.GPT) -> dict[str, torch.Tensor]:
    return {name: m.base for name, m in model.named_modules() if isinstance(m, tg.SeededLinear)}


def test_adding_a_layer_reshuffles_nothing():
    """Layers 0-5 have the same bases in a model of eight layers, on whatever seed the weights start."""
    small = bases_of(tg.build_model(tiny("seed_lora"), single(tiny("seed_lora"))))
    cfg = tiny("seed_lora", num_layers=8, seed=99)
    large = bases_of(tg.build_model(cfg, single(cfg)))
    assert len(small) == 36 and len(large) == 48
    assert all(torch.equal(small[name], large[name]) for name in small)
    other = bases_of(tg.build_model(replace(cfg, basis_seed=1), single(cfg)))
    assert not any(torch.equal(large[name], other[name]) for name in large)


def test_every_visit_has_its_own():
    """SEED_PER_VISIT: six bases of the shared layer, no two alike, and the visit decides which one is used."""
    cfg = tiny("pr2114", num_layers=3, loop_start=1, loop_end=1, num_loops=5)
    model = tg.build_model(cfg, single(cfg))
    assert [len(base) for base in bases_of(model).values()] == [1] * 6 + [6] * 6 + [1] * 6
    q = model.blocks[1].attn.q
    with torch.no_grad():
        seen = []
        for turn in range(6):
            model.blocks[1].turn_to(turn)
            seen.append(q.matrix(torch.float32))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert [visit.turn for visit in tg.schedule(cfg, True)] == [0, 0, 1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("values", [{}, dict(seed_maps="up,v"), dict(seed_maps="attn", seed_layers="0,3")])
def test_the_table_says_which_maps(values):
    """SEED_MAPS and SEED_LAYERS choose; ranks come from LORA_RANK_ATTN and LORA_RANK_MLP."""
    cfg = tiny("seed_lora", **values)
    model = tg.build_model(cfg, single(cfg))
    layers = tg.listed(cfg.seed_layers) or [str(layer) for layer in range(6)]
    wanted = {name for name, _ in model.named_modules() if name.split(".")[-1] in tg.seeded_maps(cfg)}
    seeded = {name: m for name, m in model.named_modules() if isinstance(m, tg.SeededLinear)}
    assert set(seeded) == {name for name in wanted if name.split(".")[1] in layers} and seeded
    for name, m in seeded.items():
        assert len(m.lora_A) == m.lora_B.shape[1] == (8 if ".attn." in name else 4)


@pytest.mark.parametrize("kind", BASES)
def test_a_map_starts_like_a_dense_one(kind):
    """At the start an inner map has the Frobenius norm of an orthogonal one, an output map is zero."""
    how = tg.Seeding(kind, 0, 4, 0.0, 1, True)
    for fan_out, fan_in in ((64, 64), (32, 64), (128, 64)):
        with torch.no_grad():
            inner = tg.linear("n", fan_in, fan_out, "orthogonal", "seeded", how).matrix(torch.float32)
            outer = tg.linear("n", fan_in, fan_out, "zero", "seeded", how).matrix(torch.float32)
        assert inner.norm() == pytest.approx(min(fan_in, fan_out) ** 0.5, rel=0.05)
        assert not outer.any()
        if kind == "hadamard":
            torch.testing.assert_close(torch.linalg.svdvals(inner), torch.ones(min(fan_in, fan_out)), rtol=0.02, atol=0)


def test_a_product_step_is_a_dense_step():
    """The first Muon step moves the product B A as far, in the spectral norm, as it moves a dense matrix."""
    sizes = {}
    for maps in ("none", "all"):
        small = dict(num_layers=2, num_loops=0, seed_maps=maps)
        cfg = tiny("seed_lora", **small, matrix_lr=0.02, lora_a_lr=0.02, lora_b_lr=0.02, muon_wd=0, lora_wd=0)
        model = tiny_model(cfg)
        for m in model.modules():
            if isinstance(m, tg.SeededLinear):
                torch.nn.init.orthogonal_(m.lora_A.data)
                m.lora_B.data.zero_()
        optimizers = tg.Optimizers(model, single(cfg))
        chosen = [m for m in model.modules() if isinstance(m, tg.LinearMap)]
        with torch.no_grad():
            before = [m.matrix(torch.float32).clone() for m in chosen]
        model(random_ids(cfg, 2, 32), random_ids(cfg, 2, 32), True).sum().backward()
        for bank in optimizers.banks:
            with torch.no_grad():
                update = tg.muon_update(bank.reduce().wait(), bank.momentum, 0.0, False, optimizers.orthogonalize)
                for param, u in zip(bank.params, update, strict=True):
                    param.sub_(bank.lr * u)
        with torch.no_grad():
            moved = [m.matrix(torch.float32) - b for m, b in zip(chosen, before, strict=True)]
        sizes[maps] = [float(torch.linalg.matrix_norm(m, 2)) for m in moved]
    ratio = np.array(sizes["all"]) / np.array(sizes["none"])
    assert ((0.5 < ratio) & (ratio < 1.6)).all() and 0.8 < ratio.mean() < 1.2  # Newton-Schulz stops within 0.6 to 1.3


def header_of(blob: bytes) -> dict:
    (size,) = struct.unpack("<I", blob[8:12])
    return json.loads(lzma.decompress(blob[44 : 44 + size]))


SEED_KNOBS = ("seed_maps", "seed_layers", "seed_basis", "seed_scale", "seed_per_visit", "basis_seed", "lora_rank_attn",
              "lora_rank_mlp", "adapter_rank", "lora_alpha")  # fmt: skip


@pytest.mark.parametrize("preset", ["seed_lora", "pr2114"])
def test_the_artifact_stores_no_basis(preset):
    """Only adapters, scales and the other parameters are in the file; the seeds cost less than 176 bytes."""
    cfg = tiny(preset, basis_seed=123456789)
    model = tiny_model(cfg)
    stored = tg.quantize(cfg, model.state_dict(), {})
    blob = tg.pack(cfg, stored, cfg.loops)
    header = header_of(blob)
    assert {name for name, *_ in header["tensors"]} == {name for name, _ in model.named_parameters()}
    assert sum(math.prod(shape) for _, shape, _ in header["tensors"]) == sum(p.numel() for p in model.parameters())
    assert len(blob) < 44 + 4096 + sum(header["counts"])
    less = {**header, "config": {key: value for key, value in header["config"].items() if key not in SEED_KNOBS}}
    cost = [len(lzma.compress(json.dumps(h, separators=(",", ":")).encode(), format=lzma.FORMAT_ALONE))
            for h in (header, less)]  # fmt: skip
    assert header["config"]["basis_seed"] == 123456789 and cost[0] - cost[1] <= 176


@pytest.mark.parametrize(("preset", "visits"), [("seed_lora", 1), ("pr2114", 4)])
def test_stored_against_effective(preset, visits):
    """Counted from the file: what is stored, and the weights that it stands for, a matrix for each basis."""
    cfg = tiny(preset)
    artifact = tg.unpack(tg.pack(cfg, tg.quantize(cfg, tiny_model(cfg).state_dict(), {}), cfg.loops))
    sizes, model = artifact.sizes(), tg.build_model(tg.read_config({}, base=artifact.config)[0], single(cfg))
    assert sizes == {name: param.numel() for name, param in model.named_parameters()}
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 128 * 64  # q and proj, k and v, up and down
    others = sum(size for name, size in sizes.items() if not name.split(".")[-1].startswith(("lora_", "basis_")))
    assert tg.effective_weights(model, sizes) == others + layer * (4 + 2 * visits)
    assert sum(sizes.values()) < others + layer * 6


def exact(m: tg.SeededLinear, turn: int, backwards: bool = False) -> torch.Tensor:
    """The map in fp64."""
    A, B = m.lora_A.double(), m.lora_B.double()
    BA = B.flip(1) @ A.flip(0) if backwards else B @ A
    return m.scaling * BA + m.unit * m.basis_scale[turn].double() * m.base[turn].double()


@pytest.mark.parametrize("preset", ["seed_lora", "pr2114"])
def test_the_unpacked_model_is_the_packed_one(preset, corpus):
    """Weights rebuilt from the file are bit-identical, in every type; the order of the sums does not matter to fp64."""
    cfg = tiny(preset, basis_seed=7, **corpus.knobs())
    trainer = trainer_of(cfg)
    trainer.train_step(trainer.stream.batch(0, 4), 0.5)
    stored = tg.quantize(cfg, trainer.model.state_dict(), {})
    artifact = tg.unpack(tg.pack(cfg, stored, cfg.loops))
    again, _ = tg.read_config({}, base=artifact.config)
    trainer.model.load_state_dict(tg.Artifact({}, False, stored).state())
    rebuilt = tg.GPT(again, torch.device("cpu"), torch.float32)
    rebuilt.load_state_dict(artifact.state())
    assert again.basis_seed == 7
    for first, second in zip(trainer.model.modules(), rebuilt.modules(), strict=True):
        if isinstance(first, tg.SeededLinear):
            for turn in range(len(first.base)):
                first.turn = second.turn = torch.tensor([turn])
                for dtype in (torch.float32, torch.bfloat16):
                    assert torch.equal(first.matrix(dtype), second.matrix(dtype))
                torch.testing.assert_close(exact(first, turn), exact(second, turn, backwards=True), rtol=0, atol=1e-15)
    ids = random_ids(cfg, 2, 24)
    assert torch.equal(trainer.model.logits(ids, True), rebuilt.logits(ids, True))


# ---- factors --------------------------------------------------------------------------------------------------------


def factors(rank: int = 12, fan_in: int = 96, fan_out: int = 80) -> tuple[torch.Tensor, ...]:
    """Trained-looking factors: A and B of uneven directions that are not aligned, and correlated inputs."""
    noise = torch.Generator().manual_seed(5)
    mix = torch.randn(fan_in, fan_in, generator=noise) * torch.logspace(0, -1.5, fan_in)
    x = torch.randn(4000, fan_in, generator=noise) @ mix.T
    A = torch.randn(1, rank, fan_in, generator=noise)
    B = torch.randn(1, fan_out, rank, generator=noise) * torch.logspace(0, -1.3, rank)
    turn = torch.randn(1, rank, rank, generator=noise)
    return turn @ A, B @ torch.linalg.inv(turn), tg.damp((x.T @ x / len(x))[None], 0.01)


NAMES = ("blocks.0.attn.q.lora_A", "blocks.0.attn.q.lora_B")


def stored_factors(A, B, H, coarse: float, outer: torch.Tensor | None = None) -> list[tg.Quantized]:
    """Both factors as the exporter stores them."""
    cfg = tiny("seed_lora")
    state = dict(zip(NAMES, (A[0], B[0]), strict=True))
    known = {} if outer is None else {NAMES[0]: torch.ones(A.shape[1]), NAMES[1]: outer}
    stored = tg.Quantizer(cfg, state, {NAMES[0]: H[0]}, known).at(coarse)
    return [stored[name] for name in NAMES]


def distortion(A, B, stored, H, gain=1.0) -> float:
    """tr(G E H E^T) of the product's error E, G the weights of its rows."""
    inner, outer = (part.dense() for part in stored)
    E = (B @ A)[0] - outer @ inner
    return float((gain * ((E @ H[0]) * E).sum(-1)).sum())


def bits(stored) -> float:
    return sum(entropy(part.q) for part in stored)


def entropy(q: torch.Tensor) -> float:
    """Bits of integers whose rows and columns each have a scale that the coder knows."""
    power = q.double().square() + 1e-3
    rows, cols = power.mean(1, keepdim=True), power.mean(0, keepdim=True) / power.mean()
    return float((1 + 2 * math.pi * math.e * rows * cols).log2().sum() / 2)


def plain_factors(A, B, ratio: float) -> list[tg.Quantized]:
    """Round to nearest with a step for each row, as the seed did."""
    found = []
    for W in (A, B):
        row, col = tg.on_grid((ratio * W.std(-1)).log2()), torch.zeros_like(W[:, 0]).to(torch.int8)
        q = round_to_nearest(W, tg.powers(row), tg.powers(col))
        found.append(tg.Quantized(q[0], row[0], col[0]))
    return found


def test_rotation_keeps_the_product():
    """B' A' = B A; A' is orthonormal in the inputs' metric, B' has orthogonal columns, by falling size."""
    A, B, H = factors()
    a, b = tg.rotate_factors(A, B, H)
    torch.testing.assert_close(b @ a, B @ A, rtol=1e-3, atol=1e-3)
    gram, columns = (a @ H @ a.mT)[0], (b.mT @ b)[0]
    torch.testing.assert_close(gram / gram.diagonal().mean(), torch.eye(12), rtol=0, atol=1e-2)
    assert (columns - columns.diag().diag()).abs().max() < 1e-3 * columns.max()
    assert (columns.diag().diff() <= 0).all()


def test_refitting_makes_up_for_rounding():
    """Refitting B to a rounded A lowers the error of the product, and is exact where nothing was rounded."""
    A, B, H = factors()
    again, _ = tg.refit_factor(A, B, A, H, 1e-6)
    torch.testing.assert_close(again @ A, B @ A, rtol=1e-2, atol=1e-2)
    rounded = (A * 4).round() / 4
    again, G = tg.refit_factor(A, B, rounded, H, 1e-6)

    def loss(b):
        E = B @ A - b @ rounded
        return float(((E @ H) * E).sum())

    assert loss(again) < 0.9 * loss(B) and G.shape == (1, 12, 12)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.4])
def test_factors_beat_rounding(ratio):
    """At equal bits the error that the inputs see is less than half of what rounding to nearest leaves."""
    A, B, H = factors()
    plain = plain_factors(A, B, ratio)
    low, high = 1e-3, 100.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bits(stored_factors(A, B, H, middle)) > bits(plain) else (low, middle)
    stored = stored_factors(A, B, H, high)
    assert bits(stored) <= bits(plain)
    assert distortion(A, B, stored, H) < 0.5 * distortion(A, B, plain, H)


def test_factors_follow_what_their_map_costs():
    """Fisher row sums of the outer factor: where rows of the map matter unevenly, its error goes where it is cheap."""
    A, B, H = factors()
    gain = torch.logspace(-2, 2, B.shape[1])
    outer = gain * torch.trace((A @ H @ A.mT)[0])
    knowing = stored_factors(A, B, H, 1.0, outer)
    low, high = 1e-3, 1e3
    for _ in range(30):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bits(stored_factors(A, B, H, middle)) > bits(knowing) else (low, middle)
    assert distortion(A, B, knowing, H, gain) < 0.7 * distortion(A, B, stored_factors(A, B, H, low), H, gain)


def test_dead_factors_survive():
    """A factor of zeros, a Hessian of zeros, a factor without the other: finite steps, and zeros again."""
    A, B, H = factors()
    for b, h in ((torch.zeros_like(B), H), (B, torch.zeros_like(H))):
        inner, outer = stored_factors(A, b, h, 1.0)
        product = outer.dense() @ inner.dense()
        assert torch.isfinite(product).all() and (b.any() or not product.any())
    for name, W in zip(NAMES, (A, B), strict=True):
        (alone,) = tg.quantize(tiny("seed_lora"), {name: W[0]}, {}).values()
        assert (alone.dense() - W[0]).norm() < 0.3 * W.norm()


def test_fit_rotates_once(corpus):
    """What is exported has the products of the trained weights, to rounding, with and without Hessians."""
    cfg = tiny("seed_lora", matrix_bits=8, matrix_clip_sigmas=2.0, **corpus.knobs())
    trainer = trainer_of(cfg)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * ("lora_B" in name)
    hessians = tg.collect_hessians(trainer.run, trainer.model, tg.calibration_rows(trainer), True)
    state = trainer.model.state_dict()
    assert {name for name in state if name.endswith("lora_A")} <= set(hessians)
    for known in ({}, hessians):
        out = tg.Artifact({}, False, tg.fit(cfg, tg.Quantizer(cfg, state, known, {}), True, 0).stored).state()
        for name in ("blocks.0.attn.q", "blocks.3.mlp.up", "blocks.4.mlp.down"):
            was, now = (s[f"{name}.lora_B"] @ s[f"{name}.lora_A"] for s in (state, out))
            assert (was - now).norm() < 0.1 * was.norm()


def test_residual_forms():
    """delta: x + r branch; contraction: r (x + branch); r = 1 / sqrt(visits)."""
    cfg = tiny("pr2114", num_loops=0, num_layers=1, xsa_last_n=0)
    ids, r = random_ids(cfg, 1, 8), 1.0
    with torch.no_grad():
        x = tg.embed(tiny_model(cfg), ids)
        delta = tiny_model(cfg).hidden(ids, False)
        shrunk = tiny_model(replace(cfg, residual_kind="contraction", residual_scale=0.5)).hidden(ids, False)
    torch.testing.assert_close(shrunk, 0.5 * (x + (delta - x) / r), rtol=1e-4, atol=1e-5)
    assert tg.layer_table(tiny("pr2114", num_layers=3, loop_start=1, loop_end=1, num_loops=5))[0].rho == 8**-0.5


def test_numpy_words_are_little_endian():
    """Signs are the words' bits from the lowest up, whatever the machine."""
    word = int(tg.bits_of(3, "b", 0).random_raw(1)[0])
    assert tg.random_signs(tg.bits_of(3, "b", 0), 64).tolist() == [2.0 * (word >> i & 1) - 1 for i in range(64)]
    assert np.random.Philox(key=1).random_raw(1)[0] == PHILOX


PHILOX = 0x4DB6A27B756282DF

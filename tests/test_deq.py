"""The equilibrium: solvers, gradients, laws at every solver setting, depth after training, quantization, telemetry."""

import json
import math

import pytest
import torch
from conftest import (
    clean_env,
    random_ids,
    replace,
    run_steps,
    sandbox,
    single,
    tg,
    tiny,
    tiny_model,
    trainer_of,
)

SOLVERS = (
    dict(deq_solver="picard"),
    dict(deq_anderson_window=1),
    dict(deq_anderson_window=8),
    dict(deq_anderson_history=2, deq_anderson_window=64),
)
STOPS = ((0.0, 1), (0.0, 9), (1e-3, 5), (1e-3, 24), (3e-2, 9), (0.3, 4))
every_setting = pytest.mark.parametrize(
    "setting", [solver | dict(deq_tol=tol, deq_max_iter_eval=cap) for solver in SOLVERS for tol, cap in STOPS], ids=str
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def contraction(width: int, radius: float) -> torch.Tensor:
    """A matrix that is not normal and whose eigenvalues have modulus up to ``radius``."""
    matrix = noise(width, width)
    return radius * matrix / torch.linalg.eigvals(matrix).abs().max()


def search(history: int, iterations: int, tol=0.0, window=1, trace=None, kept=torch.float64) -> tg.Search:
    return tg.Search(tg.Solver(history, window, tol, 0, 0), iterations, tg.solver_step, kept, trace=trace)


def find(f, x, history: int, iterations: int, **settings) -> torch.Tensor:
    return search(history, iterations, **settings).run(f, x)


# ---- solvers --------------------------------------------------------------------------------------------------------


def linear_problem(radius: float = 0.9, width: int = 12):
    """(f, its fixed point) of x -> x A^T + b for a few tokens."""
    A, b = contraction(width, radius), noise(3, 5, width, seed=1)
    return (lambda x: x @ A.T + b), torch.linalg.solve(torch.eye(width) - A, b.mT).mT


@pytest.mark.parametrize("history", [1, 2, 5, 8])
def test_the_known_fixed_point_is_found(history):
    """On a linear contraction every history converges to (I - A)^-1 b."""
    f, exact = linear_problem(0.5)
    found = find(f, torch.zeros_like(exact), history, 80)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def iterations_to(tol: float, history: int, radius: float, kept=torch.float64) -> int:
    """Evaluations until the median token's relative residual is at most tol."""
    f, exact = linear_problem(radius)
    trace: list[torch.Tensor] = []
    find(f, torch.zeros_like(exact), history, 400, trace=trace, kept=kept)
    return next(i for i, size in enumerate(trace, 1) if float(size.median()) <= tol)


@pytest.mark.parametrize("radius", [0.8, 0.95])
def test_anderson_beats_picard(radius):
    """On stiff contractions Anderson needs at most two thirds of Picard's evaluations, with rounded differences too."""
    picard, anderson = (iterations_to(1e-3, history, radius) for history in (1, 5))
    rounded = iterations_to(1e-3, 5, radius, kept=torch.bfloat16)
    assert 1.5 * max(anderson, rounded) <= picard, (anderson, rounded, picard)


def test_ridge_least_squares():
    """The unrolled solve is the normal equations' solution; zero rows get nothing."""
    rows, target = [noise(2, 3, 16, seed=i) for i in range(4)], noise(2, 3, 16, seed=9)
    found = torch.cat(tg.solve_ridge((*rows, torch.zeros_like(target)), target), -1)
    R = torch.stack(rows, -1)
    gram = R.mT @ R
    ridge = tg.RIDGE / 5 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    wanted = torch.linalg.solve(gram + ridge * torch.eye(4), (R.mT @ target[..., None]))[..., 0]
    torch.testing.assert_close(found[..., :4], wanted, rtol=1e-9, atol=1e-12)
    assert not found[..., 4].any()


def test_mixing_is_bounded():
    """Nearly parallel differences cannot throw a token far: no coefficient beyond MOST_MIXING."""
    rows = (noise(1, 1, 8), noise(1, 1, 8) * (1 + 1e-9))
    state = tg.SolverState(
        torch.zeros(1, 1, 8), torch.zeros(1, 1, 1).bool(), torch.zeros(1, 1, 1), None, None, rows, rows
    )
    image = 1e6 * noise(1, 1, 8)
    x = tg.solver_step(state, image, None, 0.0, 1, torch.float64).x
    assert (x - image).norm() <= tg.MOST_MIXING * sum(row.norm() for row in rows) * (1 + 1e-6)


def test_frozen_tokens_stay():
    """Once its residual is within tol, a token's state never changes; the others go on."""
    A, b = contraction(8, 0.9), noise(1, 6, 8)
    scale = torch.tensor([0.01, 0.3, 0.9, 0.01, 0.3, 0.9])[:, None].double()
    f = lambda x: scale * (x @ A.T) + b
    states = [find(f, torch.zeros_like(b), 3, n, tol=1e-2) for n in range(1, 12)]
    changed = torch.stack([(a != b).any(-1)[0] for a, b in zip(states, states[1:], strict=False)])
    for token in range(6):
        moves = changed[:, token].nonzero()
        assert changed[: len(moves), token].all(), "a frozen token moved again"
    assert changed[:, 0].sum() < changed[:, 2].sum()


# ---- gradients ------------------------------------------------------------------------------------------------------


class Small:
    """Stands in for the block: settings of the gradients."""

    phantom_steps, phantom_damping, per_token, residual_weight, slope_weight, aim = 60, 0.9, 1.0, 0.0, 0.0, 1e-3


def gradient(kind: str, history: int, **settings) -> list[torch.Tensor]:
    """Gradients of a loss at the fixed point of tanh(x A^T + z B^T), fp64."""
    A = contraction(6, 0.6).requires_grad_()
    B, z = noise(6, 6, seed=2).requires_grad_(), noise(2, 3, 6, seed=3).requires_grad_()
    block = type("Block", (Small,), settings)()
    x = tg.DEQ_GRADS[kind](
        block,
        lambda x: torch.tanh(x @ A.T + z @ B.T),
        search(history, 60),
        torch.zeros(2, 3, 6).double(),
    )
    (x * noise(2, 3, 6, seed=4)).sum().backward()
    return [A.grad, B.grad, z.grad]


@pytest.mark.parametrize("history", [1, 5])
@pytest.mark.parametrize("kind", ["phantom", "ift"])
def test_gradients_agree_at_convergence(kind, history):
    """fp64: the implicit gradient, and the phantom one with many steps, equal back-propagation through the solver."""
    for found, wanted in zip(gradient(kind, history), gradient("unroll", 1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_phantom_is_a_truncated_series():
    """Fewer steps give a worse gradient, one step the gradient of a single evaluation."""
    exact = gradient("unroll", 1)[0]
    errors = [float((gradient("phantom", 1, phantom_steps=k)[0] - exact).norm() / exact.norm()) for k in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.2


def kept_bytes(cfg: tg.Config) -> int:
    """Bytes that a training forward keeps for its backward pass."""
    model, total = tiny_model(cfg), 0
    ids = random_ids(cfg, 2, 32)

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(ids, ids, False)
    return total


@pytest.mark.parametrize("kind", list(tg.DEQ_GRADS))
def test_memory_does_not_grow_with_depth(kind):
    """phantom and ift keep the same for 8 and 32 iterations; the control keeps them all."""
    shallow, deep = (kept_bytes(tiny("deq", deq_grad=kind, deq_max_iter_train=n)) for n in (8, 32))
    assert deep == shallow if kind != "unroll" else deep > 3 * shallow


@pytest.mark.parametrize("kind", list(tg.DEQ_GRADS))
def test_every_gradient_learns(kind, corpus):
    """The loss falls by each gradient; the penalties change gradients and not the loss."""
    cfg = tiny("deq", deq_grad=kind, **corpus.knobs())
    losses = run_steps(trainer_of(cfg), 12, 12)
    assert losses[-1] < losses[0] - 0.3
    for penalty, allowed in dict(deq_residual_penalty=tg.DEQ_GRADS, deq_slope_penalty=("phantom",)).items():
        if kind in allowed:
            other = run_steps(trainer_of(replace(cfg, **{penalty: 5.0})), 12, 12)
            assert other[0] == losses[0] and other[-1] != losses[-1]


@pytest.mark.parametrize("kind", list(tg.DEQ_GRADS))
def test_what_is_unsettled_is_pushed_until_it_settles(kind):
    """The penalty's gradient lowers the residual of an unfinished solve, and is nothing where the solve has settled."""
    A, start = contraction(6, 0.9).requires_grad_(), noise(2, 3, 6, seed=3)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ A.T + start)

    def pull(iterations: int, penalty: float) -> torch.Tensor:
        A.grad = None
        block = type("Block", (Small,), dict(phantom_steps=2, residual_weight=penalty))()
        found = tg.DEQ_GRADS[kind](block, f, search(1, iterations), start.clone())
        found.sum().backward()
        outputs.append(found.detach())
        return A.grad

    def residual() -> float:
        with torch.no_grad():
            x = find(f, start, 1, 3)
            return float((f(x) - x).norm())

    outputs: list[torch.Tensor] = []
    push, before = pull(3, 1.0) - pull(3, 0.0), residual()
    assert torch.equal(*outputs)  # the penalty changes gradients alone
    assert push.norm() > 1e-2 and (pull(400, 1.0) - pull(400, 0.0)).norm() < 1e-3 * push.norm()
    with torch.no_grad():
        A -= 0.02 * push / push.norm()
    assert residual() < before


def test_penalties_belong_to_trainers(corpus):
    """Outside a trainer's hands a penalty weighs nothing, whatever the batch of the environment."""
    cfg = tiny("deq", deq_residual_penalty=5.0, **corpus.knobs())
    ids, grads = random_ids(cfg, 2, 32), []
    for model in (tiny_model(cfg), tiny_model(replace(cfg, deq_residual_penalty=0.0)), trainer_of(cfg).model):
        model.load_state_dict(tiny_model(cfg).state_dict())
        model(ids, ids, False).sum().backward()
        grads.append(model.blocks[0].attn.q.weight.grad)
    assert torch.equal(grads[0], grads[1]) and not torch.allclose(grads[2], grads[0])


def test_where_no_gradient_follows_the_map_is_finer(monkeypatch):
    """Of a model in bf16: the solve and all scoring compute in fp16, what gradients follow in bf16."""
    cfg, seen = tiny("deq"), []
    model, ids, own = tiny_model(cfg), random_ids(cfg, 2, 32), tg.equilibrium_map
    model.dtype = torch.bfloat16
    monkeypatch.setitem(model.parts, "equilibrium", lambda b, x, z, *rest: seen.append(z.dtype) or own(b, x, z, *rest))
    model.hidden(ids, False)
    assert seen == [torch.float16] * cfg.deq_max_iter_train + [torch.bfloat16] * cfg.deq_phantom_steps
    seen.clear()
    with torch.no_grad():
        model.hidden(ids, False)
    assert set(seen) == {torch.float16}
    seen.clear()
    watched = lambda b, x, z, *rest: seen.append((z.dtype, torch.is_grad_enabled())) or own(b, x, z, *rest)
    monkeypatch.setattr(tg, "equilibrium_map", watched)
    with torch.no_grad():
        tg.spectral_radius(model, ids, False, rounds=2)
    assert set(seen) == {(torch.float16, False), (torch.bfloat16, True)}  # products of gradients as in training


def test_a_finer_map_settles_further():
    """The median residual of a solve in bf16 stops well above that in fp16, whatever the number of iterations."""
    cfg = tiny("deq")
    model, ids, floors = tiny_model(cfg), random_ids(cfg, 2, 32), []
    model.dtype = torch.bfloat16
    for finer in (lambda z: z, tg.finer):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(tg, "finer", finer)
            floors.append(tg.residual_report(model, ids, False, 5, 1e-3)["p50"][-1])
    assert floors[0] > 3 * floors[1], floors


def test_the_slope_is_the_jacobians_norm():
    """On a linear map the estimate is |A|^2 / D a token in the mean, and its descent shrinks the matrix alone."""
    A = noise(24, 24).float().requires_grad_()
    x = torch.randn(400, 50, 24, generator=torch.Generator().manual_seed(1))
    estimate = tg.slope(lambda x: x @ A.T, x, x @ A.T) / (400 * 50)
    wanted = A.square().sum() / 24
    assert estimate.item() == pytest.approx(wanted.item(), rel=0.02)
    (mine,), (theirs,) = (torch.autograd.grad(value, A) for value in (estimate, wanted))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0.05 * float(theirs.abs().max()))


# ---- laws at every setting ------------------------------------------------------------------------------------------


def differ(cfg: tg.Config) -> None:
    """Later tokens and other sequences change: the rest of the logits must be bit-equal."""
    model, ids = tiny_model(cfg), random_ids(cfg, 3, 32)
    with torch.no_grad():
        before = model.logits(ids, False)
        for t in (1, 9, 31):
            other = random_ids(cfg, 3, 32, seed=t)
            other[:, :t] = ids[:, :t]
            after = model.logits(other, False)
            assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t:], after[:, t:])
        other = random_ids(cfg, 3, 32, seed=77)
        other[1] = ids[1]
        assert torch.equal(before[1], model.logits(other, False)[1])


@every_setting
def test_causal_and_batch_invariant(setting):
    """Laws 1 and 2, bit for bit, whatever the solver, the tolerance and the number of iterations."""
    differ(tiny("deq", **setting))


@pytest.mark.parametrize("kind", ["dot", "left_sums"])
def test_the_test_catches_shared_coefficients(monkeypatch, kind):
    """Coefficients of the whole sequence, as the seed's, or of the whole batch are caught."""
    whole = lambda a, *_: a.sum((0, 1), keepdim=True).expand_as(a)
    cases = dict(dot=lambda a, b: (a * b).sum((1, 2), keepdim=True).expand(*a.shape[:-1], 1), left_sums=whole)
    monkeypatch.setattr(tg, kind, cases[kind])
    with pytest.raises(AssertionError):
        differ(tiny("deq", deq_tol=0.0, deq_max_iter_eval=9))


def test_documents_stay_apart():
    """PACK_DOCS: a document's logits are bit-equal whatever stands before it, mixing included."""
    cfg = tiny("deq", pack_docs=True, deq_tol=0.0, deq_max_iter_eval=9)
    model, ids = tiny_model(cfg), random_ids(cfg, 2, 32)
    ids[:, 13] = tg.BOS
    other = random_ids(cfg, 2, 32, seed=5)
    other[:, 13:] = ids[:, 13:]
    with torch.no_grad():
        assert torch.equal(model.logits(ids, False)[:, 13:], model.logits(other, False)[:, 13:])


def test_left_sums():
    """Sums over the window by doubling are those by hand, inside documents."""
    values, docs = noise(2, 11, 3), torch.tensor([[0] * 4 + [1] * 7, [2] * 11])
    for window in (1, 2, 4, 8, 16):
        for of in (None, docs):
            found = tg.left_sums(values, window, of)
            for b in range(2):
                for t in range(11):
                    reach = [s for s in range(max(0, t - window + 1), t + 1) if of is None or of[b, s] == of[b, t]]
                    torch.testing.assert_close(found[b, t], values[b, reach].sum(0))


def test_tokens_freeze_at_different_times():
    """The settings above mean something: tokens of one sequence freeze in different iterations."""
    cfg = tiny("deq", deq_tol=1e-3, deq_max_iter_eval=48)
    model = tiny_model(cfg)
    block = model.blocks[0]
    block.trace = []
    with torch.no_grad():
        model.hidden(random_ids(cfg, 3, 32), False)
    when = (torch.stack(block.trace) > 1e-3).sum(0)
    assert when.min() < when.median() < 48


def test_deep_solves_start_as_the_identity():
    """A fresh equilibrium returns its input: x = z is the fixed point of norm((x + z) / 2)."""
    for prelude in (0, 2):
        cfg = tiny("deq", num_layers=prelude + 1, deq_layer=prelude, deq_tol=0.0, deq_max_iter_eval=30)
        model, ids = tg.build_model(cfg, single(cfg)), random_ids(cfg, 2, 32)
        with torch.no_grad():
            found, wanted = (tg.norm(x) for x in (model.hidden(ids, False), tg.embed(model, ids)))
            torch.testing.assert_close(found, tg.norm(wanted), rtol=0, atol=1e-5)


# ---- after training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(corpus) -> tg.Trainer:
    cfg = tiny(
        "deq",
        deq_max_iter_train=8,
        deq_phantom_steps=3,
        deq_max_iter_eval=16,
        train_batch_tokens=512,
        micro_batch_tokens=512,
        deq_tol=0.0,
        **corpus.knobs(),
    )
    trainer = trainer_of(cfg)
    run_steps(trainer, 80, 80)
    return trainer


def test_the_quantized_block_keeps_its_fixed_point(trained):
    """GPTQ at the fixed point: the quantized map converges too, to a point near the float one's."""
    model, cfg = trained.model, trained.cfg
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = tg.calibration_rows(trained)
    hessians = tg.collect_hessians(trained.run, model, rows, False)
    stored = tg.quantize(replace(cfg, matrix_clip_sigmas=6.0), state, hessians)
    points, needed, ids = [], [], rows[:4, :-1].long()
    for weights in (state, tg.Artifact({}, False, stored).state()):
        with tg.swapped(model, weights), torch.no_grad():
            report = tg.residual_report(model, ids, False, 5, 1e-3)
            assert report["p99"][-1] < 1e-3
            needed.append(report["iterations"]["p50"])
            points.append(model.hidden(ids, False))
    assert (points[0] - points[1]).norm() < 0.2 * points[0].norm() and needed[1] <= needed[0] + 2


def test_the_hessians_sum_over_iterations(trained):
    """The taps see every evaluation of the solver."""
    rows = tg.calibration_rows(trained)[:2]
    once, all_of = (
        tg.collect_hessians(trained.run, trained.model, rows, False)
        if depth is None
        else hessians_at(trained, rows, depth)
        for depth in (1, None)
    )
    name = "blocks.0.attn.q.weight"
    assert float(all_of[name].trace() / once[name].trace()) == pytest.approx(16, rel=0.01)


def hessians_at(trainer: tg.Trainer, rows: torch.Tensor, depth: int) -> dict:
    with tg.solving(trainer.model, scoring=depth):
        return tg.collect_hessians(trainer.run, trainer.model, rows, False)


def test_depth_is_a_dial(trained, validation):
    """More iterations approach the converged score; beyond convergence nothing moves."""
    found = tg.probe(trained.run, trained.model, validation, False)["deq"]
    loss = {depth: row["loss"] for depth, row in found["depth"].items()}
    assert abs(loss[16] - loss[32]) < 1e-3 < abs(loss[1] - loss[32])


def test_the_probe_reports(trained, validation):
    """Telemetry: percentiles by iteration for both solvers, iterations, radius below 1, JSON that report.py reads."""
    before = trained.model.blocks[0].solver
    found = json.loads(json.dumps(tg.probe(trained.run, trained.model, validation, False)))["deq"]
    assert trained.model.blocks[0].solver == before and trained.model.blocks[0].trace is None
    for name in ("anderson", "picard"):
        for percentile in tg.PERCENTILES:
            assert len(found[name][percentile]) == 32 and all(map(math.isfinite, found[name][percentile]))
        assert found[name]["seconds"] > 0
    assert found["residuals"] == found["anderson"]["p50"]
    for percentile in tg.PERCENTILES:
        anderson, picard = (found[name]["iterations"][percentile] or 33 for name in ("anderson", "picard"))
        assert anderson <= min(picard, 32), percentile
    assert all(0 < radius < 1 for radius in found["spectral_radius"])
    assert set(found["depth"]) == {str(depth) for depth in tg.DEPTHS}


def test_the_spectral_radius_of_a_known_map(monkeypatch):
    """Power iteration on x -> x A^T + z finds |A|'s largest eigenvalue."""
    A = contraction(64, 0.7).float()
    A = (A + A.T) * 0.7 / torch.linalg.eigvalsh(A + A.T).abs().max()
    known = lambda block, x, z, *context: x @ A.T + z
    monkeypatch.setattr(tg, "equilibrium_map", known)
    monkeypatch.setitem(tg.PARTS, "equilibrium", known)
    model = tiny_model(cfg := tiny("deq"))
    with torch.no_grad():
        found = tg.spectral_radius(model, random_ids(cfg, 2, 32), False, rounds=200)
    assert found == pytest.approx([0.7, 0.7], rel=0.01)


def test_an_artifact_at_other_depths(trained, corpus, tmp_path):
    """eval takes DEQ_MAX_ITER_EVAL from the environment; the solver and its tolerance come from the artifact."""
    cfg, state = trained.cfg, trained.model.state_dict()
    blob = tg.pack(cfg, tg.quantize(cfg, state, {}), False, quick=True)
    jobs = {}
    fitted = {"TTT_ENABLED": "1", "TTT_LR": "1", "TTT_CHUNK_TOKENS": "64", "EVAL_STRIDE": "8"}
    for depth, also in {"1": {}, "32": {}, "64": {}, "32 fitted": fitted}.items():
        path = tmp_path / depth / "final_model.ptz"
        path.parent.mkdir()
        path.write_bytes(blob)
        more = {"DEQ_MAX_ITER_EVAL": depth.split()[0], "DEQ_SOLVER": "picard", "SLIDING_WINDOW_ENABLED": "0"} | also
        jobs[depth] = (["eval", path], clean_env(corpus.env(), {"DEVICE": "cpu", "THREADS": "1"}, more))
    ended = sandbox(jobs, tmp_path)
    assert all(end.code == 0 for end in ended.values()), ended
    read = {depth: json.loads((tmp_path / depth / "eval.json").read_text()) for depth in jobs}
    loss = {depth: row["stages"]["quantized"]["val_loss"] for depth, row in read.items()}
    assert abs(loss["32"] - loss["64"]) < 1e-3 < abs(loss["1"] - loss["64"])
    deq = read["32"]["probes"]["deq"]
    assert deq["residuals"] == deq["anderson"]["p50"]
    other = read["32 fitted"]
    assert other["stages"]["ttt"]["val_loss"] != loss["32"]
    assert other["probes"]["deq"]["residuals"] == deq["residuals"]  # of the artifact, not of what fitted the text


# ---- refused at the start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "message"), [
    (dict(deq_layer=1), "DEQ_LAYER=1"),
    (dict(deq_slope_penalty=1.0, deq_grad="unroll"), "DEQ_SLOPE_PENALTY"),
    (dict(deq_max_iter_eval=0), "DEQ_MAX_ITER_EVAL"), (dict(deq_solver="newton"), "anderson, picard"),
])  # fmt: skip
def test_refused_at_the_start(values, message):
    with pytest.raises(tg.UserError, match=message):
        tiny("deq", **values)

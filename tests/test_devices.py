"""No tensor of the CPU meets one of the GPU, and training never waits for the device: all stages of a run on a
pretended GPU, whose tensors are the CPU's under another device's name. No GPU needed.

Runs in a process of its own, because torch takes the name of one such device only.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import subprocess
import sys
import traceback
import types
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
REGISTER = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
FAR = "far"

CARRIES = dict(use_compression_loss=True, linear_layers="1", use_eigenspace_routing=True, embed_init="spectral")
LANES = dict(parallel_start_layer=2, ttt_linear_layers="1", ttt_linear_chunk=8, pack_docs=True, num_layers=4,
             gptq_rows=8)  # fmt: skip
SEEDS = dict(seed_maps="up", seed_per_visit=True, k_rank=8, muon_beta2=0.95, depth_embed=True, bigram_dim=8, ve_dim=8)
ROUTES = dict(num_layers=4, deq_layer=3, deq_slope_penalty=0.1, deq_max_iter_train=2, deq_phantom_steps=1, deq_tol=0.1,
              deq_max_iter_eval=1, deq_anderson_history=2, mod_rule="threshold", mod_balance_loss=0.1)  # fmt: skip
VARIANTS = {"carries": ("pr298", CARRIES), "lanes": ("pr1435", LANES | SEEDS), "routes": ("mod", ROUTES)}

aten = torch.ops.aten
WAITS: collections.Counter = collections.Counter()  # what makes the host wait for the device: (kind, where)


def where() -> str:
    """The line of the script that is running."""
    frames = [f for f in traceback.extract_stack() if f.filename.endswith("train_gpt.py")]
    return f"{frames[-1].name}: {frames[-1].line}" if frames else "outside"


class Far(torch.Tensor):
    """A tensor of the pretended GPU; ``near`` holds its numbers."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> Far:
        layout = dict(strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype)
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, **layout, device=torch.device(FAR, 0))
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_near(func, args, kwargs or {})

    def tolist(self):
        WAITS["tolist", where()] += 1
        return self.near.tolist()

    def numpy(self, *_, **__):
        raise TypeError("numpy of a tensor that is on the GPU")

    __array__ = numpy


def on_near(func, args, kwargs):
    """An operation by the CPU, its result on the device that it belongs to; an error where devices mix."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    far, near = ([x for x in tensors if isinstance(x, Far) == there] for there in (True, False))
    goes_far = isinstance(args[0], Far) if func is aten.copy_.default else bool(far)
    if kwargs.get("device") is not None:
        goes_far = torch.device(kwargs["device"]).type == FAR
        kwargs = kwargs | dict(device=torch.device("cpu"))
    indices = [x for x in args[1] if x is not None] if func in (aten.index.Tensor, aten.index_put_.default) else []
    told = {
        "item": func is aten._local_scalar_dense.default and far,
        "nonzero": func is aten.nonzero.default and far,
        "mask": far and any(x.dtype == torch.bool for x in indices),
        "copy": func in (aten._to_copy.default, aten.copy_.default) and bool(far) != goes_far,
    }
    for kind in (kind for kind, waits in told.items() if waits):
        WAITS[kind, where()] += 1
    moves = func in (aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default)
    if far and any(x.dim() for x in near) and not moves:
        raise RuntimeError(f"{func} mixes devices: on the CPU {[tuple(x.shape) for x in near]}; {where()}")
    own = {id(x.near): x for x in far}  # what an operation in place returns
    out = func(*tree_map(lambda x: x.near if isinstance(x, Far) else x, args),
               **tree_map(lambda x: x.near if isinstance(x, Far) else x, kwargs))  # fmt: skip
    if not goes_far or told["item"]:
        return out
    return tree_map(lambda x: x if not isinstance(x, torch.Tensor) else own[id(x)] if id(x) in own else Far(x), out)


class Pretended(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return on_near(func, args, kwargs or {})


def pretend() -> types.ModuleType:
    """The script, told that there is a GPU of that name."""
    REGISTER(FAR)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    told = dict(is_available=True, device_count=1, get_device_capability=(9, 0), mem_get_info=(1 << 36, 1 << 36))
    for name, answer in (told | dict.fromkeys(("set_device", "synchronize", "empty_cache"))).items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    script = ROOT / "train_gpt.py"
    module = sys.modules["train_gpt"] = types.ModuleType("train_gpt")
    module.__file__ = str(script)
    exec(compile(script.read_text().replace('"cuda"', f'"{FAR}"'), str(script), "exec"), module.__dict__)
    module.SPAN_ATTENTION["cudnn"] = functools.partial(masked_spans, module)
    return module


def masked_spans(module, q, k, v, spans, longest):
    """Attention over spans by a mask, since the CPU has no kernel for them."""
    docs = (torch.arange(len(q), device=q.device)[:, None] >= spans).sum(1)
    return module.sdpa(q[None], k[None], v[None], docs[None])[0]


def stages(tg, conftest, preset: str, values: dict):
    """(name, function) of the stages of a run, in order."""
    shape = dict(model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=1, micro_batch_tokens=128)
    cfg = conftest.tiny(preset, **shape | dict(device=FAR, compile=False, warmup_steps=1) | values)
    run, kept = conftest.single(cfg), {}
    rows, val = conftest.random_ids(cfg, 4, 33).int(), conftest.random_validation(cfg, 70)
    tg.TrainStream = lambda cfg: types.SimpleNamespace(batch=lambda first, count: rows[:count])
    tg.load_tokenizer = lambda cfg: types.SimpleNamespace(
        **{f"is_{kind}": lambda token: False for kind in ("byte", "control", "unknown")}, id_to_piece=str
    )
    tg.DEPTHS, tg.spectral_radius.__defaults__ = (1,), (2,)

    def build():
        kept["trainer"] = tg.Trainer(run)
        kept["model"] = kept["trainer"].model
        kept["rows"] = rows.to(run.device)

    def export():
        state = {name: param.detach() for name, param in kept["model"].named_parameters()}
        quantizer = tg.Quantizer(cfg, state, *kept["found"])
        packed = tg.fit(cfg, quantizer, True, 0)
        tg.ledger(quantizer, packed.stored, quantizer.fisher)
        kept["model"].load_state_dict(tg.unpack(packed.blob).state())

    def weigh():
        """A batch that is filled up scores what its own sequences do."""
        runs = [conftest.single(conftest.replace(cfg, val_batch_tokens=tokens)) for tokens in (32, 96)]
        alone, filled = (tg.mean_loss(one, kept["model"], rows, True) for one in runs)
        assert abs(alone - filled) < 0.01, (alone, filled)

    yield "build", build
    yield "warm_up", lambda: kept["trainer"].warm_up()
    yield "train", lambda: [kept["trainer"].train_step(kept["rows"], fraction) for fraction in (0.0, 0.99)]
    if preset == "pr298":  # one will do
        yield "weigh", weigh
    yield "own_text", lambda: tg.self_generated(run, kept["model"], rows[:2, :4], True)
    yield "calibrate", lambda: kept.update(found=tg.calibrate(run, kept["model"], {}, rows[:2], True, {}))
    if not cfg.mod_layers:  # its tensors are like the others'
        yield "export", export
    windows = tg.sliding_windows(val.targets, cfg.eval_seq_len, cfg.eval_stride)
    yield "score", lambda: tg.evaluate(run, kept["model"], val, windows, True)
    yield "probe", lambda: tg.probe(run, kept["model"], val, True)


def main() -> None:
    """Prints what each stage of each variant waited for, or its error."""
    sys.path.insert(0, str(ROOT / "tests"))
    tg, found = pretend(), {}
    import conftest

    tg.Run.log = lambda *_, **__: None
    tg.swapped = lambda model, state: tg.contextlib.nullcontext()
    with Pretended():
        for variant, (preset, values) in VARIANTS.items():
            for name, stage in stages(tg, conftest, preset, values):
                WAITS.clear()
                try:
                    stage()
                    found[f"{variant} {name}"] = {" ".join(key): count for key, count in WAITS.items()}
                except Exception as error:
                    lines = traceback.format_exc(limit=-6)
                    raise SystemExit(f"{variant}, {name}: {type(error).__name__}: {error}\n{lines}") from error
    print(json.dumps(found))


@pytest.fixture(scope="module")
def waits():
    if REGISTER is None:
        pytest.skip("this torch cannot register a device from Python")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_never_waits_for_the_device(waits, variant):
    """Every stage ran without mixing devices; a step of training asks the device for nothing."""
    assert waits[f"{variant} train"] == {}


@pytest.mark.parametrize("variant", ["carries", "lanes"])
def test_loops_over_columns_never_wait(waits, variant):
    """The exporter waits a few times a stack or a tensor, not a column."""
    inner = ("gptq:", "extend:", "settle:", "half_steps:")
    assert not [line for line in waits[f"{variant} export"] if line.split()[1] in inner]


if __name__ == "__main__":
    main()

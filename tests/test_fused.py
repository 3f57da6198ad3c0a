"""The fused operations equal the plain ones, outputs and gradients, in Triton's interpreter (no GPU needed).

Skipped where Triton is not installed (it comes with torch's CUDA builds). Runs in a process of its own, because the
interpreter must be chosen before the script is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PROBE = """
import json, sys, torch
import train_gpt as tg

tg.LAUNCH["mlp_up"].update(BM=64, BN=128, BK=32)
tg.LAUNCH["mlp_down_grad"].update(BM=64, BN=128, BK=32)
torch.manual_seed(0)
draw = lambda *shape: torch.randn(*shape).requires_grad_()
rope = tg.rotary_table(9, 16, 1e4, 9, torch.device("cpu"))
cases = dict(
    mix_norm=(draw(2, 9, 64), draw(2, 9, 64), draw(64), draw(64)),
    add_norm=(draw(2, 9, 192), draw(2, 9, 192)),
    qk_rope=(draw(2, 9, 16 * 64), draw(8), *rope, 64),
    exclude_self=(draw(2, 9, 8, 64), draw(2, 9, 4, 64)),
    mlp=(draw(2, 75, 64), draw(384, 64), draw(64, 384), 0.5, None),
    softcap_nll=(draw(13, 1500), torch.randint(1500, (13,)), 30.0),
)

def results(function, inputs):
    leaves = [x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.requires_grad else x for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    sum((o.float() * torch.randn(o.shape, generator=generator)).sum() for o in out).backward()
    return [o.detach() for o in out] + [x.grad for x in leaves if torch.is_tensor(x) and x.requires_grad]

errors = {}
for name, inputs in cases.items():
    ours, plain = (results(getattr(ops, name), inputs) for ops in (tg.FUSED, tg.PLAIN))
    errors[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, plain, strict=True))
for states in (4, 8):
    W, H = torch.randn(2, 3, 101), torch.randn(2, 101, 150)
    known = tg.factor(H @ H.mT, 0.01, sort=False)
    row, col = 0.2 + torch.rand(2, 3), 0.5 + torch.rand(2, 101)
    ours, plain = (tg.gptq(W, known, row, col, states, fused=fused) for fused in (True, False))
    errors[f"trellis{states}"] = float((ours != plain).double().mean())
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors(request):
    """Worst relative error of every operation, over its outputs and gradients, in fp32."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, cwd=request.config.rootpath
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NAMES = ["mix_norm", "add_norm", "qk_rope", "exclude_self", "mlp", "softcap_nll", "trellis4", "trellis8"]


@pytest.mark.parametrize("name", NAMES)
def test_fused_equals_plain(errors, name):
    """Within fp32 rounding."""
    assert errors[name] < 2e-6


COMPILES = """
import train_gpt as tg
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

known = dict(code="*i32", into="*i32", found="*i32", top="fp32", STATES="constexpr", SPAN="constexpr")
whole = ("rows", "columns", "begin", "first", "last", "count")
kinds = {name: known.get(name, "i32" if name in whole else "*fp32") for name in tg.paths_kernel.arg_names}
source = ASTSource(tg.paths_kernel, kinds, constexprs=dict(STATES=8, SPAN=64))
print(len(compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1)).asm["cubin"]))
"""


def test_the_search_compiles_for_hopper(request):
    """To machine code, without a GPU: Triton brings its assembler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], env=env, capture_output=True, text=True, cwd=request.config.rootpath
    )
    assert done.returncode == 0 and int(done.stdout) > 10000, done.stderr

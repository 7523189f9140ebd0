"""Token clustering in Triton: in the interpreter against the local formulas, and compiled for GPUs."""

import importlib
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from test_triton import interpret, result

pytest.importorskip("triton")
SCRIPT = """
import json, torch
from casvit_kernels import use_backend
from casvit_kernels.ops.tokens import local
from casvit_kernels.tokens import cluster_tokens

found = []
torch.manual_seed(0)
for size, grid, window, iterations in (
    ((7, 9), (3, 4), 5, 3), ((6, 6), (6, 6), 3, 2), ((5, 5), (1, 1), 5, 1), ((10, 4), (3, 2), 1, 3),
    ((5, 6), (2, 3), 3, 0),
):
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(2, 20, size[0] * size[1]).to(dtype).transpose(1, 2)  # any strides
        with use_backend("triton"):
            c = cluster_tokens(x, size, grid, iterations=iterations, window=window, temperature=0.05)
            first = cluster_tokens(
                x[:1], size, grid, iterations=iterations, window=window, temperature=0.05
            )
        right, _ = local.cluster(x, size, grid, iterations, window, 0.05)
        error = (c.centres.float() - right.float()).abs().max().item()
        found.append([error, str(dtype), torch.equal(first.centres, c.centres[:1])])
x = torch.randn(1, 35, 3)
x[0, 0] = float("nan")
x[0, 34] = 1e4
with use_backend("triton"):
    c = cluster_tokens(x, (5, 7), (5, 7), window=3, iterations=1).centres
right, _ = local.cluster(x, (5, 7), (5, 7), 1, 3, 0.02)
same = torch.equal(c.isnan(), right.isnan()) and torch.allclose(c, right, equal_nan=True)
print(json.dumps([found, same, int(c.isnan().any(2).sum())]))
"""


@pytest.mark.long
def test_the_kernels_are_the_formulas():
    found, same, lost = result(interpret(SCRIPT))
    assert len(found) == 10
    for error, dtype, alone in found:
        assert error <= (2e-6 if "32" in dtype else 2e-3)
        assert alone  # batch mates change nothing
    assert same
    assert 0 < lost < 35


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_they_compile_without_spills(capability, dtype):
    """At ViT-L's width, for cells of four tokens."""
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.backends.compiler")
    launches = importlib.import_module("casvit_kernels.ops.tokens.triton.cluster")
    ints = dict.fromkeys(("tokens", "filled", "around", "inside"), "*i32")
    strides = dict.fromkeys(("stride_b", "stride_n", "stride_c", "N", "K"), "i32")
    sizes = {"C": 1024, "M": 4, "M_BLOCK": 4, "J": 25}
    for kernel, own in (
        (
            launches.affinity_kernel,
            {"temperature": "fp32"} | sizes | {"J_BLOCK": 32, "C_BLOCK": 64},
        ),
        (launches.centres_kernel, sizes | {"C_BLOCK": 256}),
    ):
        constants = {k: v for k, v in own.items() if isinstance(v, int)}
        types = ints | strides | {k: v for k, v in own.items() if isinstance(v, str)}
        types |= {"x": f"*{dtype}", "centres": "*fp32", "affinity": "*fp32"}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        made = triton.compile(source, target=compiler.GPUTarget("cuda", capability, 32))
        assert spills(made.asm["cubin"]) == 0


def spills(cubin):
    """Bytes of a thread's stack."""
    triton = importlib.import_module("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    stacks = re.findall(r"STACK:(\d+)", said.stdout + said.stderr)
    assert stacks
    return max(map(int, stacks))

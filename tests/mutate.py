"""Breaks the code in ways that happen, one at a time, and says whether the quick suite notices.

    python tests/mutate.py                 all; a table; exit status 1 where one goes unnoticed
    python tests/mutate.py "halo row"      those whose name contains this

Works in a copy of the checkout, whose library it builds once and then in parts. Of the quick suite it
runs the files named beside each mutation, up to the first failure; once before, all of these files have
to pass as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PARITY = "tests/parity/test_parity.py"
MUTATIONS = (
    Mutation(
        "a halo row skipped (combine)",
        "csrc/cpu/mixer/combine.h",
        "for (int64_t y = y_begin - 2; y <= y_begin; ++y) make_sum(y);",
        "for (int64_t y = y_begin - 1; y <= y_begin; ++y) make_sum(y);",
        (PARITY,),
    ),
    Mutation(
        "a wrong stride (channels-last output)",
        "csrc/cpu/simd/store.h",
        "store_first(to + (pixel + i) * g.C + channel,",
        "store_first(to + (pixel + i) * g.padded() + channel,",
        (PARITY,),
    ),
    Mutation(
        "a missing mask (odd last channel of the channel gate)",
        "csrc/cpu/mixer/gates.h",
        "if (g.C % 2) {",
        "if (false) {",
        (PARITY,),
    ),
    Mutation(
        "the last column left out of a pooled sum",
        "csrc/cpu/mixer/gates.h",
        "for (int i = 0; i < 7; ++i)\n        if (x + i < columns)",
        "for (int i = 0; i < 7; ++i)\n        if (x + i + 1 < columns)",
        (PARITY,),
    ),
    Mutation(
        "batch statistics without the correction of the mean",
        "csrc/cpu/mixer/statistics.h",
        "moments[VL + i] = totals[VL + i] - totals[i] * mean;",
        "moments[VL + i] = totals[VL + i];",
        (PARITY, "tests/test_cpu_phases.py"),
    ),
    Mutation(
        "swapped weights (dwc and proj)",
        "casvit_kernels/ops/mixer/weights.py",
        "    return (w[0], w[1], *w.q, *w.k, *w[4:])",
        "    return (w[0], w[1], *w.q, *w.k, w[6], w[7], w[4], w[5])",
        ("tests/test_weights_order.py", "tests/test_module.py"),
    ),
    Mutation(
        "a stale cache (writes to weights unseen)",
        "casvit_kernels/ops/mixer/packed.py",
        "            *map(_version, self._counted),\n",
        "",
        ("tests/test_shortcut.py", "tests/test_module.py"),
    ),
    Mutation(
        "a hook on a child ignored",
        "casvit_kernels/ops/mixer/structure.py",
        "if any(map(_forward_hooks, inside)) or any(map(_forward_pre_hooks, inside)):",
        "if any(map(_forward_pre_hooks, inside)):",
        ("tests/test_changed_children.py",),
    ),
    Mutation(
        "settings of convolutions not looked at",
        "casvit_kernels/ops/mixer/structure.py",
        "            and list(map(_settings, self._convolutions)) == self._set\n",
        "",
        ("tests/test_changed_children.py",),
    ),
    Mutation(
        "running variance without Bessel's correction",
        "casvit_kernels/ops/mixer/training.py",
        "var * (number / (number - 1))",
        "var * (number / number)",
        (PARITY, "tests/test_training.py"),
    ),
    Mutation(
        "the gradient of BatchNorm without its mean",
        "casvit_kernels/ops/mixer/training.py",
        "rest = sums[i] * (-scale / number) if batch else torch.zeros_like(sums[i])",
        "rest = torch.zeros_like(sums[i])",
        ("tests/test_training.py",),
    ),
    Mutation(
        "the input's layout not kept",
        "casvit_kernels/ops/mixer/schema.py",
        "        return torch.channels_last\n",
        "        return torch.contiguous_format\n",
        (PARITY, "tests/test_ops.py"),
    ),
    Mutation(
        "a tap of the tensor cores' operand one pixel off",
        "csrc/cuda/depthwise.h",
        "const int dx = k / kChunk - n / kChunk;",
        "const int dx = k / kChunk - n / kChunk + (n == 4 && k == 4);",
        ("tests/test_cuda_depthwise.py",),
    ),
    Mutation(
        "what rounding leaves of the gates' taps dropped",
        "csrc/cuda/pack.h",
        "rests[half] = pack2<T>(value[0] - rounded[0], value[1] - rounded[1]);",
        "rests[half] = 0;",
        ("tests/test_cuda.py",),
    ),
    Mutation(
        "a band's second halo row not made (CUDA)",
        "csrc/cuda/combine.h",
        "first_a = halo ? -2 : -1;",
        "first_a = -1;",
        ("tests/test_cuda.py",),
    ),
    Mutation(
        "a block's last pixels counted twice in the statistics (CUDA)",
        "csrc/cuda/statistics.h",
        "left[half] = inside ? height - mine.strip * ROWS : 0;",
        "left[half] = inside ? height - mine.strip * ROWS + 1 : 0;",
        ("tests/test_cuda.py",),
    ),
)


def run(copy: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "CASVIT_KERNELS_REQUIRE_NATIVE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


def build(copy: Path) -> None:
    done = run(copy, sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    if done.returncode != 0:
        raise SystemExit(f"the library does not build:\n{done.stderr}")


def native(file: str) -> bool:
    """Whether the library has to be built again. The emulation builds itself."""
    return file.startswith("csrc") and not file.startswith("csrc/cuda")


def caught(copy: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails, or None."""
    options = (
        "-q",
        "-x",
        "-m",
        "not long",
        "-p",
        "no:cacheprovider",
        "--tb=no",
    )
    done = run(copy, sys.executable, "-m", "pytest", *options, *tests)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not failed and done.returncode != 0:
        return f"pytest ended with {done.returncode}"
    return failed[0].split(" - ")[0] if failed else None


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in MUTATIONS if wanted in m.name]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignore = shutil.ignore_patterns(".git", ".venv", "*.so", "__pycache__", ".*_cache", "build")
        shutil.copytree(ROOT, copy, ignore=ignore)
        build(copy)
        if found := caught(copy, tuple(dict.fromkeys(test for m in chosen for test in m.tests))):
            raise SystemExit(f"fails without a mutation: {found}")
        for m in chosen:
            path = copy / m.file
            right = path.read_text(encoding="utf-8")
            if right.count(m.old) != 1:
                raise SystemExit(f"{m.name}: {m.file} has its text {right.count(m.old)} times")
            path.write_text(right.replace(m.old, m.new), encoding="utf-8")
            if native(m.file):
                build(copy)
            found = caught(copy, m.tests)
            unnoticed += found is None
            print(f"{m.name}: {found or 'NOT NOTICED'}", flush=True)
            path.write_text(right, encoding="utf-8")
            if native(m.file):
                build(copy)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The table behind the CPU's GELU: what is written is what its script writes, and near the function."""

import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "csrc" / "cpu" / "simd" / "gelu_table.py"


@pytest.mark.parametrize(("name", "allowed"), [("FINE", 1.2e-7), ("COARSE", 1.2e-4)])
def test_near_gelu(name, allowed):
    """At the interval nearest to |x|, clamped to the range, as the kernels evaluate it."""
    table = runpy.run_path(str(SCRIPT))
    degree, reach = table["TABLES"][name]
    rows = table["coefficients"](degree, reach).astype(np.float32).astype(float)
    step = reach / (table["INTERVALS"] - 1)
    worst = 0.0
    for x in np.linspace(-9, 9, 20001):
        t = min(abs(x), reach)
        i = round(t / step)
        got = max(x, 0.0) + sum(rows[k][i] * (t - i * step) ** k for k in range(degree + 1))
        worst = max(worst, abs(got - x * 0.5 * math.erfc(-x / math.sqrt(2))))
    assert worst < allowed
    assert rows[0][0] == 0.0  # GELU(0) is 0


def test_the_header_is_current():
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True)

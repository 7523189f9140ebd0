"""Writes gelu_table.h: GELU(x) - ReLU(x) as polynomials on 16 intervals of |x|.

    python csrc/cpu/simd/gelu_table.py [--check]

Interval i is centred at i * step; the polynomials are least-squares fits at Chebyshev nodes, of float64.
Below -range, where GELU itself is less than their error, the last value stays.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

INTERVALS = 16
TABLES = {"FINE": (5, 5.5), "COARSE": (2, 4.5)}  # degree, range: for float32, for bf16
TARGET = Path(__file__).with_name("gelu_table.h")
HEAD = """// Written by gelu_table.py. GELU(x) - ReLU(x) = sum of COEFFICIENT[k][i] (|x| - i STEP)^k, on
// the interval i nearest to |x| / STEP.
// clang-format off
#pragma once
"""


def difference(t: float) -> float:
    """GELU(x) - ReLU(x) for |x| = t."""
    return -t * 0.5 * math.erfc(t / math.sqrt(2))


def coefficients(degree: int, reach: float) -> np.ndarray:
    """[degree + 1][INTERVALS]."""
    step = reach / (INTERVALS - 1)
    columns = []
    for i in range(INTERVALS):
        low, high = max(0.0, (i - 0.5) * step), min(reach, (i + 0.5) * step)
        nodes = np.cos((np.arange(200) + 0.5) * np.pi / 200) * (high - low) / 2 + (high + low) / 2
        values = np.array([difference(t) for t in nodes])
        offsets = nodes - i * step
        if i == 0:  # GELU(0) is 0
            powers = offsets[:, None] ** np.arange(1, degree + 1)
            found = [0.0, *np.linalg.lstsq(powers, values, rcond=None)[0]]
        else:
            found = list(np.polyfit(offsets, values, degree)[::-1])
        columns.append(found)
    return np.array(columns).T


def text() -> str:
    parts = [HEAD]
    for name, (degree, reach) in TABLES.items():
        parts.append(f"constexpr float GELU_{name}_RANGE = {reach}f;")
        parts.append(f"alignas(64) constexpr float GELU_{name}[{degree + 1}][{INTERVALS}] = {{")
        for row in coefficients(degree, reach):
            # `+ 0.0`: no negative zero.
            numbers = [f"{np.float32(value) + 0.0:.9e}f" for value in row]
            lines = [", ".join(numbers[i : i + 4]) for i in range(0, INTERVALS, 4)]
            parts.append("    {" + ",\n     ".join(lines) + "},")
        parts.append("};")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text())
    elif TARGET.read_text() != text():
        raise SystemExit(f"{TARGET.name} is not what {Path(__file__).name} writes: run it")

"""`examine`: how a Core ML program fits the Neural Engine, as far as that can be said without one.

Apple publishes no list of the operations of ML programs that its Neural Engine runs, and the engines of
different chips differ. What runs where is decided on the device: Xcode's performance report and
``MLComputePlan`` (macOS 14.4, iOS 17.4 and later) say it for a device at hand. What Apple does publish
are networks that it runs there, and principles for writing more of them. So the list used here is:

* ``runs``: operations of the reference transformer that Apple published for the Neural Engine
  (github.com/apple/ml-ane-transformers; its README reports 602 of 606 operations there, all but the
  embedding lookups) - convolutions 1x1, split, concat, matmul, softmax, add, sub, mul, reduce_mean, relu.
* ``likely``: further operations of convolutional networks for which Apple publishes Core ML packages and
  iPhone latencies (FastViT, arXiv 2303.14189, github.com/apple/ml-fastvit; MobileOne, arXiv
  2206.04040): other convolutions, batch_norm, gelu, sigmoid, linear. The reports do not name the
  compute unit of single operations.
* ``compile time``: constants and their decompression, done before the network runs.
* ``not known``: everything else.

The layout rules are those of "Deploying Transformers on the Apple Neural Engine" (Apple Machine Learning
Research, June 2022): four dimensions, channels first; the last axis is not packed but padded to 64 bytes.
That a number of channels divisible by 8 helps is field experience, not in these sources.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from .mil import Operation, Program
from .mil.operations import CONSTANT

_RUNS = frozenset(
    ("conv 1x1", "split", "concat", "matmul", "softmax", "add", "sub", "mul", "reduce_mean", "relu")
)
_LIKELY = frozenset(("batch_norm", "gelu", "sigmoid", "linear"))  # and other convolutions
_ALIGNMENT = 64  # bytes, of the last axis
_CHANNELS = 8


class Kind(NamedTuple):
    """Operations of one type."""

    type: str  # of convolutions with the kernel's size and "depthwise"
    count: int
    fit: str  # "runs", "likely", "compile time" or "not known"


class Width(NamedTuple):
    """Maps of one shape at the default input size, in fp16 or what the program declares."""

    shape: tuple[int, ...]
    maps: int  # how many results have it
    aligned: bool  # channels
    padding: float  # memory of the last axis over its content


class NeuralEngineReport(NamedTuple):
    """How a program fits the Neural Engine; see the module for what this can and cannot say."""

    operations: tuple[Kind, ...]
    widths: tuple[Width, ...]  # of maps with four dimensions and more than one pixel
    findings: tuple[str, ...]  # what may keep it from the Neural Engine or slow it there
    done: tuple[str, ...]  # what the export did about it

    def __str__(self) -> str:
        lines = ["Neural Engine (by what Apple publishes; only a device can tell):"]
        for fit in ("runs", "likely", "not known", "compile time"):
            kinds = [f"{k.type} {k.count}" for k in self.operations if k.fit == fit]
            if kinds:
                lines.append(f"  {fit}: {', '.join(kinds)}")
        lines += [f"  - {finding}" for finding in self.findings]
        lines += [f"  + {done}" for done in self.done]
        return "\n".join(lines)


def examine(program: Program, done: tuple[str, ...] = ()) -> NeuralEngineReport:
    """Judge a saved program.

    Args:
        program: of the package.
        done: what the export did for the Neural Engine, to be reported with it.
    """
    kinds = tuple(
        Kind(name, count, _fit(name))
        for name, count in Counter(_type(op, program) for op in program.operations).most_common()
    )
    maps = Counter(
        (declared.shape, declared.dtype)
        for op in program.operations
        if not op.type.startswith(CONSTANT)
        for _, declared in op.outputs
        if declared is not None and len(declared.shape) == 4
    )
    widths = tuple(
        _width(tuple(size or 0 for size in shape), dtype, count)
        for (shape, dtype), count in maps.items()
        if None not in shape and shape[2:] != (1, 1)
    )
    return NeuralEngineReport(kinds, widths, tuple(_findings(program, kinds, widths)), done)


def _type(operation: Operation, program: Program) -> str:
    if operation.type != "conv":
        return operation.type
    shape = program.constant(operation, "weight").shape
    size = "x".join(map(str, shape[2:]))
    depthwise = shape[1] == 1 and int(program.constant(operation, "groups")) > 1
    return f"conv {size} depthwise" if depthwise else f"conv {size}"


def _fit(name: str) -> str:
    if name.startswith(CONSTANT):
        return "compile time"
    if name in _RUNS:
        return "runs"
    return "likely" if name in _LIKELY or name.startswith("conv ") else "not known"


def _width(shape: tuple[int, ...], dtype: str, count: int) -> Width:
    size = 4 if dtype == "FLOAT32" else 1 if dtype.endswith("INT8") else 2
    last = shape[-1] * size
    return Width(
        shape,
        count,
        shape[1] % _CHANNELS == 0 or shape[1] in (1, 3),
        -(-last // _ALIGNMENT) * _ALIGNMENT / last,
    )


def _findings(
    program: Program, kinds: tuple[Kind, ...], widths: tuple[Width, ...]
) -> list[str]:
    found = []
    unknown = [k.type for k in kinds if k.fit == "not known" and k.type not in ("cast", "classify")]
    if unknown:
        found.append(f"not in any network that Apple publishes for it: {', '.join(unknown)}")
    if any(k.type in ("cast", "classify") for k in kinds):
        found.append("cast and classify at the ends run on the CPU or are merged with the copy")
    results = [
        declared for op in program.operations for _, declared in op.outputs if declared is not None
    ]
    wide = [d for d in results if d.dtype == "FLOAT32"]
    if len(wide) > len(program.outputs):
        found.append("arithmetic in fp32: the Neural Engine computes in fp16, Core ML will not use it")
    if any(None in d.shape for d in results):
        found.append("flexible shapes: Core ML may leave the Neural Engine for other than the default")
    ranks = {len(d.shape) for d in results if not _constant(program, d)} - {0, 1, 2, 4}
    if ranks:
        found.append(f"tensors of {sorted(ranks)} dimensions: the Neural Engine wants 4")
    odd = sorted({w.shape[1] for w in widths if not w.aligned})
    if odd:
        found.append(
            f"channels that are no multiple of {_CHANNELS}: {', '.join(map(str, odd))} "
            "(pad_channels=True pads them)"
        )
    narrow = [w for w in widths if w.padding > 2]
    if narrow:
        found.append(
            "rows shorter than half of 64 bytes are padded: "
            + ", ".join(
                f"{w} wide {p:.1f}x" for w, p in sorted({(w.shape[-1], w.padding) for w in narrow})
            )
            + " (larger inputs or batches do not change that; the data lie in caches)"
        )
    return found


def _constant(program: Program, declared: object) -> bool:
    return any(
        op.type.startswith(CONSTANT) and any(d is declared for _, d in op.outputs)
        for op in program.operations
    )



"""`examine`: how a Core ML program fits the Neural Engine, as far as can be said without one.

Apple publishes no list of the operations of ML programs that its Neural Engine runs, and the engines
of different chips differ. What runs where is decided on the device: Xcode's performance report and
``MLComputePlan`` (macOS 14.4, iOS 17.4 and later) say it for a device at hand. What Apple does
publish are networks that run there, and principles for writing more of them. So the list is:

* ``runs``: operations of the reference transformer that Apple published for the Neural Engine
  (github.com/apple/ml-ane-transformers; its README reports that all but 4 of 606 operations run
  there, and these are embedding lookups): 1x1 convolutions, split, concat, matmul, softmax, add,
  sub, mul, reduce_mean, relu.
* ``likely``: further operations of convolutional networks for which Apple publishes Core ML packages
  and latencies on an iPhone (MobileOne, arXiv 2206.04040; FastViT, arXiv 2303.14189,
  github.com/apple/ml-fastvit): other convolutions, batch_norm, gelu, sigmoid, linear. The latencies
  do not name the compute unit of single operations. And quantize and dequantize: the guide of
  coremltools ("What's New" of its chapter on optimization) says that quantised activations are
  accelerated on the Neural Engine of A17 Pro and M4.
* ``compile time``: constants and their decompression, before anything runs.
* ``not known``: everything else.

The layout rules are those of "Deploying Transformers on the Apple Neural Engine" (Apple Machine
Learning Research, June 2022): four dimensions, channels first; the last axis is not packed but padded
to 64 bytes. That channels divisible by 8 help, and that flexible shapes hurt (coremltools issues 1764
and 2370), is experience from the field and not in these sources.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .mil import Operation, Program
from .mil.operations import CONSTANT
from .mil.values import TensorType

_RUNS = frozenset(
    ("conv 1x1", "split", "concat", "matmul", "softmax", "add", "sub", "mul", "reduce_mean", "relu")
)
_LIKELY = frozenset(  # and other convolutions
    ("batch_norm", "gelu", "sigmoid", "linear", "quantize", "dequantize")
)
_EDGES = frozenset(("cast", "classify"))
_MOVES = frozenset(("transpose", "reshape"))
_ALIGNMENT = 64  # bytes, of the last axis
_CHANNELS = 8


@dataclass(frozen=True)
class Kind:
    """Operations of one type."""

    type: str  #: of convolutions with the kernel's size and "depthwise"
    count: int
    fit: str  #: "runs", "likely", "compile time" or "not known"


@dataclass(frozen=True)
class Width:
    """Maps of one shape at the default input size, in fp16 or what the program declares."""

    shape: tuple[int, ...]
    maps: int  #: how many results have it
    aligned: bool  #: channels
    padding: float  #: memory of the last axis over its content


@dataclass(frozen=True)
class NeuralEngineReport:
    """How a program fits the Neural Engine, by what Apple publishes: only a device can tell."""

    operations: tuple[Kind, ...]
    layout: str
    widths: tuple[Width, ...]  #: of maps with four dimensions and more than one pixel
    findings: tuple[str, ...]  #: what may keep it from the Neural Engine or slow it there
    done: tuple[str, ...]  #: what the export did about it

    def __str__(self) -> str:
        lines = ["Neural Engine (by what Apple publishes; only a device can tell):"]
        for fit in ("runs", "likely", "not known", "compile time"):
            kinds = [f"{k.type} {k.count}" for k in self.operations if k.fit == fit]
            if kinds:
                lines.append(f"  {fit}: {', '.join(kinds)}")
        lines.append(f"  layout: {self.layout}")
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
    results = [
        declared
        for operation in program.operations
        if not operation.type.startswith(CONSTANT)
        for _, declared in operation.outputs
        if declared is not None
    ]
    maps = Counter(result for result in results if len(result.shape) == 4)
    widths = tuple(
        _width(tuple(size or 0 for size in result.shape), result.dtype, count)
        for result, count in maps.items()
        if None not in result.shape and result.shape[2:] != (1, 1)
    )
    findings = tuple(_findings(program, results, kinds, widths))
    return NeuralEngineReport(kinds, _layout(program, results), widths, findings, done)


def _layout(program: Program, results: list[TensorType]) -> str:
    four = sum(len(result.shape) == 4 for result in results)
    moves = sum(operation.type in _MOVES for operation in program.operations)
    return (
        f"NCHW, {four} of {len(results)} results have 4 dimensions, {moves} transposes or reshapes"
    )


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
    program: Program,
    results: list[TensorType],
    kinds: tuple[Kind, ...],
    widths: tuple[Width, ...],
) -> list[str]:
    found = []
    unknown = [k.type for k in kinds if k.fit == "not known" and k.type not in _EDGES]
    if unknown:
        found.append(f"in no network that Apple publishes for it: {', '.join(unknown)}")
    if sum(result.dtype == "FLOAT32" for result in results) > len(program.outputs):
        found.append("arithmetic in fp32, which Core ML does not give to the Neural Engine")
    if any(None in result.shape for result in results):
        found.append(
            "flexible shapes: for other than the default shape Core ML was seen to leave it"
        )
    ranks = {len(result.shape) for result in results} - {0, 1, 2, 4}
    if ranks:
        found.append(f"tensors of {sorted(ranks)} dimensions, where 4 are best")
    odd = sorted({w.shape[1] for w in widths if not w.aligned})
    if odd:
        found.append(
            f"channels that are no multiple of {_CHANNELS}: {', '.join(map(str, odd))} "
            "(pad_channels=True pads those of stages; outputs keep theirs)"
        )
    narrow = sorted({(w.shape[-1], w.padding) for w in widths if w.padding > 2})
    if narrow:
        found.append(
            f"rows padded to {_ALIGNMENT} bytes take more memory: "
            + ", ".join(f"{pixels} pixels {padding:.1f}x" for pixels, padding in narrow)
        )
    return found

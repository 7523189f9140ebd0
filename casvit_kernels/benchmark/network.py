"""The ways to compute a whole network on the CPU that are timed against each other, one by one.

Each is built in a process of its own (`worker.py`), which `processes.py` runs in turn: thread pools spin
after a call, and two of them in one process, or at the same time, disturb each other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.network import cpu
from ..ops.network.kernels import PRECISIONS
from .candidates import NETWORK, compiled, fused_model, network_of
from .timer import BF16, Unavailable, is_bf16

# With the suffix `BF16` all but ONNX Runtime, which has no such kernels: PyTorch under autocast,
# OpenVINO as it comes where it chooses bf16 by itself.
NETWORK_NAMES = (
    "eager",
    "eager channels_last",
    "compile",
    "compile channels_last",
    "compile frozen",
    "onnxruntime",
    "openvino",
    "fused",
    "fused channels_last",
    "fused compile channels_last",
    NETWORK,
)
# Without what has to be compiled or exported first.
QUICK_NETWORK_NAMES = tuple(
    n for n in NETWORK_NAMES if not {"compile", "onnxruntime", "openvino"} & set(n.split())
)
PACKAGES = {"onnxruntime": "export", "openvino": "bench"}  # and the extra that brings each


class Candidate(NamedTuple):
    """One way to compute a network."""

    prepare: Callable[[Tensor], Any]  # images to what `run` takes: not timed
    run: Callable[[Any], Any]  # what is timed; gives a tensor or an array
    facts: dict[str, str]  # what is worth knowing of it, such as the precision it chose


def precisions() -> list[str]:
    """Those in which a whole network runs here; none where the native library is missing."""
    return [name for name in PRECISIONS if cpu.has_precision(name)]


def names_for(precision: str, quick: bool = False) -> list[str]:
    """The candidates of a precision, ``"fp32"`` or ``"bf16"``."""
    names = QUICK_NETWORK_NAMES if quick else NETWORK_NAMES
    if precision == "fp32":
        return list(names)
    return [name + BF16 for name in names if name != "onnxruntime"]


def candidate(
    name: str, model: nn.Module, x: Tensor, onnx: Path | None = None, backend: str | None = None
) -> Candidate:
    """Build one candidate, compiled and warm.

    Args:
        name: out of `names_for`.
        model: plain, in eval mode, float32; it is changed, so hand over one of your own.
        x: ``(B, 3, H, W)`` float32, what will be timed: compilers get its shape.
        onnx: the model's file, of that shape, for those that read one.
        backend: of the fused mixers, None for the automatic choice.

    Raises:
        ValueError: the name is not known.
        Unavailable: it cannot be built here; says why.
    """
    plain, words = name.removesuffix(BF16), name.removesuffix(BF16).split()
    if plain not in NETWORK_NAMES or name == "onnxruntime" + BF16:
        raise ValueError(f"name: expected one of {', '.join(NETWORK_NAMES)}, got {name!r}")
    if plain in PACKAGES:
        needed = _installed(plain, onnx)
        build = _onnxruntime if plain == "onnxruntime" else _openvino
        return build(needed, x, is_bf16(name))
    if plain == NETWORK:
        with torch.inference_mode(False):  # inference tensors have no version to follow
            return Candidate(_as_it_is, network_of(model, is_bf16(name)), {})
    if words[0] == "fused":
        model = fused_model(backend, model)
    layout = torch.channels_last if "channels_last" in words else torch.contiguous_format
    model = model.to(memory_format=layout)
    prepare = partial(torch.Tensor.contiguous, memory_format=layout)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=is_bf16(name))
    run: Callable[[Any], Any] = model
    if "compile" in words:
        with autocast():
            run = compiled(model, prepare(x), "default", freezing="frozen" in words)
    if not is_bf16(name):
        return Candidate(prepare, run, {})

    def under_autocast(images: Tensor) -> Any:
        with autocast():
            return run(images)

    return Candidate(prepare, under_autocast, {})


def _as_it_is(images: Tensor) -> Tensor:
    return images


def _array(images: Tensor) -> Any:
    return images.contiguous().numpy()


def _installed(package: str, onnx: Path | None) -> Path:
    """The file to read.

    Raises:
        Unavailable: `package` or the file is missing.
    """
    if not importlib.util.find_spec(package):
        extra = PACKAGES[package]
        raise Unavailable(f"not installed: {package} (pip install 'casvit-kernels[{extra}]')")
    if onnx is None:
        raise Unavailable(f"{package} reads an ONNX file, there is none")
    return onnx


def _onnxruntime(path: Path, x: Tensor, bf16: bool) -> Candidate:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    return Candidate(
        _array,
        lambda images: session.run(None, {given: images})[0],
        {"version": onnxruntime.__version__},
    )


def _openvino(path: Path, x: Tensor, bf16: bool) -> Candidate:
    """For latency, in float32, or in the precision that it chooses itself."""
    import openvino

    asked: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    if not bf16:
        asked["INFERENCE_PRECISION_HINT"] = "f32"
    core = openvino.Core()
    made = core.compile_model(core.read_model(path), "CPU", asked)
    used = made.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if bf16 and used != "bf16":
        raise Unavailable(f"as it comes OpenVINO computes in {used} on this CPU")
    request = made.create_infer_request()

    def run(images: Any) -> Any:
        # Neither the input nor the output is copied.
        return request.infer({0: images}, share_inputs=True, share_outputs=True)[0]

    return Candidate(_array, run, {"version": openvino.__version__, "precision": used})

"""Exported whole models in ONNX Runtime, and the fused CPU path beside them, at 224x224 input.

The int8 files are calibrated with the photographs that ship with scikit-learn and scikit-image.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.case import Case, Choice, Settings
from bench.harness.measure import measure
from bench.harness.replay import replayed
from bench.harness.results import Measured
from bench.harness.statistics import randomise_statistics
from casvit_kernels import benchmark, fold_for_inference, fuse
from casvit_kernels import models as family
from casvit_kernels.export import to_onnx

PLAIN = "onnxruntime plain"  # torch.onnx.export of the reference, as it comes
EXPORTS: dict[str, dict[str, Any]] = {
    "onnxruntime unfolded": {"fold": False},
    "onnxruntime": {},
    "onnxruntime int8 unfolded": {"fold": False, "precision": "int8"},
    "onnxruntime int8": {"precision": "int8"},
}
NAMES = ("eager", PLAIN, *EXPORTS, "fused", "fused folded")
LARGE, ROUNDS_OF_LARGE = 64, 5  # images; seconds a call


def cases(choice: Choice) -> list[Case]:
    if choice.gpu:  # ONNX Runtime's CPU provider is what is measured
        return []
    size = 64 if choice.quick else 224
    batches = choice.batches if choice.quick else sorted({min(choice.batches), LARGE})
    return [Case("export", m, None, 3, size, b, "float32") for m in choice.models for b in batches]


def run(case: Case, names: list[str], settings: Settings) -> Measured:
    model = _model(case.model)
    fused = copy.deepcopy(model)
    fuse(fused, backend=settings.backend)
    folded = fold_for_inference(fused)
    x = torch.randn(case.batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))
    candidates: dict[str, Callable[[], object]] = {
        "eager": lambda: model(x),
        "fused": lambda: fused(x),
        "fused folded": lambda: folded(x),
    }
    candidates |= {
        name: _session_call(case.model, name, case.size, x) for name in (PLAIN, *EXPORTS)
    }
    if case.batch >= LARGE:
        settings = dataclasses.replace(settings, rounds=min(settings.rounds, ROUNDS_OF_LARGE))
    return measure(case, model, x, {name: candidates[name] for name in names}, settings)


@functools.lru_cache(maxsize=1)
def _model(name: str) -> nn.Module:
    _session.cache_clear()  # those of another model: they hold gigabytes
    torch.manual_seed(0)
    return randomise_statistics(getattr(family, f"rcvit_{name}")()).eval()


def _session_call(name: str, candidate: str, size: int, x: Tensor) -> Callable[[], object]:
    """Numpy in and out, as many threads as PyTorch; built by the first call."""

    def call() -> object:
        return _session(name, candidate, size).run(None, {"input": x.numpy()})[0]

    return call


@functools.cache
def _session(name: str, candidate: str, size: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise benchmark.Unavailable(f"not installed: {error.name}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "model.onnx")
        if candidate == PLAIN:
            torch.onnx.export(
                _model(name),
                (torch.randn(2, 3, size, size),),
                path,
                dynamo=True,
                external_data=False,
                input_names=["input"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        else:  # `measure` compares the numbers
            to_onnx(_model(name), path, size, batch="dynamic", verify=False, **EXPORTS[candidate])
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@replayed
def test_export(show: Callable[[], None]) -> None:
    show()

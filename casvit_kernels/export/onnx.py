"""`to_onnx`: export with torch's dynamo exporter, then run the file in ONNX Runtime and compare."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._optional import need
from . import _graph, _quantize
from ._common import (
    ExportError,
    ExportReport,
    Normalization,
    Prepared,
    culprit,
    prepare,
    quiet,
)
from .files import staged

OLDEST_OPSET = 17
_EXPORTER = 18  # the oldest that torch's exporter writes
MOST = 32  # images of the calibration that an 8-bit file is checked on
PRECISIONS = ("fp32", "fp16", "int8")


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    input_size: int | tuple[int, int] = 224,
    *,
    batch: int | Literal["dynamic"] = 1,
    dynamic_size: bool = False,
    opset: int = 20,
    precision: str = "fp32",
    fold: bool = True,
    normalize: Normalization | bool = False,
    calibration: Tensor | str | os.PathLike[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    example_input: Tensor | None = None,
) -> ExportReport:
    """Write ``model`` in eval mode as one ONNX file and check it in ONNX Runtime.

    The model, fused or not, is copied and left as it is. The copy's BatchNorms are folded, its qkv
    convolutions taken apart and its two heads joined, which ONNX Runtime computes quicker. The file
    is written under another name, passes ``onnx.checker``, is compared with the model in float64 on
    random input and on photographs, and only then moved to ``path``.

    Args:
        model: takes one tensor; gives one or several tensors (also in tuples, lists or dicts),
            which are called ``output`` or ``output0, output1, ...``, those of a dense backbone
            (``fork_feat``) ``stage1`` to ``stage4``. The input is called ``input``.
        path: ends in ``.onnx``.
        input_size: H and W of the input in pixels, one number or a pair. The number of channels is
            that of the model's first Conv2d.
        batch: images in a call, or ``"dynamic"``: any number of at least one, tried with three.
        dynamic_size: whether the file takes any H and W, tried with three.
        opset: 17 up to the newest that the installed ONNX Runtime runs.
        precision: ``"fp32"``; ``"fp16"``: half precision, means and input and outputs in float32;
            ``"int8"``: convolutions and linear layers in 8 bits by ONNX Runtime's static
            quantisation, gates and what lies between in float32.
        fold: whether BatchNorms are folded, see `casvit_kernels.fold_for_inference`.
        normalize: put the normalisation of the input into the file: ImageNet's, or a
            `Normalization`.
        calibration: for ``"int8"``: images from which value ranges are taken, either as the model's
            input ``(N, C, H, W)`` or as a directory. None: photographs that ship with scikit-learn
            and scikit-image; some hundred images of your own data are better.
        verify: whether the file's numbers are compared.
        overwrite: whether an existing file may be replaced.
        example_input: floating tensor that gives the shape instead of ``input_size``, ``batch`` and
            the first Conv2d.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model cannot compute such an input.
        FileExistsError, OSError: ``path`` exists, or its directory cannot be written to.
        ImportError: a package of the ``export`` extra is missing.
        ExportError: the model cannot be exported (the module is named), or the file was written and
            failed its check; it is removed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        need(package, "export")
    _check_arguments(batch, opset, precision, calibration)
    with staged(path, ".onnx", overwrite) as (final, draft):
        if final.is_dir():
            raise IsADirectoryError(f"path: expected a file name, got the directory {final}")
        dynamic = _Dynamic(batch == "dynamic", dynamic_size)
        count = 1 if isinstance(batch, str) else batch
        prepared = prepare(model, input_size, count, example_input, fold=fold, normalize=normalize)
        if dynamic_size and prepared.example.dim() != 4:
            raise ValueError(
                "dynamic_size: expected an input (N, C, H, W), "
                f"got an example of shape {tuple(prepared.example.shape)}"
            )
        notes = [f"{precision}, opset {opset}", *prepared.notes]
        images = None
        if precision == "int8":  # before the slow part: it may be refused
            images, note = _quantize.images(prepared, calibration)
            notes.append(note)
        written = _write(prepared, dynamic, opset)
        if precision == "fp16":
            _check_range(prepared)
            written = _quantize.half(written)
        elif images is not None:
            written, note = _quantize.static(written, images, draft.parent)
            notes.append(note)
        _save(written, draft, {**prepared.metadata, "precision": precision})
        _check_graph(draft, opset)
        found = _Found()
        if verify:
            found = _verify(prepared, draft, dynamic, precision, images, notes)
        else:
            notes.append("numbers not checked (verify=False)")
        size = draft.stat().st_size
    return ExportReport(
        path=final,
        format="onnx",
        bytes=size,
        max_error=found.worst,
        mean_error=found.mean,
        notes=tuple(notes),
        top1=found.top1,
        images=found.images,
    )


class _Dynamic(NamedTuple):
    batch: bool
    size: bool


def _check_arguments(batch: Any, opset: Any, precision: Any, calibration: Any) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if isinstance(batch, str) and batch != "dynamic":
        raise ValueError(f'batch: expected a positive integer or "dynamic", got {batch!r}')
    if calibration is not None and precision != "int8":
        raise ValueError(
            f'calibration: expected None with precision={precision!r}, for "int8" only'
        )
    newest = newest_opset()
    if (
        isinstance(opset, bool)
        or not isinstance(opset, int)
        or not (OLDEST_OPSET <= opset <= newest)
    ):
        raise ValueError(
            f"opset: expected an integer from {OLDEST_OPSET} to {newest}, the newest that this "
            f"ONNX Runtime runs, got {opset!r}"
        )


@functools.cache
def newest_opset() -> int:
    """The newest opset that the installed onnx writes and the installed ONNX Runtime runs."""
    onnx, runtime = need("onnx", "export"), need("onnxruntime", "export")
    for opset in range(onnx.defs.onnx_opset_version(), _EXPORTER, -1):
        values = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in ("x", "y")]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", values[:1], values[1:]
        )
        imports = [onnx.helper.make_opsetid("", opset)]
        model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
        try:
            with quiet():
                runtime.InferenceSession(
                    model.SerializeToString(), _options(), providers=["CPUExecutionProvider"]
                )
        except Exception:
            continue
        return opset
    return _EXPORTER


# Writing -----------------------------------------------------------------------------------------


def _write(prepared: Prepared, dynamic: _Dynamic, opset: int) -> Any:
    """The model as ONNX, float32, simplified."""
    program = _program(prepared, dynamic)
    made = _exported(program, prepared, max(opset, _EXPORTER))
    # The exporter may leave a version it cannot convert to, with operators of another.
    if _graph.version(made) != max(opset, _EXPORTER):
        made = _exported(program, prepared, _EXPORTER)
    _graph.simplify(made)
    made = _graph.convert(made, opset)
    _name_dimensions(made, dynamic)
    return made


def _program(prepared: Prepared, dynamic: _Dynamic) -> Any:
    example, shapes = prepared.example, None
    if any(dynamic):
        if dynamic.batch:  # torch.export would take a batch of one for a constant
            example = prepared.noise(max(2, example.shape[0]), *example.shape[1:])
        free = torch.export.Dim.DYNAMIC
        shapes = (dict.fromkeys([0] * dynamic.batch + [2, 3] * dynamic.size, free),)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(
                prepared.exported, (example,), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        name = culprit(prepared.exported, example, _exportable)
        raise ExportError(f"{name} cannot be exported: {_first_line(error)}") from error


def _exported(program: Any, prepared: Prepared, opset: int) -> Any:
    try:
        with quiet(), torch.no_grad():
            written = torch.onnx.export(
                program,
                dynamo=True,
                external_data=False,
                opset_version=opset,
                input_names=["input"],
                output_names=prepared.output_names,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"the model has an operator that ONNX cannot express: {_first_line(error)}"
        ) from error
    assert written is not None
    return written.model_proto


def _exportable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.export.export(module, args, kwargs, strict=False)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _name_dimensions(model: Any, dynamic: _Dynamic) -> None:
    """Call the free dimensions ``batch``, ``height`` and ``width`` in place of ``s77``."""
    wanted = {0: "batch"} if dynamic.batch else {}
    if dynamic.size:
        wanted.update({2: "height", 3: "width"})
    at = model.graph.input[0].type.tensor_type.shape.dim
    names = {at[i].dim_param: name for i, name in wanted.items()}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\w+", lambda m: names.get(m.group(), m.group()), dim.dim_param
                )


def _save(model: Any, draft: Path, metadata: dict[str, str]) -> None:
    onnx = need("onnx", "export")
    for node in model.graph.node:  # stack traces with the paths of this machine
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(draft))


def _check_graph(draft: Path, opset: int) -> None:
    onnx = need("onnx", "export")
    try:
        onnx.checker.check_model(str(draft), full_check=True)
    except Exception as error:
        raise ExportError(f"the exported file is no valid ONNX: {error}") from error
    model = onnx.load(str(draft))
    if _graph.version(model) != opset:
        raise ExportError(f"opset: asked for {opset}, the exporter wrote {_graph.version(model)}")
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"the exported file has operators outside ONNX: {sorted(foreign)}")


# Checking ----------------------------------------------------------------------------------------


class _Range(TorchDispatchMode):
    """Notes the first result that half precision cannot hold."""

    beyond: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(result):
            if self.beyond is None and isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.look(leaf, f"{func.name().removeprefix('aten::')} gives")
        return result

    def look(self, value: Tensor, what: str) -> None:
        finite = value[value.isfinite()]  # a mask of infinities stays one
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        if largest > torch.finfo(torch.float16).max:
            self.beyond = f"{what} {largest:.3g}"


def _check_range(prepared: Prepared) -> None:
    """On the CPU ONNX Runtime computes half precision in float32: it would not see an overflow."""
    pictures, _ = prepared.pictures()
    for x, _ in ((prepared.example, 0), *_full_batches(prepared, pictures)):
        seen = _Range()  # type: ignore[no-untyped-call]
        seen.look(x, "the input has")
        with torch.no_grad(), seen:
            prepared.exported(x)
        if seen.beyond is not None:
            raise ExportError(
                f"the model overflows in fp16: {seen.beyond}, half precision ends at 65504; "
                'precision="fp32" has more range'
            )


class _Found:
    """Errors over all that was compared."""

    def __init__(self) -> None:
        self.worst: float | None = None
        self.total = 0.0
        self.count = 0
        self.images = 0
        self.same = 0

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def top1(self) -> float | None:
        return self.same / self.images if self.images else None


def _verify(
    prepared: Prepared,
    draft: Path,
    dynamic: _Dynamic,
    precision: str,
    calibration: Tensor | None,
    notes: list[str],
) -> _Found:
    runtime = need("onnxruntime", "export")
    try:
        session = runtime.InferenceSession(
            str(draft), _options(), providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot run the exported file: {error}") from error
    found = _Found()
    pictures, note = prepared.pictures()
    if calibration is not None:  # the user's own images
        pictures, note = calibration[:MOST], "checked on images of the calibration"
    notes.append(note)
    for x in (prepared.example, *_noise(prepared, dynamic)):
        if calibration is None:
            _compare(prepared, session, x, precision, found)
        else:  # noise is outside the ranges of the calibration: other batches and sizes of images
            _run(prepared, session, x)
            _compare(prepared, session, _of_shape(calibration, x.shape), precision, found)
    for x, new in _full_batches(prepared, pictures):
        _compare(prepared, session, x, precision, found, new)
    return found


def _full_batches(prepared: Prepared, pictures: Tensor | None) -> Iterator[tuple[Tensor, int]]:
    """Pictures in batches as large as the example, and how many of each were not there before."""
    if pictures is None:
        return
    count = prepared.example.shape[0]
    for start in range(0, len(pictures), count):
        yield (
            pictures[torch.arange(start, start + count) % len(pictures)],
            min(count, len(pictures) - start),
        )


def _of_shape(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As many images of this size, the first ones again where there are too few."""
    chosen = images[torch.arange(shape[0]) % len(images)]
    if chosen.dim() == 4 and chosen.shape[2:] != shape[2:]:
        chosen = F.interpolate(chosen, size=shape[2:], mode="bilinear", antialias=True)
    return chosen


def _noise(prepared: Prepared, dynamic: _Dynamic) -> Iterable[Tensor]:
    count, *rest = prepared.example.shape
    noise = prepared.noise(count, *rest)
    if not torch.equal(noise, prepared.example):  # the caller gave the example
        yield noise
    if dynamic.batch:
        for n in (1, count + 2):
            yield prepared.noise(n, *rest)
    if dynamic.size:
        channels, height, width = rest
        for size in ((height + 32, width), (height + 17, width + 40)):
            yield prepared.noise(count, channels, *size)


def _options() -> Any:
    options = need("onnxruntime", "export").SessionOptions()
    options.log_severity_level = 4  # fatal: what else goes wrong is raised
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _run(prepared: Prepared, session: Any, x: Tensor) -> list[Tensor]:
    try:
        results = session.run(prepared.output_names, {"input": x.numpy()})
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run the exported file on {tuple(x.shape)}: {error}"
        ) from error
    return [torch.from_numpy(result) for result in results]


def _compare(
    prepared: Prepared, session: Any, x: Tensor, precision: str, found: _Found, images: int = 0
) -> None:
    """The first ``images`` of the batch are photographs not seen yet: their classes are counted."""
    results = _run(prepared, session, x)
    with torch.no_grad():
        truth = prepared.truth(x.double())
        eager = prepared.plain(x)
    for name, got, own, expected in zip(prepared.output_names, results, eager, truth, strict=True):
        if got.shape != expected.shape:
            raise ExportError(
                f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
            )
        difference = (got.double() - expected).abs()
        _judge(name, difference, own, expected, precision)
        found.worst = max(found.worst or 0.0, float(difference.max()))
        found.total += float(difference.sum())
        found.count += difference.numel()
        if "classes" in prepared.metadata:
            found.images += images
            found.same += int((got.argmax(1) == expected.argmax(1))[:images].sum())


def _judge(name: str, difference: Tensor, own: Tensor, expected: Tensor, precision: str) -> None:
    if precision == "int8":  # a single value says little: the error of all, against their spread
        spread = expected.std() if expected.numel() > 1 else expected.abs().max()
        error, bound = (
            float(difference.square().mean().sqrt()),
            float(spread) * _quantize.INT8_ERROR,
        )
        what = "root mean square "
    else:
        largest = float(expected.abs().max())
        # Ten times what PyTorch itself loses in float32, or about a hundred roundings; of half
        # precision, ten.
        rounding = {"fp32": 1e-5, "fp16": 1e-2}[precision] * largest
        error, bound = float(difference.max()), rounding
        bound = max(bound, 10 * float((own.double() - expected).abs().max()))
        what = ""
    if not error <= bound:
        raise ExportError(
            f"{name}: the exported file differs from the float64 reference by {what}{error:.3g}, "
            f"expected at most {bound:.3g}"
        )

"""Compares a saved Core ML package with its model by evaluating the program on the CPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...testing.numerics import AgainstTruth, against_truth
from ..converters import quiet
from ..prepare import Flat, Prepared
from ..report import ExportError
from .mil import Operation, Program
from .options import Options

# A compressed program may differ from the model by this much of the outputs' size (root mean
# square). A wrong program differs by about 1; what is usual is in docs/coreml.md.
LOOSEST = {"int8": 0.2, "palettized": 0.3, "int8 with activations": 0.5}


class Errors(NamedTuple):
    """Against float64, over all outputs and inputs."""

    max: float
    mean: float
    top1: float | None  # share of the images with the same largest output
    images: int


class _RoundedToHalf(TorchDispatchMode):
    """Every floating result of PyTorch is rounded to fp16 and goes on as it was."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def rounded(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.half().to(value.dtype)
            return value

        return _pytree.tree_map(rounded, func(*args, **(kwargs or {})))


def in_half(model: Flat) -> Flat:
    """A float32 copy of ``model`` with weights rounded to fp16."""
    halved = copy.deepcopy(model)
    for tensor in (*halved.parameters(), *halved.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(tensor.data.half())
    return halved


class Check:
    """Compares programs with one prepared model.

    Args:
        prepared: the model.
        shapes: of the inputs to try.
        labels: the program is a classifier with these labels; its probabilities are compared, and
            before the softmax, which hides errors of small ones, the class scores.
        tolerance: of compressed programs, in place of `LOOSEST`.
    """

    def __init__(
        self,
        prepared: Prepared,
        shapes: list[tuple[int, ...]],
        labels: tuple[str, ...] | None,
        tolerance: float | None = None,
    ) -> None:
        self._prepared = prepared
        self._tolerance = tolerance
        self._shapes = shapes
        self._labels = labels
        self._pictures, self.note = prepared.pictures()

    def inputs(self) -> list[tuple[Tensor, int]]:
        """Batches to try, each with how many of its images are photographs (the first ones)."""
        batches = [(self._prepared.noise(*shape), 0) for shape in self._shapes]
        if self._pictures is not None:
            size = self._shapes[0][0]
            for part in self._pictures.split(size):
                missing = size - len(part)
                batches.append(
                    (torch.cat([part, self._pictures[:1].expand(missing, -1, -1, -1)]), len(part))
                )
        return batches

    def program(self, program: Program, precision: str, whole_pixels: bool) -> Errors:
        """Compare a program.

        Args:
            program: as saved.
            precision: ``"fp32"``, ``"fp16"``, or a compressed one.
            whole_pixels: its input is an image, so whole numbers.

        Raises:
            ExportError: it gives other outputs than the model, other than by rounding.
        """
        errors = []
        score_name = None if self._labels is None else _input_of(program, "softmax")
        for x, photographs in self.inputs():
            x = x.round() if whole_pixels else x
            overflow: list[str] = []
            scores: list[Tensor] = []

            def notice(
                operation: Operation,
                value: Tensor,
                overflow: list[str] = overflow,
                scores: list[Tensor] = scores,
            ) -> None:
                if operation.outputs[0][0] == score_name:
                    scores.append(value.double())
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    overflow.append(f"{operation.type} ({operation.name})")

            results = program({"input": x}, notice)
            if overflow:
                raise ExportError(
                    f"the exported program overflows in {precision} at operation {overflow[0]}: "
                    'its result is not finite; precision="fp32" has more range'
                )
            with torch.no_grad():
                truth, own = self._prepared.truth(x.double()), self._own(x, precision)
            if self._labels is not None:
                self._compare(scores, truth, own, photographs, precision)
                truth, own = ((outputs[0].softmax(1),) for outputs in (truth, own))
            found = self._compare(self._outputs(results), truth, own, photographs, precision)
            errors.append(found)
        return _combined(errors)

    def _outputs(self, results: dict[str, Any]) -> list[Tensor]:
        names = self._prepared.output_names
        if self._labels is None:
            if set(results) != set(names):
                raise ExportError(
                    f"the exported program: expected outputs {names}, got {sorted(results)}"
                )
            return [results[name].double() for name in names]
        ranked = next(value for value in results.values() if isinstance(value, dict))
        if tuple(ranked) != self._labels:
            raise ExportError(
                f"the exported program: expected classes {self._labels[:4]} ..., "
                f"got {tuple(ranked)[:4]} ..."
            )
        return [torch.tensor([list(ranked.values())], dtype=torch.float64)]

    def _compare(
        self,
        results: list[Tensor],
        truth: tuple[Tensor, ...],
        own: tuple[Tensor, ...],
        photographs: int,
        precision: str,
    ) -> tuple[float, float, int, int, int]:
        """Largest error, sum of errors, their number, photographs alike, photographs."""
        prepared = self._prepared
        worst, total, count, alike = 0.0, 0.0, 0, 0
        for name, got, eager, expected in zip(
            prepared.output_names, results, own, truth, strict=True
        ):
            if got.shape != expected.shape:
                raise ExportError(
                    f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
                )
            difference = (got - expected).abs()
            if precision in LOOSEST:
                self._bound_size(name, difference, expected, precision)
            else:
                self._bound(name, against_truth(got, eager, expected), precision)
            worst = max(worst, float(difference.max()))
            total, count = total + float(difference.sum()), count + difference.numel()
        if photographs and self._classifies(truth):
            same = results[0].argmax(1) == truth[0].argmax(1)
            alike = int(same[:photographs].sum())
        else:
            photographs = 0
        return worst, total, count, alike, photographs

    def _own(self, x: Tensor, precision: str) -> tuple[Tensor, ...]:
        """What PyTorch computes with the same weights, rounded as often."""
        if precision != "fp16":
            plain: tuple[Tensor, ...] = self._prepared.plain(x)
            return plain
        if not hasattr(self, "_half"):
            self._half = in_half(self._prepared.plain)
        with _RoundedToHalf():  # type: ignore[no-untyped-call]
            rounded: tuple[Tensor, ...] = self._half(x)
        return rounded

    def _classifies(self, truth: tuple[Tensor, ...]) -> bool:
        return len(truth) == 1 and truth[0].dim() == 2 and truth[0].shape[1] > 1

    @staticmethod
    def _bound(name: str, found: AgainstTruth, precision: str) -> None:
        # Sums are rounded in another order than PyTorch's: a single output may be off by far more, the
        # mean may not. Two units in the last place of the largest output pass in any case.
        floor = 2 * torch.finfo(torch.float16 if precision == "fp16" else torch.float32).eps
        for what, got, bound in (
            ("at most", found.largest, found.bound(10, floor)),
            ("on average", found.mean, found.mean_bound(3, floor)),
        ):
            if not got <= bound:
                raise ExportError(
                    f"{name}: the exported program differs from the float64 reference by {got:.3g} "
                    f"{what}, expected no more than {bound:.3g} of {precision}"
                )

    def _bound_size(self, name: str, difference: Tensor, expected: Tensor, precision: str) -> None:
        allowed = LOOSEST[precision] if self._tolerance is None else self._tolerance
        relative = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
        if not relative <= allowed:
            raise ExportError(
                f"{name}: the exported program differs from the float64 reference by {relative:.1%} "
                f"of its size, expected at most {allowed:.0%} of {precision} (tolerance)"
            )


def _input_of(program: Program, kind: str) -> str | None:
    """The result that the last operation of a kind reads."""
    operation = [operation for operation in program.operations if operation.type == kind][-1]
    return operation.parameters["x"][0][0]


def compressed_constants(program: Program, original: Program, precision: str) -> None:
    """Hold every compressed constant to the one it was made from.

    int8: within half a step of its channel; palettized: no other entry of its table is nearer.

    Raises:
        ExportError: a constant is farther off, or has no original, or none is compressed.
    """
    if not any(operation.type.startswith("constexpr_") for operation in program.operations):
        raise ExportError(
            f"precision={precision!r}: coremltools compressed no weight, it leaves small ones alone"
        )
    for operation in program.operations:
        if not operation.type.startswith("constexpr_"):
            continue
        name = operation.outputs[0][0]
        source = name.removesuffix("_quantized").removesuffix("_palettized")
        if source not in original.constants:
            raise ExportError(f"the compressed constant {name} stands for none of the program's")
        got = program.constants[name].double()
        wanted = original.constants[source].double()
        rounding = 2.0**-10 * float(wanted.abs().max())
        if precision == "int8":
            allowed = wanted.abs().flatten(1).amax(1) / 127 / 2 + rounding
            far = (got - wanted).abs().flatten(1).amax(1) - allowed
        else:
            table = got.unique()
            nearest = torch.cat(
                [(part[:, None] - table).abs().amin(1) for part in wanted.flatten().split(1 << 16)]
            )
            far = (got - wanted).abs().flatten() - nearest - rounding
        if float(far.max()) > 0:
            raise ExportError(
                f"the compressed constant {name} is {float(far.max()):.3g} farther from the "
                f"model's weights than {precision} allows"
            )


def check_description(coremltools: Any, prepared: Prepared, options: Options, draft: Path) -> None:
    """Read the package as an application would, and hold its description to what was asked for."""
    with quiet():
        try:
            package = coremltools.models.MLModel(str(draft), skip_model_load=True)
        except Exception as error:
            raise ExportError(f"the exported package cannot be reloaded: {error}") from error
    spec = package.get_spec()
    got = {
        feature.name: tuple(feature.type.multiArrayType.shape)
        for feature in (*spec.description.input, *spec.description.output)
        if feature.type.WhichOneof("Type") == "multiArrayType"
    }
    wanted = {} if options.image_input else {"input": tuple(prepared.example.shape)}
    if options.labels is None:
        wanted |= dict(zip(prepared.output_names, prepared.outputs, strict=True))
    fixed = options.batch[0] == options.batch[1] and len(options.sizes) == 1
    if set(got) != set(wanted) or (fixed and got != wanted):
        raise ExportError(f"the exported package: expected inputs and outputs {wanted}, got {got}")
    if spec.specificationVersion > options.target.value:
        raise ExportError(
            f"deployment_target: asked for {options.target.name}, coremltools wrote "
            f"specification {spec.specificationVersion}, expected {options.target.value} at most"
        )


def check_prediction(coremltools: Any, prepared: Prepared, options: Options, draft: Path) -> str:
    """Compare Core ML's own prediction, on a Mac; a note on what was done."""
    if options.image_input or options.labels is not None:
        return "not predicted by Core ML itself: only tensor inputs and outputs are compared there"
    results = _predicted(coremltools, draft, prepared.example, prepared.output_names)
    if results is None:
        return "not predicted by Core ML itself, which needs a Mac"
    with torch.no_grad():
        truth = prepared.truth(prepared.example.double())
    worst = 0.0
    for name, got, expected in zip(prepared.output_names, results, truth, strict=True):
        worst = float((got.reshape(expected.shape) - expected).abs().max())
        size = float(expected.abs().max())
        allowed = size * {"fp32": 1e-3, "fp16": 0.1}.get(options.precision, 1.0)
        if not worst <= allowed:
            raise ExportError(
                f"{name}: Core ML's prediction differs from the float64 reference by {worst:.3g}, "
                f"expected at most {allowed:.3g}"
            )
    return f"Core ML on this Mac: max error {worst:.2g}"


def _predicted(coremltools: Any, draft: Path, x: Tensor, names: list[str]) -> list[Tensor] | None:
    """What Core ML itself computes, on a Mac; None elsewhere. Tensors in and out only."""
    if sys.platform != "darwin":
        return None
    package = coremltools.models.MLModel(str(draft))
    results = package.predict({"input": x.numpy()})
    return [torch.from_numpy(results[name]).double() for name in names]


def _combined(errors: list[tuple[float, float, int, int, int]]) -> Errors:
    images = sum(e[4] for e in errors)
    return Errors(
        max(e[0] for e in errors),
        sum(e[1] for e in errors) / sum(e[2] for e in errors),
        sum(e[3] for e in errors) / images if images else None,
        images,
    )

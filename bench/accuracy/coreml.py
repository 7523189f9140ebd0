"""How far Core ML packages are from the model, by evaluating what was saved on the CPU.

    python bench/accuracy/coreml.py    about 15 minutes, into bench/results/coreml_accuracy.json

rcvit_xs at 224x224 (the larger models in fp16 alone), photographs that ship with packages: weights
from a seed, BatchNorm with the photographs' statistics, a head whose outputs differ between images.
And the demo's network of handwritten digits, trained here, on all its test images: how many answers
are right.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casvit_kernels import models, photographs
from casvit_kernels.demo import network
from casvit_kernels.demo.training import BATCH, CONFIG, RATE, STEPS, Digits
from casvit_kernels.export import to_coreml
from casvit_kernels.export.mil import Program

RESULTS = Path(__file__).parents[1] / "results" / "coreml_accuracy.json"
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "fp16, padded channels": {"precision": "fp16", "pad_channels": True},
    "int8": {"precision": "int8"},
    "int8, calibrated": {"precision": "int8"},
    "palettized": {"precision": "palettized"},
}


@torch.no_grad()
def differing(name: str, pictures: Tensor) -> nn.Module:
    """The model with statistics of photographs and class scores that depend on the image."""
    model = network.build(name, None, 0)
    network.calibrate(model, pictures)
    for head in (model.head, model.dist_head):
        assert isinstance(head, nn.Linear)
        head.weight.mul_(20)
    return model


def trained(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    model = models.RCViT(CONFIG, num_classes=10, in_chans=1, distillation=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(len(digits.x), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(digits.x[chosen]), digits.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measure(
    model: nn.Module,
    x: Tensor,
    labels: Tensor | None,
    calibration: Tensor,
    cases: Iterable[str] = tuple(CASES),
) -> list[dict[str, Any]]:
    """One row for each case, on the images ``x`` (a multiple of the batch of 1 or `BATCH`)."""
    batch = 1 if labels is None else BATCH
    with torch.no_grad():
        truth = torch.cat([model.double()(part.double()) for part in x.split(batch)])
    model.float()
    rows = []
    for case in cases:
        options = CASES[case]
        more = {"calibration": calibration} if case.endswith("calibrated") else {}
        with tempfile.TemporaryDirectory() as folder:
            report = to_coreml(
                model,
                Path(folder, "model.mlpackage"),
                input_size=x.shape[-1],
                batch=batch,
                **options,
                **more,
            )
            program = Program(report.path)
            outputs = []
            for part in x.split(batch):
                full = torch.cat([part, x[: batch - len(part)]])
                outputs.append(program({"input": full})["output"][: len(part)])
        got = torch.cat(outputs).double()
        error = got - truth
        row = {
            "case": case,
            "images": len(x),
            "megabytes": round(report.bytes / 1e6, 2),
            "max_error": float(f"{error.abs().max():.3g}"),
            "mean_error": float(f"{error.abs().mean():.3g}"),
            "relative_rms": float(
                f"{error.square().mean().sqrt() / truth.square().mean().sqrt():.3g}"
            ),
            "same_top_class": int((got.argmax(1) == truth.argmax(1)).sum()),
        }
        if labels is not None:
            row["right"] = int((got.argmax(1) == labels).sum())
            row["right_float64"] = int((truth.argmax(1) == labels).sum())
        rows.append(row)
        print(*row.values(), flush=True)
    return rows


def main() -> None:
    pictures = photographs.load(None).batch()
    digits = Digits(0)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "coremltools": __import__("coremltools").__version__,
    }
    for name in ("rcvit_xs", "rcvit_s", "rcvit_m", "rcvit_t"):
        cases = CASES if name == "rcvit_xs" else ("fp16",)
        model = differing(name, pictures)
        result[f"{name}, 224x224"] = measure(model, pictures, None, pictures, cases)
    result["digits, trained"] = measure(
        trained(digits), digits.test_x, digits.test_y, digits.x[:256]
    )
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

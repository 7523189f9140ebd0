"""What 8 bits cost in accuracy: a small fused CAS-ViT, trained on handwritten digits, exported twice.

    python bench/accuracy/int8.py    a minute; into bench/results/int8_accuracy.json

Trained by examples/train_classification.py on three quarters of scikit-learn's digits; both files are
judged by ONNX Runtime on the other quarter. Calibrated with images of the training part.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from casvit_kernels import fuse, models
from casvit_kernels.export import to_onnx
from casvit_kernels.photographs import MEAN, STD

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "int8_accuracy.json"
LAYERS, DIMS, SIDE = (1, 1, 1, 1), (16, 24, 32, 48), 32
RECIPE = ("--epochs", 6, "--batch-size", 32, "--lr", 0.12, "--workers", 0, "--mixer", "fused")
CALIBRATION = 128  # images


def train(folder: Path) -> nn.Module:
    """The fused model after the recipe on ``folder/digits``, which is written."""
    sys.path.insert(0, str(ROOT / "examples"))
    import digits_as_images
    import train_classification

    digits_as_images.write(folder / "digits", SIDE)
    sizes = ("--layers", _commas(LAYERS), "--dims", _commas(DIMS))
    arguments = (folder / "digits", "--output", folder / "run", *digits_as_images.OPTIONS)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = train_classification.main([str(a) for a in (*arguments, *sizes, *RECIPE)])
    if status:
        raise RuntimeError(f"training ended with status {status}: {said.getvalue()}")
    model = models.RCViT(models.Config(LAYERS, DIMS), num_classes=10, distillation=False)
    models.load_checkpoint(model, folder / "run" / "last.pt")
    fuse(model)
    return model.eval()


def digits(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, SIDE, SIDE)``, normalised as the recipe does, and labels."""
    import numpy
    from PIL import Image

    paths = sorted((folder / "digits" / part).glob("*/*.png"), key=lambda path: path.name)
    pixels = numpy.stack([numpy.asarray(Image.open(path).convert("RGB")) for path in paths])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(), torch.tensor([int(path.parent.name) for path in paths])


def measure(folder: Path) -> dict[str, Any]:
    """Top-1 in percent of the model in PyTorch and of each exported file, and the files' bytes."""
    import onnxruntime

    model = train(folder)
    x, labels = digits(folder, "val")
    calibration = digits(folder, "train")[0][:CALIBRATION]
    with torch.inference_mode():
        found: dict[str, Any] = {"images": len(x), "top1": {"PyTorch": _top1(model(x), labels)}}
    found["bytes"] = {}
    for precision in ("fp32", "fp16", "int8"):
        report = to_onnx(
            model,
            folder / f"{precision}.onnx",
            SIDE,
            batch="dynamic",
            precision=precision,
            calibration=calibration if precision == "int8" else None,
        )
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {"input": x.numpy()})
        found["top1"][precision] = _top1(torch.from_numpy(out), labels)
        found["bytes"][precision] = report.bytes
    return found


def _top1(logits: Tensor, labels: Tensor) -> float:
    return round(100 * (logits.argmax(1) == labels).float().mean().item(), 2)


def _commas(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def main() -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    RESULTS.write_text(json.dumps({**versions, **found}, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""8 bits cost at most a point of accuracy: on digits, after a training of its own, and as committed."""

import importlib.util
import json
from pathlib import Path

import pytest

for package in (
    "onnx",
    "onnxscript",
    "onnxruntime",
    "timm",
    "torchvision",
    "tqdm",
    "sklearn",
    "PIL",
):
    pytest.importorskip(package)

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
spec = importlib.util.spec_from_file_location("int8_accuracy", BENCH / "accuracy" / "int8.py")
int8_accuracy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(int8_accuracy)


def assert_fine(found):
    top1 = found["top1"]
    assert found["images"] == 450
    assert top1["PyTorch"] >= 95
    assert top1["fp32"] == top1["PyTorch"]
    assert abs(top1["fp16"] - top1["fp32"]) <= 1
    assert abs(top1["int8"] - top1["fp32"]) <= 1


@pytest.mark.long
def test_int8_is_within_a_point_of_fp32(tmp_path):
    assert_fine(int8_accuracy.measure(tmp_path))


def test_the_committed_figures():
    assert_fine(json.loads(int8_accuracy.RESULTS.read_text()))

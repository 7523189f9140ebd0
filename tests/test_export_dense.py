"""Exports of detectors' backbones, with their pyramid, and of segmenters."""

import copy

import pytest
import torch
from test_folding import statistics
from test_onnx import run_onnx
from torch.utils import _pytree

from casvit_kernels.export import ExportError, to_coreml, to_onnx
from casvit_kernels.export.mil import Program
from casvit_kernels.models import Config

pytest.importorskip("torchvision")
onnx = pytest.importorskip("onnx")
from casvit_kernels.models.heads import mask_rcnn, retinanet, semantic_fpn  # noqa: E402

CONFIG = Config((1, 1, 1, 1), (8, 8, 16, 16))
SMALL = {"pyramid_channels": 16, "channels": 8}


def trained(model):
    statistics(model)
    return model.eval()


def backbone(head, fused=True):
    """The part of a detector that an exported file can hold: what is behind it depends on the image."""
    torch.manual_seed(0)
    build = retinanet if head == "retinanet" else mask_rcnn
    return trained(build(CONFIG, num_classes=3, fused=fused, channels=16).backbone)


def segmenter(fused=True):
    torch.manual_seed(0)
    return trained(semantic_fpn(CONFIG, num_classes=3, fused=fused, **SMALL))


def assert_near(results, model, x):
    """Each output is that of the model in float64."""
    with torch.no_grad():
        expected = _pytree.tree_leaves(copy.deepcopy(model).double()(x.double()))
    for got, value in zip(results, expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-4, atol=1e-5)


LEVELS = {
    "retinanet": ["p3", "p4", "p5", "p6", "p7"],
    "mask_rcnn": ["p2", "p3", "p4", "p5", "p6"],
}


@pytest.mark.parametrize(
    ("head", "fused"),
    [
        ("mask_rcnn", True),
        pytest.param("mask_rcnn", False, marks=pytest.mark.long),
        pytest.param("retinanet", True, marks=pytest.mark.long),
    ],
)
def test_a_detectors_backbone_in_onnx(tmp_path, head, fused):
    model = backbone(head, fused)
    report = to_onnx(model, tmp_path / "m.onnx", (160, 96), batch="dynamic", dynamic_size=True)
    assert report.max_error is not None  # compared with float64 by ONNX Runtime
    assert [o.name for o in onnx.load(report.path).graph.output] == LEVELS[head]
    for shape in ((1, 3, 160, 96), (2, 3, 129, 150)):
        x = torch.randn(shape)
        assert_near(run_onnx(report.path, x), model, x)


@pytest.mark.long
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_segmenter_in_onnx(tmp_path, fused):
    model = segmenter(fused)
    report = to_onnx(model, tmp_path / "m.onnx", (64, 96), batch="dynamic", dynamic_size=True)
    assert report.max_error is not None
    (out,) = onnx.load(report.path).graph.output
    assert out.name == "output"
    for shape in ((1, 3, 64, 96), (2, 3, 75, 50)):
        x = torch.randn(shape)
        assert_near(run_onnx(report.path, x), model, x)


@pytest.mark.long
@pytest.mark.parametrize("head", ["mask_rcnn", pytest.param("retinanet", marks=pytest.mark.long)])
def test_a_detectors_backbone_in_core_ml(tmp_path, head):
    pytest.importorskip("coremltools")
    model = backbone(head)
    report = to_coreml(model, tmp_path / "m.mlpackage", (160, 96), precision="fp32")
    program = Program(report.path)
    assert [o.name for o in program.outputs] == LEVELS[head]
    x = torch.randn(1, 3, 160, 96)
    assert_near(program({"input": x}).values(), model, x)


@pytest.mark.long
def test_a_segmenter_in_core_ml(tmp_path):
    pytest.importorskip("coremltools")
    model = segmenter()
    report = to_coreml(model, tmp_path / "m.mlpackage", (64, 96), precision="fp32")
    x = torch.randn(1, 3, 64, 96)
    assert_near(Program(report.path)({"input": x}).values(), model, x)


@pytest.mark.long
def test_maps_that_are_not_doubled_are_refused_for_core_ml(tmp_path):
    """7 rows from 4: a factor of 1.75, of which Core ML does not say what it takes."""
    pytest.importorskip("coremltools")
    with pytest.raises(ExportError, match="scale_factor_height"):
        to_coreml(segmenter(), tmp_path / "m.mlpackage", (100, 64))
    assert list(tmp_path.iterdir()) == []


def test_an_image_too_small_for_the_coarsest_level(tmp_path):
    with pytest.raises(ValueError, match=r"input_size: \(64, 64\) is too small for this model"):
        to_onnx(backbone("retinanet"), tmp_path / "m.onnx", 64)

"""Detectors and segmenters on an RCViT, as published with CAS-ViT, made of torchvision's parts.

`retinanet`, `mask_rcnn` and `semantic_fpn` build them; `load_dense_checkpoint` reads published
checkpoints (the layout of mmdetection and mmsegmentation) and those of these models. Needs torchvision:
``pip install "casvit-kernels[dense]"``.
"""

from ..._optional import need

need("torchvision", "dense")  # before the files below import it: the message names the extra

from .detection import MaskRCNN, RetinaNet, mask_rcnn, retinanet  # noqa: E402
from .loading import load_dense_checkpoint  # noqa: E402
from .pyramid import Pyramid  # noqa: E402
from .segmentation import SemanticFPN, semantic_fpn  # noqa: E402

__all__ = [
    "MaskRCNN",
    "Pyramid",
    "RetinaNet",
    "SemanticFPN",
    "load_dense_checkpoint",
    "mask_rcnn",
    "retinanet",
    "semantic_fpn",
]

"""Models of torchvision on small images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.families import Family, Made

PICTURES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("alexnet", 64, {}),
    ("resnet18", 32, {}),
    ("resnet50", 32, {}),
    ("resnext50_32x4d", 32, {}),
    ("squeezenet1_1", 32, {}),
    ("densenet121", 32, {}),
    ("googlenet", 64, {"init_weights": False, "aux_logits": False}),
    ("inception_v3", 96, {"init_weights": False, "aux_logits": False}),
    ("mobilenet_v2", 32, {"width_mult": 0.25}),
    ("mobilenet_v3_small", 32, {}),
    ("mobilenet_v3_large", 32, {}),
    ("shufflenet_v2_x0_5", 32, {}),
    ("mnasnet0_5", 32, {}),
    ("regnet_x_400mf", 32, {}),
    ("regnet_y_400mf", 32, {}),
    ("efficientnet_b0", 32, {}),
    ("convnext_tiny", 32, {}),
)
VIDEOS = ("r3d_18", "mc3_18", "r2plus1d_18")
SEGMENTS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")


def listed() -> list[Family]:
    """All of them."""
    made = []
    for name, size, given in PICTURES:
        made.append(Family(f"tv_{name}", "torchvision", partial(_picture, name, size, given)))
    made += [Family(f"tv_{name}", "torchvision", partial(_video, name)) for name in VIDEOS]
    made += [Family(f"tv_{name}", "torchvision", partial(_segmented, name)) for name in SEGMENTS]
    made += [
        Family("tv_vit", "torchvision", _vit),
        Family("tv_swin", "torchvision", _swin),
        Family("tv_maxvit", "torchvision", _maxvit),
        Family("tv_vgg", "torchvision", _vgg),
        Family("tv_fpn", "torchvision", _pyramid),
    ]
    return made


def _models(name: str) -> Callable[..., nn.Module]:
    found: Callable[..., nn.Module] = getattr(importlib.import_module("torchvision.models"), name)
    return found


def _picture(name: str, size: int, given: dict[str, Any]) -> Made:
    return _models(name)(weights=None, num_classes=7, **given), torch.randn(2, 3, size, size)


def _video(name: str) -> Made:
    make = getattr(importlib.import_module("torchvision.models.video"), name)
    return make(weights=None, num_classes=7), torch.randn(2, 3, 4, 32, 32)


def _segmented(name: str) -> Made:
    make = getattr(importlib.import_module("torchvision.models.segmentation"), name)
    return make(weights=None, weights_backbone=None, num_classes=7), torch.randn(2, 3, 64, 64)


def _vit() -> Made:
    make = _models("VisionTransformer")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48}
    return make(num_classes=7, **sizes), torch.randn(2, 3, 32, 32)


def _swin() -> Made:
    make = _models("SwinTransformer")
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return make(num_classes=7, **sizes), torch.randn(2, 3, 32, 32)


def _maxvit() -> Made:
    make = _models("MaxVit")
    sizes = {"input_size": (32, 32), "stem_channels": 16, "partition_size": 4, "block_channels": [16, 32]}
    model = make(num_classes=7, block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, **sizes)
    return model, torch.randn(2, 3, 32, 32)


def _vgg() -> Made:
    vgg = importlib.import_module("torchvision.models.vgg")
    features = vgg.make_layers([8, "M", 16, "M", 24, 24, "M"], batch_norm=True)
    model = nn.Sequential(
        features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 7)
    )
    return model, torch.randn(2, 3, 32, 32)


class _Pyramid(nn.Module):
    """A backbone, its feature pyramid, and one head for all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 8), (8, 12), (12, 16))])
        ops = importlib.import_module("torchvision.ops")
        self.pyramid = ops.FeaturePyramidNetwork([8, 12, 16], 10)
        self.head = nn.Conv2d(10, 7, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = {}
        for i, level in enumerate(self.levels):
            x = level(x).relu()
            found[str(i)] = x
        return tuple(self.head(part) for part in self.pyramid(found).values())


def _pyramid() -> Made:
    return _Pyramid(), torch.randn(2, 3, 32, 32)

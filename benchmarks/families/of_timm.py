"""The smallest model of each file of timm, on small images."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.families import Family, Made

SMALL = (
    "test_",
    "nano",
    "atto",
    "pico",
    "femto",
    "zepto",
    "xxs",
    "xx_small",
    "micro",
    "tiny",
    "_050",
    "_s0",
    "_t0",
    "x0_5",
)
SMALLISH = ("small", "_m0", "_b0", "18", "10", "xs", "mini", "lite", "_s", "_t", "_p", "13", "11", "9")
MOST_PARAMS = 24_000_000
SIZES = (32, 64, 96, 128, 192, 224, 256)
SHALLOW: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 64, "num_heads": 4},
    {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)},
    {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)},
    {"depths": (1, 1, 1, 1), "embed_dim": 32},
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1)},
    {},
)
"""Arguments with which some of the models have fewer layers, the smallest first."""

CLASSES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "crossvit": (
        "CrossVit",
        64,
        {"img_size": 64, "embed_dim": (32, 48), "depth": ((1, 1, 0), (1, 1, 0)), "num_heads": (4, 4)},
    ),
    "dla": ("DLA", 64, {"levels": (1, 1, 1, 2, 1, 1), "channels": (16, 16, 32, 48, 64, 80), "base_width": 28}),
    "dpn": ("DPN", 64, {"k_sec": (1, 1, 1, 1), "inc_sec": (8, 8, 8, 8), "k_r": 32, "groups": 8, "small": True}),
    "focalnet": ("FocalNet", 64, {"embed_dim": 16, "depths": (1, 1, 1, 1)}),
    "hiera": ("Hiera", 64, {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "hieradet_sam2": ("HieraDet", 64, {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    "metaformer": ("MetaFormer", 64, {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}),
    "vgg": ("VGG", 64, {"cfg": [8, "M", 16, "M", 24, "M"], "mlp_ratio": 0.01}),
    "volo": (
        "VOLO",
        64,
        {"img_size": 64, "layers": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [2, 4, 4, 4]},
    ),
}
"""Files of which no named model is small: a class, the size of its images, and arguments that make it so."""


def listed() -> list[Family]:
    """One family for each file of architectures."""
    importlib.import_module("timm")
    registry = importlib.import_module("timm.models._registry")
    files: dict[str, set[str]] = registry._module_to_models
    found = []
    for name, names in sorted(files.items()):
        make = partial(made, sorted(names))
        if name in CLASSES:
            make = partial(_of_class, name)
        found.append(Family(f"timm_{name}", "timm", make))
    return found


def _of_class(file: str) -> Made:
    """A model of a class of that file, and images."""
    name, size, given = CLASSES[file]
    torch.manual_seed(0)
    model: nn.Module = getattr(importlib.import_module(f"timm.models.{file}"), name)(num_classes=7, **given)
    return model.eval(), torch.randn(2, 3, size, size)


def made(names: Iterable[str]) -> Made:
    """The smallest of some models, and the smallest images that it takes.

    Raises:
        ValueError: none of them is small and runs.
    """
    errors = []
    for name in sorted(names, key=_by_size)[:4]:
        for more in SHALLOW:
            for size in SIZES:
                model, error = _model(name, size, more)
                if model is None:
                    errors.append(error)
                    break
                image = torch.randn(2, 3, size, size)
                try:
                    with torch.no_grad():
                        model(image)
                except Exception as failed:  # a larger one may do
                    errors.append(f"{name} {size}: {type(failed).__name__}: {failed}"[:120])
                    continue
                return model, image
    raise ValueError("; ".join(errors[-4:]))


def _by_size(name: str) -> tuple[int, int, str]:
    for i, marks in enumerate((SMALL, SMALLISH)):
        if any(mark in name for mark in marks):
            return i, len(name), name
    return 2, len(name), name


def _model(name: str, size: int, more: dict[str, Any]) -> tuple[nn.Module | None, str]:
    create = importlib.import_module("timm").create_model
    for given in ({"img_size": size}, {}):
        arguments = {"num_classes": 7, "pretrained": False, **given, **more}
        try:
            with torch.device("meta"):
                count = sum(p.numel() for p in create(name, **arguments).parameters())
        except TypeError:
            continue
        except Exception:  # not every model can be made without data
            count = 0
        if count > MOST_PARAMS:
            return None, f"{name} has {count} parameters"
        try:
            torch.manual_seed(0)
            model: nn.Module = create(name, **arguments).eval()
            return model, ""
        except Exception as failed:  # other arguments may do
            error = f"{name}: {type(failed).__name__}: {failed}"[:120]
            if given:
                continue
            return None, error
    return None, f"{name} takes none of these arguments"

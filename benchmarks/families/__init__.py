"""Families of networks in tiny random configurations: nothing is downloaded.

for family in families():
    model, inputs = family.build()
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families.axes import called, floats
from shallower.core.inputs import Inputs

Made = tuple[nn.Module, Inputs]


@dataclass(frozen=True)
class Family:
    """A family of networks.

    Attributes:
        name: unique.
        group: where it comes from, for people.
        make: a model and what it is called with.
    """

    name: str
    group: str
    make: Callable[[], Made]

    def build(self) -> Made:
        """The model in eval mode with its weights drawn anew, and its inputs; the same at every call."""
        randomise: Callable[[nn.Module], None] = importlib.import_module("tests.zoo").randomise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.make()
            model = with_head(model.eval(), inputs)
            randomise(model)
        # some keep what they made of their weights until they train
        return model.train().eval(), inputs


def families() -> list[Family]:
    """All of them, each name once."""
    found: dict[str, Family] = {}
    for name in ("known", "by_hand", "of_torchvision", "of_timm", "of_transformers"):
        made: list[Family] = importlib.import_module(f"benchmarks.families.{name}").listed()
        for family in made:
            found.setdefault(family.name, family)
    return list(found.values())


class Headed(nn.Module):
    """A model of which one linear layer reads the features, or of which the logits alone are wanted.

    Args:
        model: whose output is read.
        keys: which parts of the output; none where it is the first tensor.
        width: features that a linear layer reads; 0 where none does.
        dim: where they are.
    """

    def __init__(self, model: nn.Module, keys: tuple[str, ...], width: int = 0, dim: int = -1) -> None:
        super().__init__()
        self.model, self.keys, self.dim = model, keys, dim
        self.head = nn.Linear(width, 7) if width else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.model(*args, **kwargs)
        read = [made[key] for key in self.keys] if self.keys else floats(made)[:1]
        if self.head is not None:
            read = [self.head(part.movedim(self.dim, -1)) for part in read]
        return tuple(read)


class Framed(nn.Module):
    """A model of features between two linear layers, so that its own widths are not those of the input."""

    def __init__(self, model: nn.Module, inside: int = 16) -> None:
        super().__init__()
        self.stem, self.model, self.head = nn.Linear(5, inside), model, nn.LazyLinear(7)

    def forward(self, x: Tensor) -> Tensor:
        made = self.model(self.stem(x))
        read: Tensor = self.head(made if isinstance(made, Tensor) else torch.cat(tuple(made), -1))
        return read


LOGITS = ("logits", "predicted", "prediction", "reconstruction", "pred_boxes")
FEATURES = ("last_hidden_state", "pooler_output", "encoder_last_hidden_state", "feature_maps", "image_embeds")


def with_head(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A model that returns logits alone: those it has, or those of a linear layer on its features."""
    with torch.no_grad():
        outputs = called(model, inputs)
    if isinstance(outputs, Tensor):
        return model
    if not isinstance(outputs, Mapping):
        return model if all(isinstance(part, Tensor) for part in outputs) else Headed(model, ())
    present = [key for key, part in outputs.items() if isinstance(part, Tensor) and part.is_floating_point()]
    wanted = tuple(key for key in present if any(mark in key for mark in LOGITS))
    if wanted or not isinstance(outputs, dict):
        return Headed(model, wanted)
    if type(outputs) is dict:
        return Headed(model, tuple(present))
    features = [key for key in FEATURES if key in present] or present
    read = outputs[features[0]]
    dim = 1 if read.dim() == 4 else -1
    return Headed(model, (features[0],), read.shape[dim], dim)

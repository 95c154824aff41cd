"""The architectures of the tests' zoo."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import Family, Framed, Made


def _made(specimen: Any) -> Made:
    model, inputs = specimen.make()
    if isinstance(inputs, Tensor) and inputs.shape[1:] == (5, 16):
        framed, inputs = Framed(model).eval(), torch.randn(2, 5, 5)
        framed(inputs)
        return framed, inputs
    return model, inputs


def listed() -> list[Family]:
    """All of them."""
    specimens = importlib.import_module("tests.zoo").ZOO
    return [Family(each.name, "tests' zoo", partial(_made, each)) for each in specimens]

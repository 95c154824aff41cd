"""Functions have one name, however they are called."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shallower.recording.names import canonical, is_metadata, writes


def test_names_of_functions_methods_and_strings_agree() -> None:
    assert canonical(F.relu) == canonical("relu_") == canonical(torch.Tensor.relu_) == "relu"
    assert canonical("__rmul__") == canonical(torch.ops.aten.mul.Tensor) == "mul"


def test_properties_are_looked_at() -> None:
    name = canonical(torch.Tensor.shape.__get__)  # type: ignore[attr-defined]
    assert name == "get.shape"
    assert is_metadata(name)
    assert not is_metadata("relu")


def test_what_ends_in_an_underscore_writes() -> None:
    assert writes(torch.Tensor.add_, "add", {})
    assert writes(F.relu, "relu", {"inplace": True})
    assert not writes(torch.Tensor.__add__, "add", {})
    assert not writes(torch.Tensor.requires_grad_, "requires_grad", {})

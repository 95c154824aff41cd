"""Sources as text, and of which models there are any."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

from shallower.errors import ModelError
from shallower.saving.sources import format_options, parse_options, source_of, timm, torchvision


def test_options_are_written_as_they_are_read() -> None:
    options = {"num_classes": 10, "drop_rate": 0.5, "qkv_bias": True, "name": "a b&c"}
    assert parse_options(format_options("vit", options)) == ("vit", options)


@pytest.mark.parametrize("text", ["a?b", "a?b=1&b=2", "a?=1", "a?__class__=1", "a?b.c=1"])
def test_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(ModelError):
        parse_options(text)


@pytest.mark.parametrize("option", ["pretrained", "pretrained_cfg", "checkpoint_path", "weights", "cache_dir"])
def test_options_that_read_files_are_refused(option: str) -> None:
    with pytest.raises(ModelError, match="would read files"):
        timm("resnet18", {option: "x"}, False)
    with pytest.raises(ModelError, match="would read files"):
        torchvision("resnet18", {option: "x"}, False)


def test_a_name_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ModelError, match="did you mean resnet18"):
        torchvision("resnet_18", {}, False)


def test_a_model_that_no_library_has_made_has_no_source_and_nothing_is_imported_to_find_out() -> None:
    assert source_of(nn.Linear(2, 2)) == ""
    script = """
import sys
from torch import nn
from shallower.saving.sources import source_of
assert source_of(nn.Linear(2, 2)) == ""
assert not {"transformers", "torchvision", "timm"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

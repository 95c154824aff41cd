"""Options of squeezing: what is refused, and that they need no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.errors import MethodError
from shallower.methods.squeezing.options import SqueezeOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"round_to": 0},
        {"round_to": 1.5},
        {"compensation": 2.0},
        {"compensation": float("nan")},
        {"seed": 2**70},
        {"seed": -1},
        {"mask_of": 1},
        {"output_of": "logits"},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(wrong))):
        SqueezeOptions(**wrong)


def test_paths_are_multiples_of_what_widths_are() -> None:
    assert SqueezeOptions(round_to=8).path_multiple == 0
    assert SqueezeOptions(round_to=8, linear_path=True).path_multiple == 8


@pytest.mark.parametrize("name", ["producers", "seed", "round_to"])
def test_an_option_in_its_earlier_place_is_an_error_that_names_the_new_one(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    sites = sh.find_sites(model, torch.zeros(2, 4))
    with pytest.raises(TypeError, match=rf"options=sh.SqueezeOptions\({name}="):
        sh.squeeze(model, sites, [torch.randn(4, 4)], "params:50%", **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        sh.squeeze(model, sites, [torch.randn(4, 4)], "params:50%", colour=1)


def test_options_are_read_without_pytorch() -> None:
    code = "import sys, shallower.methods.squeezing.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Forwards with changes on instances: copied, pickled, told from what somebody else has put there."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.modules.edits import Externalise, Number, perform
from shallower.modules.forwards import foreign, has_foreign_forward
from shallower.sites import Written


class Block(nn.Module):
    """An activation that is a call, behind a number that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.up(x)[:, :8] * scale
        return self.down(F.pad(F.gelu(y), (0, 8 - y.shape[1])))


class Pointwise(nn.Module):
    """An activation that is a call, and is taken to be linear in every second block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def changed(*edits: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.ReLU())
    for edit in edits:
        perform(model, edit)
    return model.eval()


NUMBER = Number("0", Written((("self.up(x)[:, :8]", 0),), 4, 8), 5)
CALL = Externalise("0", (("gelu", 0),))


def through_pickle(model: nn.Module) -> nn.Module:
    again: nn.Module = pickle.loads(pickle.dumps(model))
    return again


def through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again: nn.Module = torch.load(buffer, weights_only=False)
    return again


@pytest.mark.parametrize("edits", [(NUMBER,), (CALL,), (NUMBER, CALL)], ids=["number", "call", "both"])
@pytest.mark.parametrize("way", [through_pickle, through_torch, copy.deepcopy])
def test_a_copy_does_the_same_and_owns_its_layers(
    edits: tuple[Any, ...], way: Callable[[nn.Module], nn.Module]
) -> None:
    model, x = changed(*edits), torch.randn(3, 6)
    if CALL in edits:
        model.get_submodule("0").gelu_0 = nn.ReLU()
    before = model(x)
    again = way(model)
    torch.testing.assert_close(again(x), before, rtol=0, atol=0)
    assert not torch.equal(before, changed()(x))
    again.get_submodule("0.up").weight.data.zero_()
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert not torch.equal(again(x), before)


def test_it_has_the_signature_of_the_original() -> None:
    model = changed(NUMBER)
    assert list(inspect.signature(model[0].forward).parameters) == ["x", "scale"]


def test_ours_is_not_foreign_and_another_is() -> None:
    model = changed(NUMBER, CALL)
    block: Any = model[0]
    assert foreign(block) == ""
    block.forward = functools.partial(block.forward)
    assert has_foreign_forward(block)
    assert foreign(block, "0") == "the forward of 0 has been replaced on the instance"


def test_hooks_are_named() -> None:
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_hook(lambda *_: None)
    assert "has a forward hook" in foreign(layer)
    handle.remove()
    assert foreign(layer) == ""


def test_a_second_search_finds_what_the_first_has_left() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Pointwise(), Pointwise()).eval(), torch.randn(3, 6)
    first = sh.find_sites(model, x, kinds="all")
    names = [site.name for site in first if site.activation is not None]
    assert len(names) == 2, str(first)
    small = sh.apply(model, sh.Plan.collapse(first.select(names[0])), x)
    left = [site.name for site in sh.find_sites(small, x, kinds="all") if site.activation is not None]
    assert left == names[1:]
    smaller = sh.apply(small, sh.Plan.collapse(sh.find_sites(small, x).select(names[1])), x)
    torch.testing.assert_close(through_pickle(smaller)(x), smaller(x), rtol=0, atol=0)

"""What surgery did goes where the changed modules go."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shallower as sh
from shallower.modules.edits import edits, replay
from shallower.modules.records import exchanged
from tests import networks

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
halved = partial(networks.halved, x=X)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_a_part_put_into_a_larger_model_brings_its_edits() -> None:
    whole = nn.Sequential(net(), nn.Linear(3, 2))
    whole[0] = halved(whole[0])
    assert [edit.name for edit in edits(whole)] == ["0.0", "0.2"]
    assert shapes(replay(nn.Sequential(net(), nn.Linear(3, 2)), edits(whole))) == shapes(whole)


def test_a_part_taken_out_keeps_its_edits() -> None:
    small = halved(nn.Sequential(net(), nn.Linear(3, 2)))
    part = small.get_submodule("0")
    assert shapes(replay(net(), edits(part))) == shapes(part)


def test_rounds_on_a_part_and_on_the_whole_keep_their_order() -> None:
    whole = nn.Sequential(net(), nn.ReLU(), nn.Linear(3, 2))
    whole[0] = halved(whole[0])
    small = halved(whole)
    small.set_submodule("0", halved(small.get_submodule("0")))
    fresh = nn.Sequential(net(), nn.ReLU(), nn.Linear(3, 2))
    assert shapes(replay(fresh, edits(small))) == shapes(small)


def test_a_deep_copy_has_the_same_edits() -> None:
    small = halved(net())
    assert edits(copy.deepcopy(small)) == edits(small)


def test_a_layer_behind_an_adapter_keeps_its_edit() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)  # type: ignore[no-any-return]

    small = halved(net())
    small.set_submodule("0", Adapter(small.get_submodule("0")))
    assert [edit.name for edit in edits(small)] == ["0.base", "2"]
    assert not list(exchanged(small))


def test_a_layer_that_took_the_place_of_an_edited_one_is_seen() -> None:
    small = halved(net())
    small.set_submodule("2", nn.Linear(4, 7))
    assert [name for name, _ in exchanged(small)] == ["2"]


class Twice(nn.Module):
    """One activation that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.f = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.f(self.a(x))
        return self.c(F.dropout(self.f(self.b(x)), training=self.training))  # type: ignore[no-any-return]


def test_calls_that_became_modules_are_made_again() -> None:
    model = Twice().eval()
    small = halved(model)
    assert shapes(replay(Twice(), edits(small))) == shapes(small)
    collapsed = sh.apply(small, sh.Plan.collapse(sh.find_sites(small, X).select("a")), X)
    again = replay(Twice().eval(), edits(collapsed))
    again.load_state_dict(collapsed.state_dict())
    assert torch.equal(again(X), collapsed(X))

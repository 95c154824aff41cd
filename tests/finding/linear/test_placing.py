"""Places of activations and dropouts that several calls share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallower.sites import Place
from tests.finding.linear.networks import Mlp, linear, only_site, reason, rows

# ---------------------------------------------------------------------- places of shared modules and dropouts


def test_one_activation_object_under_several_names_is_found_under_each() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(8, 12), act, nn.Linear(12, 8), act, nn.Linear(8, 4))
    assert [site.activation for site in linear(model, rows(3, 8))] == [Place("1"), Place("3")]


def test_one_activation_object_in_several_blocks_is_found_in_each() -> None:
    act = nn.ReLU()
    model = nn.Sequential(*(Mlp(lambda m, h: m.act(h), act=act) for _ in range(3)))
    assert [site.activation for site in linear(model, rows(3, 8))] == [Place(f"{i}.act") for i in range(3)]


def test_an_activation_module_called_twice_is_split_by_its_calls() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))  # type: ignore[no-any-return]

    sites = linear(Network(), rows(3, 8))
    assert [site.activation for site in sites] == [Place("", (("self.act", 0),)), Place("", (("self.act", 1),))]


def test_an_activation_that_cannot_be_rewritten_is_skipped_with_the_reason() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return self.fc2(h) if x.sum() > -1e9 else x  # type: ignore[no-any-return]

    assert "cannot be traced" in reason(Network(lambda _, h: h), rows(3, 8))


def test_dropouts_on_the_way_are_named() -> None:
    class Network(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(torch.relu(self.fc1(x)))
            return self.fc2(F.dropout(h, 0.1, self.training))  # type: ignore[no-any-return]

    site = only_site(Network(lambda _, h: h, drop=nn.Dropout(0.2)), rows(3, 8))
    assert set(site.dropouts) == {Place("drop"), Place("", (("dropout", 0),))}

"""Weights that a pass did not read may read the channels of a space in another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.finding.kinds import find_sites
from tests.followed import drawn


class Branch(nn.Module):
    """Which of two maps reads the hidden channels depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h) if len(x) < 5 else self.c(h)


class Experts(nn.Module):
    """The first of two experts takes all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x)


def test_a_branch_that_was_not_taken_closes_what_it_may_read() -> None:
    sites = find_sites(drawn(Branch()), torch.randn(2, 4), kinds="hidden")
    assert len(sites) == 0
    assert "`c.weight` is not used on the example inputs" in sites.skipped["a"]


def test_what_lies_within_an_expert_is_not_read_by_another() -> None:
    sites = find_sites(drawn(Experts()), torch.randn(2, 4), kinds="hidden")
    assert [site.name for site in sites] == ["experts.0.0"]


class Masked(Branch):
    """A token that takes the place of others while the model is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(3, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            h = h + self.token[0]
        return self.c(self.b(h))


def test_a_vector_that_was_not_added_closes_nothing() -> None:
    sites = find_sites(drawn(Masked()), torch.randn(2, 4), kinds="hidden")
    assert "a" in sites.names

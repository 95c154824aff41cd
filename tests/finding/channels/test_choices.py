"""Choices are found where a forward makes them every time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.channels import rules as rules
from shallower.finding.channels.choices import CallPlaces, choices_in
from shallower.finding.channels.following import Following
from shallower.finding.kinds import find_sites
from shallower.recording.tracing import trace_forward
from tests.experts import Mixture
from tests.followed import drawn


class Best(nn.Module):
    """Chooses for whoever asks."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.argmax(-1)


class Two(nn.Module):
    """Two routers that share the module that chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.best = Best()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(5, 6)
        self.a, self.b = nn.Parameter(torch.empty(4, 5)), nn.Parameter(torch.empty(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.a[self.best(self.first(x))]
        return x * self.b[self.best(self.second(x))]


def test_each_call_is_numbered_within_its_forward() -> None:
    (site,) = find_sites(drawn(Mixture(scores="softmax")), torch.randn(6, 5), kinds="experts")
    assert [(choice.function, choice.ordinal, choice.least) for choice in site.choices] == [
        ("softmax", 0, 1), ("topk", 0, 2)
    ]  # fmt: skip


def test_a_shared_module_that_chooses_is_looked_at_from_outside() -> None:
    model, x = drawn(Two()), torch.randn(9, 5)
    first, second = sites = find_sites(model, x, kinds="experts")
    assert [(choice.module, choice.ordinal) for choice in (*first.choices, *second.choices)] == [("", 0), ("", 1)]
    plan = sh.Plan(tuple(sh.Entry.narrow(site, [1, 3]) for site in sites))
    small, other = sh.apply(model, plan, x), torch.randn(30, 5)
    assert (small.a.shape, small.b.shape) == ((2, 5), (2, 5))
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))


def test_a_choice_among_other_channels_each_time_is_lost() -> None:
    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.two(x))

    f = Following(trace_forward(drawn(Often()), torch.randn(9, 5)))
    assert not choices_in(f, CallPlaces(f)).lost

"""Which numbers fall with the channels, and which forwards do not follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.finding.channels.trials.trying import that_follow
from shallower.recording.tracing import trace_forward
from shallower.sites import Site


def tried(model: nn.Module, x: Tensor) -> tuple[list[Site], dict[str, str]]:
    f = Following(trace_forward(model, x))
    found, skipped, _ = that_follow(model, x, f, (), ("hidden", "heads", "stream"))
    return found, skipped


class Split(nn.Module):
    """Two parts of one map, divided where an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 4
        self.a, self.b, self.c = nn.Linear(3, 10), nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h[..., : self.parts]) + self.c(h[..., self.parts :])


class LooksAtNumbers(nn.Module):
    """A forward that needs data: it cannot be tried without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.limit = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if float(self.limit) > 1:
            h = h * 2
        return self.b(h)


class Halves(nn.Module):
    """A view that runs with fewer channels, too, and then divides them otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h.view(len(x), self.heads, -1).softmax(-1)
        return self.b(h.flatten(1))


def test_a_number_of_the_module_falls_with_its_part() -> None:
    found, skipped = tried(Split(), torch.randn(2, 3))
    assert not skipped
    followers = {site.width: [(f.attribute, f.each) for f in site.followers] for site in found}
    assert followers == {4: [("parts", 1)], 6: []}


def test_a_forward_that_looks_at_numbers_is_tried_with_them() -> None:
    found, skipped = tried(LooksAtNumbers(), torch.randn(2, 4))
    assert [site.width for site in found] == [6]
    assert not skipped


def test_a_view_that_would_divide_otherwise_is_seen() -> None:
    found, _ = tried(Halves(), torch.randn(2, 4))
    (heads,) = [site for site in found if site.kind == "heads"]
    assert [(f.attribute, f.each) for f in heads.followers] == [("heads", 1)]


@pytest.mark.parametrize("count", [2, 3])
def test_what_does_not_follow_does_not_keep_others_from_it(count: int) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.relu() if h.shape[-1] == 8 else h.relu().relu())

    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(count)), Own(), nn.Tanh())
    found, skipped = tried(model, torch.randn(2, 4))
    assert sorted(site.width for site in found if not site.name.endswith("stream"))[-count:] == [6] * count
    assert any("does not follow" in reason for reason in skipped.values())


class OneNumberForTwo(nn.Module):
    """Gives the width of one layer to a reshape of what another of the same width makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        n, width = h.shape
        return self.c(self.b(h).reshape(n, width))


@pytest.mark.parametrize("width", [8, 12, 20])
def test_two_layers_of_one_width_are_cut_by_themselves(width: int) -> None:
    model, x = OneNumberForTwo(width).eval(), torch.randn(5, 4)
    sites = sh.find_sites(model, x)
    assert [site.width for site in sites] == [width, width]
    for site in sites:
        plan = sh.Plan((sh.Entry.narrow(site, range(width // 2)),))
        torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), sh.simulate(model, plan)(x + 1))


def test_rows_that_are_shared_out_by_numbers_are_no_sizes() -> None:
    class SharedOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.choose = nn.Linear(4, 6), nn.Linear(6, 2)
            self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            first = self.choose(h).argmax(-1) == 0
            rows = torch.cat((h[first], h[~first]))
            one, two = rows.split([int(first.sum()), int((~first).sum())])
            return torch.cat((self.b(one), self.c(two)))

    torch.manual_seed(0)
    found, _ = tried(SharedOut(), torch.randn(20, 4))
    assert [site.width for site in found] == [6]


class Cascade(nn.Module):
    """Divides what each of several layers gives by the same numbers, in one loop."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(5, 11) for _ in range(3))
        self.last = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for part in self.parts:
            a, b, v = part(x).split([4, 4, 3], -1)
            found.append((a * b).sum(-1, keepdim=True).sigmoid() * v)
        return self.last(torch.cat(found, -1))


def test_channels_that_one_number_counts_at_several_calls_are_cut_alike() -> None:
    model, x = Cascade().eval(), torch.randn(6, 5)
    sites = sh.find_sites(model, x)
    assert sorted(site.width for site in sites) == [3, 4]
    assert all({f"parts.{i}" for i in range(3)} <= set(site.layers) for site in sites)
    plan = sh.Plan(tuple(sh.Entry.narrow(site, range(1, site.width)) for site in sites))
    small = sh.apply(model, plan, x)
    assert [part.out_features for part in small.parts] == [8, 8, 8]
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))


class Multiplied(nn.Module):
    """Depthwise convolutions, the first of which makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.c, self.d = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_channels_within_each_other_are_cut_each_by_itself() -> None:
    model, x = Multiplied().eval(), torch.randn(2, 3, 5, 5)
    wide, narrow = sh.find_sites(model, x)
    assert (wide.width, narrow.width) == (6, 2)
    plan = sh.Plan((sh.Entry.narrow(wide, [0, 2, 3, 5]),))
    small = sh.apply(model, plan, x)
    assert (small.b.groups, small.c.groups) == (4, 8)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))


def test_channels_within_each_other_are_cut_together() -> None:
    model, x = Multiplied().eval(), torch.randn(2, 3, 5, 5)
    plan = sh.Plan(tuple(sh.Entry.narrow(site, range(site.width // 2)) for site in sh.find_sites(model, x)))
    small = sh.apply(model, plan, x)
    assert (small.b.groups, small.c.groups) == (3, 3)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))

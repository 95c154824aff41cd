"""Sizes that are written in calls fall there with the channels that they count."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import shallower as sh
from tests.followed import drawn


class Packed(nn.Module):
    """Attention by one map of three parts: each is the heads times the features of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (part.view(len(x), -1, 4, 3).transpose(1, 2) for part in self.packed(x).split(12, -1))
        made = (queries @ keys.mT).softmax(-1) @ values
        y: Tensor = self.out(made.transpose(1, 2).reshape(len(x), -1, 12))
        return y


class InOneFunction(nn.Module):
    """What is compared and what is averaged have as many features, which one call of a function counts."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        def shape(states: Tensor) -> Tensor:
            return states.view(len(x), -1, 4, 3).transpose(1, 2)

        made = (shape(self.queries(x)) @ shape(self.keys(x)).mT).softmax(-1) @ shape(self.values(x))
        y: Tensor = self.out(made.transpose(1, 2).flatten(2))
        return y


def cut(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Cut all sites at once; their kinds and widths."""
    sites = sh.find_sites(model, x, kinds="all").select(lambda site: site.followed)
    plan = sh.Plan(tuple(sh.Entry.narrow(site, range(site.width // 2)) for site in sites))
    small, other = sh.apply(model, plan, x), torch.randn(3, 7, x.shape[-1])
    torch.testing.assert_close(small(other), sh.simulate(model, plan)(other))
    return {f"{site.kind} {site.name}": site.width for site in sites}


def test_a_number_of_heads_times_features_falls_with_both() -> None:
    found = cut(drawn(Packed()), torch.randn(2, 5, 6))
    assert sorted(found.values()) == [3, 4]


def test_where_one_call_counts_two_kinds_of_channels_they_are_cut_alike() -> None:
    found = cut(drawn(InOneFunction()), torch.randn(2, 5, 12))
    assert sorted(found.values()) == [3, 4]


def test_where_the_size_of_one_value_is_given_to_another_both_are_cut_alike() -> None:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.up, self.down, self.b = nn.Linear(4, 6), nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            y = self.down(self.up(h).sin() + 1)
            return self.b(y.view(x.shape[0], 1, h.shape[-1]).sum(1).cos())

    model, x = Latent().eval(), torch.randn(5, 4)
    sites = sh.find_sites(model, x, kinds="hidden")
    both = next(site for site in sites if site.width == 6)
    assert {"a.weight", "down.weight"} <= {slot.tensor for slot in both.slots}
    small = sh.apply(model, sh.Plan((sh.Entry.narrow(both, [0, 2, 5]),)), x)
    assert (small.a.out_features, small.down.out_features) == (3, 3)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, sh.Plan((sh.Entry.narrow(both, [0, 2, 5]),)))(x + 1))

"""Runs of channels as sites."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.channels import rules as rules
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import reason_of
from shallower.finding.channels.spaces import followed_sites
from shallower.finding.kinds import find_sites
from shallower.recording.tracing import trace_forward
from tests.followed import Attending, Excited, Stages, drawn


def followed(model: nn.Module, *shape: int) -> Following:
    return Following(trace_forward(model, torch.randn(shape)))


def test_every_space_has_all_its_tensors_and_buffers() -> None:
    found, _ = followed_sites(followed(Excited(), 1, 6, 5, 5), ())
    expand = next(each.site for each in found if each.site.name == "expand")
    assert {slot.tensor for slot in expand.slots if not slot.trained} == {"norm.running_mean", "norm.running_var"}
    assert len(expand.slots) == 11


def test_known_sites_are_left_out() -> None:
    model, x = Stages(), torch.randn(1, 3, 8, 8)
    f = Following(trace_forward(model, x))
    everything = {each.run for each in followed_sites(f, ())[0]}
    rest = followed_sites(f, find_sites(model, x))[0]
    assert {each.run for each in rest} < everything
    assert {"stem:stream", "down:stream"} <= {each.site.name for each in rest}


def test_products_of_attention_count_for_each_head() -> None:
    found, _ = followed_sites(followed(Attending(), 2, 5, 8), ())
    heads = next(each.site for each in found if each.site.kind == "heads")
    # a key-value group of two query heads: q k^T and p v, 2 rows x 2 heads x 5 x 5 x 3 features each
    assert heads.products == heads.width * 2 * (2 * 2 * 5 * 5 * 3)


def test_sites_come_in_order_of_execution() -> None:
    found, _ = followed_sites(followed(Stages(), 1, 3, 8, 8), ())
    positions = [each.position for each in found]
    assert positions == sorted(positions)


def test_channels_that_are_refused_say_why_wherever_they_stand() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x).relu()
            pairs = h[:, :, None] * h[:, None, :]
            return self.b(h * pairs.mean(1))

    model = Averaged()
    f = followed(model, 2, 4)
    _, closed = followed_sites(f, ())
    assert closed["a"].startswith("an average over its channels")
    assert reason_of(f.axes(f.trace.weights[model.b, "weight"])[1]) == closed["a"]


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out)
        self.down, self.up = nn.Linear(d_in, 3, bias=False), nn.Linear(3, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class AdaptedBlock(nn.Module):
    """A gated MLP whose layers have adapters, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.wide, self.narrow = nn.Linear(8, 12), Adapted(8, 12), Adapted(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.sigmoid(self.gate(x)) * self.wide(x))


def test_adapters_are_cut_with_their_layers_and_make_no_stream_of_what_is_hidden() -> None:
    model, x = drawn(nn.Sequential(nn.Linear(5, 8), AdaptedBlock(), AdaptedBlock(), nn.Linear(8, 4))), torch.randn(3, 5)
    sites = find_sites(model, x, kinds=("hidden", "stream"))
    assert Counter((site.kind, site.width) for site in sites) == {("stream", 8): 1, ("hidden", 12): 2, ("hidden", 3): 4}
    plan = sh.Plan(tuple(sh.Entry.narrow(site, range(1, site.width)) for site in sites))
    small = sh.apply(model, plan, x)
    assert (small[1].wide.base.out_features, small[1].wide.up.out_features) == (11, 11)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))

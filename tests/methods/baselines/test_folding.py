"""Folding: equal rows merge without a loss, and merged rows vary as much as their members."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.methods.baselines.folding import clusters, folded
from shallower.methods.baselines.view import View


class Normed(nn.Module):
    """A convolution, a BatchNorm with statistics of its own, and a convolution that pads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 4, 3, padding=1)
        with torch.no_grad():
            for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.norm(self.up(x)).relu())
        return y


class Gated(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def plain(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.GELU(), nn.Linear(width, 3))


@torch.no_grad()
def with_twins(model: nn.Module, names: list[str]) -> nn.Module:
    """The second half of the channels is like the first."""
    for name in names:
        for tensor in (*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers()):
            if tensor.dim():
                half = len(tensor) // 2
                tensor[half:] = tensor[:half]
    return model.eval()


@pytest.mark.parametrize("kind", ["plain", "normed", "gated"])
def test_channels_with_equal_rows_merge_without_a_loss(kind: str) -> None:
    torch.manual_seed(0)
    model, x = {
        "plain": lambda: (with_twins(plain(8), ["0"]), torch.randn(6, 5)),
        "normed": lambda: (with_twins(Normed(8), ["up", "norm"]), torch.randn(2, 3, 6, 6)),
        "gated": lambda: (with_twins(Gated(8), ["gate", "up"]), torch.randn(2, 4, 5)),
    }[kind]()
    (site,) = find_sites(model, x)
    entry = folded(View(model, site), 4)
    small = sh.apply(model, sh.Plan((entry,)), x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "normed"])
def test_a_merged_row_is_as_long_as_its_members_are_on_average(kind: str) -> None:
    torch.manual_seed(0)
    model, x = (plain(8), torch.randn(6, 5)) if kind == "plain" else (Normed(8), torch.randn(2, 3, 6, 6))
    model.eval()
    (site,) = find_sites(model, x)
    entry = folded(View(model, site), 1)
    assert entry.fit is not None
    assert entry.fit.producer is not None
    rows, scale = model.get_submodule(site.producer.name).weight.flatten(1), torch.ones(8)  # type: ignore[union-attr]
    if kind == "normed":
        scale = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach()
    made = entry.fit.producer.flatten() * scale[entry.kept]
    wanted = (rows * scale[:, None]).square().sum(1).mean().sqrt()
    average = (rows * scale[:, None]).mean(0).norm()
    # rows at right angles lose a factor of the root of their number, and no more is given back
    torch.testing.assert_close(made.norm(), torch.minimum(wanted, average * 8**0.5))


def test_behind_a_norm_the_merged_channel_is_the_mean_of_its_members_scaled_about_the_shift() -> None:
    torch.manual_seed(0)
    model, x = Normed(6).eval(), torch.randn(2, 3, 6, 6)
    (site,) = find_sites(model, x)
    small = sh.apply(model, sh.Plan((folded(View(model, site), 1),)), x)
    with torch.no_grad():
        mean, merged = model.norm(model.up(x)).mean(1), small.norm(small.up(x))[:, 0]
        shift = model.norm.bias.mean()
    ratio = (merged - shift) / (mean - shift)
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-2, atol=1e-2)
    assert ratio.median() > 1


def test_clusters_find_groups_that_lie_apart() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    points = centres.repeat_interleave(5, 0) + 0.1 * torch.randn(20, 2)
    label = clusters(points, 4)
    assert len(set(label.tolist())) == 4
    assert all(len(set(part.tolist())) == 1 for part in label.split(5))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_every_cluster_has_a_member_even_of_equal_points(k: int) -> None:
    points = torch.tensor([[0.0], [0], [0], [0], [1], [1]])
    assert sorted(set(clusters(points, k).tolist())) == list(range(k))


class Between(nn.Module):
    """A depthwise convolution between the activation and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.up, self.middle = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.middle(self.up(x + self.first(x)).relu()).relu())
        return y


def test_channels_with_numbers_of_their_own_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Between().eval(), torch.randn(2, 3, 6, 6)
    sites = find_sites(model, x).select(lambda site: site.bridge.not_narrow is None)
    plan = sh.baseline("folding", model, sites, [], "params:90%")
    assert [entry.site.name for entry in plan.entries] == ["first"]
    assert any("numbers of its own" in reason for reason in plan.left_out.values())


def test_sites_that_share_a_layer_are_folded_one_after_the_other() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(3, 5)
    plan = sh.baseline("folding", model, find_sites(model, x), [], "params:60%")
    small = sh.apply(model, plan, x)
    assert small[2].in_features < 8
    assert small[2].out_features < 6

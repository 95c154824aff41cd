"""Streams of convolution stages, and what was followed to several readers, squeezed in one budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.calibrating import collecting
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import count_macs, count_params
from shallower.methods.offered import offered
from shallower.methods.squeezing.squeeze import narrowable, squeeze
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply


class Stage(nn.Module):
    """A residual block with a projection where it strides."""

    def __init__(self, d_in: int, d_out: int, stride: int, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(d_in, d_out, 3, stride, 1), nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(d_out)
        self.bn2: nn.Module = nn.BatchNorm2d(d_out) if norm else nn.Identity()
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Conv2d(d_in, d_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


class OwnConvolution(nn.Conv2d):
    """A convolution with a forward of its own, as some code has."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Inverted(nn.Module):
    """An inverted residual of such convolutions."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.expand, self.bn0 = OwnConvolution(d, 3 * d, 1, bias=False), nn.BatchNorm2d(3 * d)
        self.depthwise, self.bn1 = nn.Conv2d(3 * d, 3 * d, 3, padding=1, groups=3 * d), nn.BatchNorm2d(3 * d)
        self.project, self.bn2 = OwnConvolution(3 * d, d, 1, bias=False), nn.BatchNorm2d(d)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.bn1(self.depthwise(torch.relu(self.bn0(self.expand(x))))))
        y: Tensor = self.bn2(self.project(z))
        return x + y


def staged(norm: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), Stage(8, 8, 1, norm), Stage(8, 16, 2, norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def inverted() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), Inverted(8), Inverted(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def images(rows: int = 96) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    rough = torch.randn(rows, 3, 8, 8, generator=draw)
    return nn.functional.interpolate(rough, scale_factor=1.5, mode="bilinear")


def seen(model: nn.Sequential) -> nn.Sequential:
    """The model with the statistics of these images."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(images())
    return model.eval()


def found(model: nn.Module, *kinds: str) -> Sites:
    return find_sites(model, images(2), kinds=kinds or ("hidden", "stream"))


def distance(model: nn.Module, small: nn.Module) -> float:
    with torch.no_grad():
        wanted, given = model(images()), small(images())
    return float((given - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("norm", [True, False])
def test_streams_and_hidden_channels_share_one_budget(norm: bool) -> None:
    model = seen(staged(norm))
    sites = found(model)
    plan = squeeze(model, sites, images().split(32), "macs:60%")
    kinds = {entry.site.kind for entry in plan.entries if len(entry.dropped)}
    assert kinds == {"stream", "convolution"}
    small = apply(model, plan, images(4))
    assert count_macs(small, images(2)) <= 0.6 * count_macs(model, images(2))
    assert all(not hasattr(module, "mask") for module in small.modules())


def test_readers_fitted_to_what_stays_answer_more_like_the_model_than_cut_ones() -> None:
    model = seen(staged())
    plan = squeeze(model, found(model, "stream"), images().split(32), "macs:70%")
    assert any(entry.fit is not None for entry in plan.entries)
    cut = Plan(tuple(Entry.narrow(e.site, e.kept) for e in plan.entries if e.site.kind == "stream"))
    fitted, plain = apply(model, plan, images(4)), apply(model, cut, images(4))
    assert distance(model, fitted) < 0.5 * distance(model, plain)


def test_channels_between_convolutions_with_a_forward_of_their_own_are_squeezed() -> None:
    model = seen(inverted())
    sites = found(model, "hidden")
    assert {site.kind for site in narrowable(sites)} == {"hidden"}
    plan = squeeze(model, sites, images().split(32), "macs:75%")
    small = apply(model, plan, images(4))
    cut = Plan(tuple(Entry.narrow(e.site, e.kept) for e in plan.entries if len(e.dropped)))
    assert distance(model, small) < 0.5 * distance(model, apply(model, cut, images(4)))


def test_the_biases_that_a_fit_adds_count_in_a_target() -> None:
    model = seen(inverted())
    before = count_params(model)
    for share in (70, 75, 80, 85, 90):
        plan = squeeze(model, found(model), images().split(32), f"params:{share}%")
        assert count_params(apply(model, plan, images(4))) <= share / 100 * before


def test_the_biases_of_convolutions_named_by_their_layers_count_too() -> None:
    model = seen(staged())
    sites = found(model, "hidden")
    before = count_params(model)
    for share in (80, 85, 90, 95):
        plan = squeeze(model, sites, images().split(32), f"params:{share}%", uniform=True)
        assert any(bool(entry.fit.biases[0].any()) for entry in plan.entries if entry.fit is not None)
        assert count_params(apply(model, plan, images(4))) <= share / 100 * before


def test_a_plan_of_streams_is_saved_and_read(tmp_path: object) -> None:
    model = seen(staged())
    plan = squeeze(model, found(model), images().split(32), "macs:70%")
    plan.save(str(tmp_path))
    again = apply(model, sh.Plan.load(str(tmp_path)), images(4))
    torch.testing.assert_close(again(images(4)), apply(model, plan, images(4))(images(4)))


def test_an_interrupted_squeezing_of_streams_goes_on_with_the_same_result(tmp_path: object) -> None:
    model = seen(staged())
    sites, batches = found(model), images().split(32)
    once = squeeze(model, sites, batches, "macs:70%", checkpoint=str(tmp_path))
    again = squeeze(model, sites, batches, "macs:70%", checkpoint=str(tmp_path))
    assert again.to_json()["entries"] == once.to_json()["entries"]


def test_squeezing_is_offered_where_readers_can_be_fitted() -> None:
    sites = found(seen(staged()))
    assert all("squeeze" in offered(sites)[site.name] for site in sites if site.kind == "stream")


def test_the_model_is_not_changed() -> None:
    model = seen(staged())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    squeeze(model, found(model), images().split(32), "macs:70%")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_plan_tells_how_often_a_network_ran_over_the_data() -> None:
    model = seen(staged())
    plan = squeeze(model, found(model), images().split(32), "macs:70%")
    assert 2 < plan.passes < 100
    assert f"calibrated in {plan.passes:g} forward passes" in str(plan)


def test_a_site_whose_moments_do_not_fit_into_memory_keeps_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_SMALL", 8 * 4 * 100**2)
    monkeypatch.setattr(collecting, "free_bytes", lambda: 8 * 4 * 100**2)
    monkeypatch.setattr(collecting, "total_bytes", lambda: 0)
    model = seen(staged())
    plan = squeeze(model, found(model, "hidden"), images().split(32), "macs:90%")
    assert list(plan.sites.names) == ["3"]
    (reason,) = plan.left_out.values()
    assert "144 columns take" in reason
    assert "there is room for" in reason


def test_what_is_spread_over_the_network_is_left_out_of_a_target_of_latency() -> None:
    model = seen(staged())
    with pytest.raises(sh.SiteError, match="spread over the network"):
        squeeze(model, found(model, "stream"), images().split(32), "latency:90%")

"""Moments against direct sums, fits against least squares, and what the collector sees of real forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.calibrating.moments import Moments, collect, gaussian_prelu
from shallower.core.inputs import Inputs, default_mask_of
from shallower.core.modes import evaluating
from shallower.errors import FitError, SiteError
from shallower.finding.kinds import find_sites
from shallower.modules.activations import SlopeActivation
from shallower.modules.attachment import attach


def samples(positions: int = 200, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(positions, channels, dtype=torch.float64, generator=generator)
    return h * torch.linspace(0.5, 2, channels) + torch.linspace(-2, 2, channels)


def test_moments_of_two_parts_add_up_to_those_of_the_whole() -> None:
    h = samples()
    total = Moments.of(h[:70], h[:70].relu()) + Moments.of(h[70:], h[70:].relu())
    torch.testing.assert_close(vars(total), vars(Moments.of(h, h.relu())))


def test_mean_and_deviation_are_those_of_the_input() -> None:
    moments = Moments.of(samples().float(), samples().float().relu())
    torch.testing.assert_close(moments.mean, samples().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.std, samples().std(0, correction=0), rtol=1e-6, atol=1e-6)


def test_long_samples_are_summed_in_pieces() -> None:
    h = torch.randn(5000, 1000)
    torch.testing.assert_close(Moments.of(h, h.relu()).hf, (h.double() * h.double().relu()).sum(0))


def test_moments_of_different_sites_do_not_add_up() -> None:
    with pytest.raises(FitError, match="do not add up"):
        Moments.of(samples(), samples()) + Moments.of(samples(channels=3), samples(channels=3))


def test_best_affine_is_the_least_squares_line() -> None:
    h = samples()
    slope, offset = Moments.of(h, F.gelu(h)).best_affine()
    for j in range(h.shape[1]):
        line = torch.linalg.lstsq(torch.stack([h[:, j], torch.ones(len(h))], 1), F.gelu(h[:, j])).solution
        torch.testing.assert_close(torch.stack([slope[j], offset[j]]), line)


def test_best_affine_of_a_gated_site_is_the_least_squares_multiple_of_u() -> None:
    h, u = samples(), samples().flip(0)
    slope, offset = Moments.of(h, F.silu(h), u).best_affine()
    expected = (F.silu(h) * u * u).sum(0) / (u * u).sum(0)
    torch.testing.assert_close(slope, expected)
    assert torch.equal(offset, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("gated", [False, True])
def test_error_is_the_mean_square_of_what_the_line_misses(gated: bool) -> None:
    h, u = samples(), samples().flip(0) if gated else None
    moments = Moments.of(h, F.silu(h), u)
    slope, offset = moments.best_affine()
    missed = (F.silu(h) - slope) * u if u is not None else F.silu(h) - slope * h - offset
    torch.testing.assert_close(moments.error(slope, offset), missed.square().mean(0))


def test_channel_that_does_not_vary_becomes_its_constant() -> None:
    h = samples()
    h[:, 2] = 1.7
    slope, offset = Moments.of(h, F.gelu(h)).best_affine()
    assert slope[2] == 0
    torch.testing.assert_close(offset[2], F.gelu(torch.tensor(1.7, dtype=torch.float64)))


def test_moments_that_are_not_finite_are_refused() -> None:
    h = samples()
    h[0, 0] = torch.inf
    with pytest.raises(FitError, match="not finite"):
        Moments.of(h, h.relu()).best_affine()


def test_gaussian_moments_are_the_limit_of_samples() -> None:
    mean, std = torch.tensor([-1.0, 0.5]), torch.tensor([0.7, 2.0])
    h = mean + std * torch.randn(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = Moments.of(h, F.gelu(h)).best_affine()
    torch.testing.assert_close(Moments.gaussian(mean, std, F.gelu).best_affine(), expected, rtol=0, atol=5e-3)


def test_gaussian_moments_of_a_line_are_exact() -> None:
    mean, std = torch.tensor([-1.0, 0.5]).double(), torch.tensor([0.7, 2.0]).double()
    slope, offset = Moments.gaussian(mean, std, lambda h: 3 * h - 2).best_affine()
    torch.testing.assert_close(slope, torch.full_like(slope, 3))
    torch.testing.assert_close(offset, torch.full_like(offset, -2))


def test_prelu_under_a_gaussian_has_the_closed_form_of_the_integral() -> None:
    mean, std, a = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([0.7, 1.0, 2.0]), torch.tensor([0.97])
    integral = Moments.gaussian(mean, std, lambda h: F.prelu(h, a.double())).best_affine()
    torch.testing.assert_close(gaussian_prelu(mean, std, a), integral, rtol=0, atol=1e-5)


def test_prelu_of_a_constant_is_its_value() -> None:
    slope, offset = gaussian_prelu(torch.tensor([-2.0, 2.0]), torch.zeros(2), torch.tensor([0.5]))
    assert slope.tolist() == [0, 0]
    assert offset.tolist() == [-1, 2]


class Block(nn.Module):
    """A gated block whose parts run in either order."""

    def __init__(self, up_first: bool, packed: bool) -> None:
        super().__init__()
        self.up_first, self.packed = up_first, packed
        self.gate, self.up, self.both = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 12)
        self.down = nn.Linear(6, 4)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.packed:
            first, second = self.both(x).chunk(2, -1)
            return (second, first) if self.up_first else (first, second)
        return self.gate(x), self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gate, up = self.parts(x)
            return self.down(F.silu(gate) * up)
        if self.up_first:
            up = self.up(x)
            return self.down(F.silu(self.gate(x)) * up)
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
def test_gated_sites_pair_the_gate_with_what_it_multiplies(up_first: bool, packed: bool) -> None:
    block = Block(up_first, packed)
    x = torch.randn(2, 3, 4)
    (site,) = find_sites(block, x)
    moments = collect(block, [site], [x, x + 1])[site.name]
    gate, up = block.parts(torch.cat([x, x + 1]).reshape(-1, 4))
    torch.testing.assert_close(vars(moments), vars(Moments.of(gate.detach(), F.silu(gate.detach()), up.detach())))


@pytest.mark.parametrize("f", [nn.GELU(), nn.ReLU(inplace=True)])
def test_input_and_output_of_the_activation_are_measured(f: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 6), f, nn.Linear(6, 2))
    x = torch.randn(10, 4)
    (site,) = find_sites(model, x)
    h = model[0](x).detach()
    expected = Moments.of(h, f(h.clone()))
    torch.testing.assert_close(vars(collect(model, [site], [x])[site.name]), vars(expected))


def test_attached_slope_activation_is_what_is_measured() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    x = torch.randn(10, 4)
    (site,) = find_sites(model, x)
    assert site.activation is not None
    attach(model, site.activation, SlopeActivation).slope.data.fill_(0.9)
    slope, _ = collect(model, [site], [x])[site.name].best_affine()
    h = model[0](x).detach()
    torch.testing.assert_close(slope, Moments.of(h, 0.9 * h + 0.1 * F.gelu(h)).best_affine()[0], rtol=1e-5, atol=1e-6)


def test_channels_of_images_are_counted_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 3, 5, 5)
    (site,) = find_sites(model, x)
    h = model[1](model[0](x)).detach().movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(vars(collect(model, [site], [x])[site.name]), vars(Moments.of(h, h.relu())))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.pool, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x))) * attention_mask[..., None]
        return self.head(torch.tanh(self.pool(y.sum(1))))


@pytest.mark.parametrize("labelled", [False, True])
def test_masked_positions_do_not_count(labelled: bool) -> None:
    model = Masked()
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch: dict[str, Tensor] = {"x": x, "attention_mask": mask}
    sites = find_sites(model, batch)
    h = model.up(x)[mask.bool()].detach()
    found = collect(model, sites, [(batch, torch.zeros(2)) if labelled else batch])
    first, pooled = found.values()
    torch.testing.assert_close(vars(first), vars(Moments.of(h, F.gelu(h))))
    assert pooled.count == 2


def test_another_mask_can_be_picked_from_the_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    batch = (torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]]))
    (site,) = find_sites(model, batch[0])
    moments = collect(model, [site], [batch], mask_of=lambda batch: batch[1])[site.name]
    assert moments.count == 3


def test_a_mask_of_other_positions_than_any_site_has_is_refused() -> None:
    model = Masked()
    batch = {"x": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 3)}
    sites = find_sites(model, batch)
    assert collect(model, sites, [batch], mask_of=lambda _: torch.ones(2, 3))
    assert collect(model, sites, [batch], mask_of=lambda _: torch.ones(2))
    with pytest.raises(FitError, match="8 positions, and the layers of the sites have 2 or 6"):
        collect(model, sites, [batch], mask_of=lambda _: torch.ones(2, 4))


def test_masks_of_more_dimensions_are_left_alone() -> None:
    assert default_mask_of({"attention_mask": torch.ones(2, 1, 3, 3)}) is None
    assert default_mask_of(torch.ones(2, 3)) is None


def test_module_that_runs_twice_is_measured_twice() -> None:
    block = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    model = nn.Sequential(block, block)
    x = torch.randn(10, 4)
    (site,) = find_sites(model, x)
    assert collect(model, [site], [x])[site.name].count == 20


def test_modes_and_forward_are_left_as_they_were() -> None:
    model = Masked()
    model.pool.eval()
    batch = {"x": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 3)}
    collect(model, find_sites(model, batch), [batch])
    assert model.training
    assert not model.pool.training
    assert "forward" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_evaluating_switches_gradients_off_and_dropout_too() -> None:
    model = nn.Dropout(0.5)
    with evaluating(model):
        assert not torch.is_grad_enabled()
        assert torch.equal(model(torch.ones(9)), torch.ones(9))
    assert model.training


def batches(x: Tensor) -> Any:
    yield x


@pytest.mark.parametrize(
    ("given", "message"), [(lambda x: batches(x), "one-shot iterator"), (lambda _: [], "calibration needs data")]
)
def test_batches_that_cannot_be_used_are_refused(given: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    x: Inputs = torch.randn(10, 4)
    with pytest.raises((SiteError, FitError), match=message):
        collect(model, find_sites(model, x), given(x))

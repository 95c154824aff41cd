"""What BatchNorm or a measurement tells about an activation, and the orders made of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shallower.calibrating.moments import Moments
from shallower.errors import FitError, MethodError
from shallower.finding.kinds import find_sites
from shallower.methods.tlc.criteria import (
    Normal,
    batchnorm_statistics,
    binary_entropy,
    expected_change,
    input_statistics,
    lines,
    sign_entropies,
    sign_probability,
)

numbers = st.floats(-5, 5)


def normal(mean: list[float], std: list[float]) -> Normal:
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return Normal(m, s, "batchnorm", Moments.gaussian(m, s, torch.relu))


class Convolutions(nn.Module):
    """A residual block with BatchNorm, and an activation behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.relu(x + y).mean((2, 3)))  # type: ignore[no-any-return]


def test_batchnorm_tells_the_mean_and_the_deviation_of_the_activation_it_feeds() -> None:
    model = Convolutions().eval()
    nn.init.normal_(model.bn1.weight)
    nn.init.normal_(model.bn1.bias)
    (site,) = find_sites(model, torch.randn(2, 4, 8, 8))
    found = batchnorm_statistics(model, site)
    assert found is not None
    assert found.source == "batchnorm"
    torch.testing.assert_close(found.mean, model.bn1.bias.detach().double())
    torch.testing.assert_close(found.std, model.bn1.weight.detach().double().abs())


def test_what_stands_behind_a_sum_is_measured() -> None:
    model = Convolutions().eval()
    batches = [torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)]
    sites = find_sites(model, batches[0], kinds=("hidden", "activation"))
    found = input_statistics(model, sites, batches)
    place = next(site for site in sites if site.kind == "activation")
    assert found[place.name].source == "measured"
    with torch.no_grad():
        x = torch.cat(batches)
        h = x + model.bn2(model.conv2(torch.relu(model.bn1(model.conv1(x)))))
    torch.testing.assert_close(found[place.name].mean, h.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_missing_measurement_is_an_error_that_names_the_site() -> None:
    model = Convolutions().eval()
    sites = find_sites(model, torch.randn(2, 4, 8, 8), kinds=("hidden", "activation"))
    with pytest.raises(MethodError, match=r"no BatchNorm feeds the activation of .*relu.*batches="):
        input_statistics(model, sites)


@given(mean=numbers, std=st.floats(0.01, 4))
def test_the_closed_form_of_a_relu_agrees_with_the_integral(mean: float, std: float) -> None:
    for slope in (0.0, 1.0):
        line = torch.tensor([slope], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        closed = expected_change(normal([mean], [std]), *line, None)
        integral = expected_change(normal([mean], [std]), *line, torch.relu)
        torch.testing.assert_close(closed, integral, rtol=1e-3, atol=1e-4)


def test_the_line_by_the_sign_of_the_mean_is_the_cheaper_of_the_two() -> None:
    told = normal([0.3, -0.3, 2.0, -2.0], [1.0, 1.0, 0.5, 0.5])
    ones, nothing = torch.ones_like(told.mean), torch.zeros_like(told.mean)
    identity, zero = expected_change(told, ones, nothing, None), expected_change(told, nothing, nothing, None)
    torch.testing.assert_close(torch.minimum(identity, zero), torch.where(told.mean > 0, identity, zero))


def test_a_channel_without_scale_is_on_one_side_for_certain() -> None:
    told = normal([1.0, -1.0, 0.0], [0.0, 0.0, 0.0])
    assert sign_probability(told).tolist() == [0, 1, 1]
    slope = (told.mean > 0).double()
    assert expected_change(told, slope, torch.zeros_like(slope), None).tolist() == [0, 0, 0]


def test_lines_by_the_unit_rule_pass_or_drop_each_channel() -> None:
    model = Convolutions().eval()
    model.bn1.bias.data.copy_(torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5, 2.0]))
    (site,) = find_sites(model, torch.randn(2, 4, 8, 8))
    told = batchnorm_statistics(model, site)
    assert told is not None
    slope, offset = lines(site, told, "unit")
    assert slope.tolist() == [1, 0, 1, 1, 0, 1]
    assert offset.tolist() == [0] * 6


def test_the_best_line_in_front_of_zero_padding_has_no_constant() -> None:
    model = Convolutions().eval()
    (site,) = find_sites(model, torch.randn(2, 4, 8, 8))
    told = batchnorm_statistics(model, site)
    assert told is not None
    slope, offset = lines(site, told, "best")
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), rtol=0, atol=1e-3)  # of relu under N(0, 1)
    assert not offset.any()


def test_the_best_line_of_a_feed_forward_site_matches_the_mean() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    batches = [torch.randn(64, 5)]
    (site,) = find_sites(model, batches[0])
    told = input_statistics(model, [site], batches)[site.name]
    slope, offset = lines(site, told, "best")
    with torch.no_grad():
        h = model[0](batches[0]).double()
        torch.testing.assert_close((slope * h + offset).mean(0), model[1](h).mean(0), rtol=1e-5, atol=1e-6)


def test_entropy_is_highest_at_even_odds_and_zero_where_the_sign_is_certain() -> None:
    found = binary_entropy(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    expected = [0, -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)), 1, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_entropy_of_signs_is_that_of_the_activations_input() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batches = [torch.randn(50, 3), torch.randn(30, 3)]
    sites = find_sites(model, batches[0])
    with torch.no_grad():
        rate = (model[0](torch.cat(batches)) > 0).double().mean(0)
    found = sign_entropies(model, sites, batches)
    assert found[sites[0].name] == pytest.approx(float(binary_entropy(rate).mean()))


def test_entropy_without_batches_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.raises(MethodError, match="`batches` is empty"):
        sign_entropies(model, find_sites(model, torch.randn(2, 3)), [])


def test_entropies_refuse_a_mask_of_other_positions() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(6, 4)
    with pytest.raises(FitError, match="mask"):
        sign_entropies(model, find_sites(model, x), [x], mask_of=lambda _: torch.ones(2, 4))
    every_second = torch.tensor([True, False] * 3)
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(1.0)
    assert sign_entropies(model, find_sites(model, x), [x], mask_of=lambda _: every_second) == {"0": 0.0}

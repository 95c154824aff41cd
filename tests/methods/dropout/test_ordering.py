"""Orders of channels: reordering changes nothing, and the first channels are those that matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from shallower.errors import FitError
from shallower.finding.kinds import find_sites
from shallower.methods.dropout.ordering import by_elimination, by_magnitude, permute
from tests.networks import convolutional_networks, networks, seeds


def check_permutation(model: nn.Module, x: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = model(x)
    for site in find_sites(model, x):
        if site.width and not site.not_narrow:
            permute(model, site, torch.randperm(site.width, generator=generator))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(network=networks(), seed=seeds)
def test_reordered_networks_compute_what_they_computed(network: tuple[nn.Module, Tensor], seed: int) -> None:
    check_permutation(*network, seed)


@settings(max_examples=20)
@given(network=convolutional_networks(), seed=seeds)
def test_reordered_convolutions_compute_what_they_computed(network: tuple[nn.Module, Tensor], seed: int) -> None:
    check_permutation(*network, seed)


def network(sizes: list[float]) -> nn.Sequential:
    """A hidden layer whose channels have these sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, len(sizes)), nn.Tanh(), nn.Linear(len(sizes), 3)).double().eval()
    with torch.no_grad():
        model[2].weight.copy_(nn.functional.normalize(model[2].weight, dim=0) * torch.tensor(sizes))
        model[0].weight.copy_(nn.functional.normalize(model[0].weight, dim=1))
        model[0].bias.zero_()
    return model


def test_large_weights_come_first() -> None:
    model = network([1.0, 4.0, 2.0, 3.0])
    assert by_magnitude(model, find_sites(model, torch.randn(2, 4).double()))["0"].tolist() == [1, 3, 2, 0]


def test_a_channel_that_another_one_repeats_goes_first() -> None:
    model = network([3.0, 3.0, 1.0])
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
    x = torch.randn(200, 4, dtype=torch.float64)
    order = by_elimination(model, find_sites(model, x), [x])["0"].tolist()
    assert order[2] in (0, 1)
    assert 2 in order[:2]


def test_convolutions_are_ordered_by_energy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 0.01
        model[0].bias[0] = 0.0
        model[0].weight[2] *= 100
    x = torch.randn(4, 2, 5, 5)
    order = by_elimination(model, find_sites(model, x), [x])["0"].tolist()
    assert (order[0], order[-1]) == (2, 0)


def test_what_is_no_order_is_refused() -> None:
    model = network([1.0, 2.0, 3.0])
    (site,) = find_sites(model, torch.randn(2, 4).double())
    with pytest.raises(FitError, match="each of the 3 channels once"):
        permute(model, site, torch.tensor([0, 1, 1]))


def test_no_batches_are_told() -> None:
    model = network([1.0, 2.0, 3.0])
    with pytest.raises(FitError, match="`batches` is empty"):
        by_elimination(model, find_sites(model, torch.randn(2, 4).double()), [])


def test_a_mask_of_other_positions_is_refused() -> None:
    model, x = network([1.0, 4.0, 2.0]), torch.randn(6, 4, dtype=torch.float64)
    with pytest.raises(FitError, match="mask"):
        by_elimination(model, find_sites(model, x), [x], mask_of=lambda _: torch.ones(2, 4))

"""Layer Folding differs from LayerCollapse in what pulls the slopes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.methods.collapsing.layer_folding import LayerFolding


def folding(strength: float = 0.5) -> LayerFolding:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    return LayerFolding(model, find_sites(model, torch.randn(2, 6)), strength)


def set_slopes(method: LayerFolding, *values: float) -> None:
    with torch.no_grad():
        for module, value in zip(method.activations.values(), values, strict=True):
            module.slope.fill_(value)


def test_the_penalty_is_the_distance_of_the_square_from_one() -> None:
    method = folding(strength=0.5)
    set_slopes(method, 0.5, 1.5)
    assert method.penalty().item() == pytest.approx(0.5 * (0.75 + 1.25))


@pytest.mark.parametrize("values", [(0.0, 0.3), (0.9, 1.2)])
def test_the_added_gradient_is_that_of_the_penalty(values: tuple[float, float]) -> None:
    method = folding()
    set_slopes(method, *values)
    method.penalty().backward()
    slopes = [module.slope for module in method.activations.values()]
    expected = [slope.grad.clone() for slope in slopes if slope.grad is not None]
    for slope in slopes:
        slope.grad = None
    method.add_penalty_grad()
    for slope, gradient in zip(slopes, expected, strict=True):
        assert torch.equal(slope.grad, gradient)  # type: ignore[arg-type]


def test_slopes_do_not_become_negative() -> None:
    method = folding()
    set_slopes(method, -0.2, 0.4)
    method.after_step(0.1)
    assert [float(a) for a in method.slopes().values()] == pytest.approx([0.0, 0.4])


def test_a_slope_that_has_left_zero_is_pulled_to_one() -> None:
    method = folding(strength=1.0)
    set_slopes(method, 0.05, 0.0)
    for _ in range(400):
        method.before_step()
        method.add_penalty_grad()
        with torch.no_grad():
            for module in method.activations.values():
                if module.slope.grad is not None:
                    module.slope.sub_(module.slope.grad, alpha=0.01)
                    module.slope.grad = None
        method.after_step(0.01)
    first, second = (float(a) for a in method.slopes().values())
    assert first == pytest.approx(1, abs=0.03)
    assert second == 0

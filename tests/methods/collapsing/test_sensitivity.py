"""What a change alone costs, and how far an output is from another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import MethodError, SiteError
from shallower.methods.collapsing.sensitivity import costs_of, output_change

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@contextmanager
def scaled(model: nn.Linear, factor: float) -> Iterator[None]:
    with torch.no_grad():
        model.weight.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            model.weight.div_(factor)


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2, bias=False)


def test_the_cost_without_a_loss_is_the_relative_change_of_the_output() -> None:
    model = network()
    changes = {"double": partial(scaled, model, 2.0), "half": partial(scaled, model, 0.5)}
    costs = costs_of(model, changes, [X, X])
    assert costs == pytest.approx({"double": 1.0, "half": 0.25}, rel=1e-5)


def test_the_cost_with_a_loss_is_its_rise_over_the_batches() -> None:
    model = network()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = model(batch).square().mean()
        return value

    expected = sum(3 * float(model(x).detach().square().mean()) for x in (X[:2], X[2:])) / 2
    costs = costs_of(model, {"double": partial(scaled, model, 2.0)}, [X[:2], X[2:]], loss=loss)
    assert costs["double"] == pytest.approx(expected, rel=1e-5)


def test_the_cost_with_a_score_is_its_fall_and_needs_no_batches() -> None:
    model = network()
    costs = costs_of(
        model, {"double": partial(scaled, model, 2.0)}, [], score=lambda m: -float(m.weight.detach().abs().max())
    )
    assert costs["double"] == pytest.approx(float(model.weight.detach().abs().max()))


def test_the_model_is_left_in_its_mode_and_with_its_weights() -> None:
    model = network()
    before = model.weight.detach().clone()
    costs_of(model, {"double": partial(scaled, model, 2.0)}, [X])
    assert model.training
    assert torch.equal(model.weight, before)


def test_no_batches_are_an_error() -> None:
    with pytest.raises(MethodError, match="no batches"):
        costs_of(network(), {}, [])


def test_logits_are_compared_as_distributions() -> None:
    logits = torch.randn(4, 5)
    one, other = SimpleNamespace(logits=logits), SimpleNamespace(logits=logits + 2.0)
    assert float(output_change(one, other)) == pytest.approx(0, abs=1e-9)
    assert float(output_change({"logits": logits}, {"logits": -logits})) > 0


def test_all_floating_tensors_count_and_whole_numbers_do_not() -> None:
    reference = {"a": torch.ones(2), "b": [torch.full((2,), 2.0)], "ids": torch.arange(3)}
    output = {"a": torch.ones(2), "b": [torch.zeros(2)], "ids": torch.zeros(3, dtype=torch.long)}
    assert float(output_change(reference, output)) == pytest.approx(8 / 10)


def test_an_output_without_a_floating_tensor_is_an_error() -> None:
    with pytest.raises(SiteError, match="no floating-point tensor"):
        output_change(torch.arange(3), torch.arange(3))


def test_a_regression_that_calls_its_output_logits_is_compared_by_its_numbers() -> None:
    reference, output = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.0]])
    assert float(output_change({"logits": reference}, {"logits": output})) == pytest.approx(4 / 5)

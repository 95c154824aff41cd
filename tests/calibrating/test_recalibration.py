"""BatchNorms measured again, and left as they were where that goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.recalibration import recalibrate
from shallower.errors import FitError, ForwardError, SiteError


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)
        self.unused = nn.BatchNorm1d(2)
        self.later = nn.BatchNorm2d(4)
        for norm in (self.norm, self.unused, self.later):
            norm.running_mean.uniform_(1, 2)
            norm.running_var.uniform_(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.later(self.drop(self.norm(self.conv(x))))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(3)]


def test_statistics_are_those_of_the_batches() -> None:
    model = Network()
    assert recalibrate(model, batches()) == 3
    with torch.no_grad():
        seen = [model.conv(x) for x in batches()]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([h.mean((0, 2, 3)) for h in seen]).mean(0))
    torch.testing.assert_close(model.norm.running_var, torch.stack([h.var((0, 2, 3)) for h in seen]).mean(0))
    assert model.norm.momentum == 0.3


def test_dropout_stays_off_and_modes_come_back() -> None:
    model = Network()
    model.drop.eval()
    recalibrate(model, batches())
    assert model.training
    assert not model.drop.training
    with torch.no_grad():
        # with dropout on, what the later norm reads would vary twice as much
        inner = model.eval().norm(model.conv(torch.cat(batches())))
    assert float(model.later.running_var.mean()) == pytest.approx(float(inner.var((0, 2, 3)).mean()), rel=0.1)


def test_a_norm_that_does_not_run_keeps_its_statistics() -> None:
    model = Network()
    before = model.unused.running_mean.clone()
    recalibrate(model, batches())
    assert torch.equal(model.unused.running_mean, before)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], FitError, "`batches` is empty"),
        ([torch.full((2, 3, 6, 6), torch.nan)], FitError, "norm: what it reads"),
        ([torch.randn(4, 3, 6, 6), torch.randn(2, 5, 6, 6)], ForwardError, "does not run"),
        (iter([torch.randn(4, 3, 6, 6)]), SiteError, "one-shot"),
    ],
)
def test_where_anything_goes_wrong_all_statistics_are_kept(given: Any, error: type[Exception], message: str) -> None:
    model = Network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        recalibrate(model, given)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.norm.momentum == 0.3
    assert model.training


def test_a_model_without_norms_needs_nothing() -> None:
    assert recalibrate(nn.Linear(2, 2), []) == 0

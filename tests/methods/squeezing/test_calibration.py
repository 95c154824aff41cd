"""The data of a squeezing: how batches are read, and how networks are compared on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration, mean_divergence, reader_of
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import squeeze
from shallower.sites import Sites


class Two(nn.Module):
    """Takes a second argument, which it may need or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.f, self.down = nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        x = x if offset is None else x + offset
        out: Tensor = self.down(self.f(self.up(x)))
        return out


class Needed(Two):
    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, offset)


class Single(Two):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


PAIR = (torch.randn(4, 6), torch.randn(4, 6))


def test_a_pair_of_tensors_is_read_as_the_model_was_found() -> None:
    one = find_sites(Two(), PAIR[0])
    two = find_sites(Two(), PAIR)
    assert reader_of(Two(), one, None)(PAIR) is PAIR[0]
    assert reader_of(Two(), two, None)(PAIR) == PAIR
    assert reader_of(Two(), two, PAIR[0])(PAIR) is PAIR[0]


def test_where_that_is_not_known_the_signature_decides_or_nothing_does() -> None:
    unknown = Sites(())
    assert reader_of(Needed(), unknown, None)(PAIR) == PAIR
    assert reader_of(Single(), unknown, None)(PAIR) is PAIR[0]
    with pytest.raises(SiteError, match="inputs_of="):
        reader_of(Two(), unknown, None)(PAIR)


def test_models_of_two_arguments_are_squeezed() -> None:
    model = Two().eval()
    batches = [(torch.randn(64, 6), torch.randn(64, 6)) for _ in range(4)]
    plan = squeeze(model, find_sites(model, batches[0]), batches, "params:60%")
    assert plan.params_saved > 0


def test_a_network_does_not_diverge_from_itself_and_masked_outputs_do_not_count() -> None:
    model, other = Single().eval(), Single().eval()
    x = torch.randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0]] * 3)
    with torch.no_grad():
        other.down.bias.add_(1)

    def calibration(masked: bool) -> Calibration:
        changed = x.clone()
        changed[:, 2:] = torch.nan
        options = SqueezeOptions(mask_of=lambda batch: batch["mask"])
        return Calibration([{"x": changed if masked else x, "mask": mask}] * 3, options, lambda batch: batch["x"])

    assert mean_divergence(calibration(False), model, model) == 0
    assert mean_divergence(calibration(True), model, other) == pytest.approx(6, rel=1e-4)


class Regression(nn.Module):
    """Returns one number for each row, under the name of logits."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 1)
        nn.init.constant_(self.head.bias, bias)

    def forward(self, x: Tensor) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(x))


def test_the_numbers_of_a_regression_are_no_distribution() -> None:
    calibration = Calibration([torch.randn(4, 6)], SqueezeOptions())
    assert mean_divergence(calibration, Regression(0.0).eval(), Regression(2.0).eval()) == pytest.approx(4, rel=1e-4)

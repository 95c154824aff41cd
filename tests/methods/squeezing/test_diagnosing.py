"""What is said where a model or data cannot be squeezed with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import FitError, ShallowerError, SiteError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import squeeze


class ByKeyword(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(input=torch.relu(self.up(input=x)))
        return out


BATCHES = [torch.randn(32, 6) for _ in range(4)]


def attempt(batches: list[Any] = BATCHES, model: nn.Module | None = None, **given: Any) -> Any:
    model = ByKeyword() if model is None else model
    return squeeze(
        model, find_sites(ByKeyword(), torch.zeros(2, 6)), batches, given.pop("target", "params:60%"), **given
    )


def test_layers_called_by_keyword_are_squeezed_and_named_where_they_overflow() -> None:
    assert attempt().params_saved > 0
    model = ByKeyword()
    with torch.no_grad():
        model.up.bias[3] = torch.nan
    with pytest.raises(FitError, match="not finite"):
        attempt(model=model)


def test_a_later_batch_that_does_not_fit_is_named() -> None:
    with pytest.raises(SiteError, match=r"batch 3 \(float32 \(32, 9\)\)"):
        attempt([*BATCHES[:2], torch.randn(32, 9), BATCHES[3]])


def test_sites_of_another_model_are_refused() -> None:
    with pytest.raises(SiteError, match="up"):
        attempt(model=nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6)))


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(SiteError, match="meta"):
        attempt(model=ByKeyword().to("meta"))


def test_batches_without_rows_count_for_nothing() -> None:
    empty = torch.zeros(0, 6)
    assert attempt([*BATCHES, empty]).params_saved > 0
    with pytest.raises(ShallowerError):
        attempt([empty, empty])


@pytest.mark.parametrize(
    "given",
    [
        {"options": SqueezeOptions(output_of=lambda _: None)},
        {"options": SqueezeOptions(output_of=lambda _: 1)},
        {"options": SqueezeOptions(output_of=lambda output: output["logits"])},
        {"options": SqueezeOptions(mask_of=lambda batch: torch.zeros(len(batch), 1))},
        {"target": "latency:2x", "example_inputs": torch.randn(2, 9)},
        {"target": "latency:2x", "example_inputs": 3},
        {"checkpoint": "a" * 5000},
        {"checkpoint": "nul\0"},
        {"inputs_of": lambda batch: batch["x"]},
    ],
    ids=lambda given: next(iter(given)),
)
def test_plausible_mistakes_are_errors_of_this_library(given: dict[str, Any]) -> None:
    with pytest.raises(ShallowerError):
        attempt(**given)


def test_an_outer_inference_mode_does_no_harm() -> None:
    model = ByKeyword()
    with torch.inference_mode():
        plan = attempt([torch.randn(32, 6) for _ in range(4)], model)
    assert plan.params_saved > 0


def test_a_part_that_runs_without_gradients_is_squeezed() -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = ByKeyword(), ByKeyword()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.backbone(x)
            out: Tensor = self.head(x)
            return out

    model = Probe().eval()
    assert squeeze(model, find_sites(model, BATCHES[0]), BATCHES, "params:60%").params_saved > 0

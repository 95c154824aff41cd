"""What the proof sees, in every type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mutations import DTYPES
from shallower.errors import SurgeryError
from shallower.finding.kinds import find_sites
from shallower.modules.edits import Edit, Externalise, Weights
from shallower.planning.entries import Entry
from shallower.planning.forms import Step, steps
from shallower.planning.plan import Plan
from shallower.surgery.operating import edits_of_step
from shallower.surgery.proof import proven
from tests.finding.test_heads import ByHand

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_wrong_heads_are_refused(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(ByHand(), nn.Linear(16, 3)).to(dtype), torch.randn(2, 5, 16).to(dtype)
    (site,) = find_sites(model, x, kinds=("hidden", "heads")).select(lambda s: s.kind == "heads")
    todo = steps([Entry.narrow(site, torch.tensor([0, 2]))])

    def shifted(step: Step, now: nn.Module) -> list[Edit]:
        wrong = steps([Entry.narrow(step.entry.site, torch.tensor([1, 3]))])[0]
        edits, others = edits_of_step(step, now), edits_of_step(wrong, now)
        rows = {(other.name, *other.tensors): other for other in others if isinstance(other, Weights)}
        return [
            rows[(edit.name, *edit.tensors)] if isinstance(edit, Weights) and edit.name != "0.o" else edit
            for edit in edits
        ]

    proven(model, todo, x)
    with pytest.raises(SurgeryError, match="differs from the simulated one"):
        proven(model, todo, x, shifted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_activation_that_should_be_gone_is_seen(dtype: torch.dtype) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(F.relu(x + self.a(x)))
            return y

    model, x = Sum().to(dtype), torch.randn(3, 4).to(dtype)
    todo = steps(map(Entry.collapse, find_sites(model, x, kinds="activation")))
    assert todo
    proven(model, todo, x)
    with pytest.raises(SurgeryError):
        proven(model, todo, x, lambda step, now: edits_of_step(step, now)[:1])
    with pytest.raises(SurgeryError):
        proven(
            model,
            todo,
            x,
            lambda step, now: [edit for edit in edits_of_step(step, now) if not isinstance(edit, Externalise)],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_reader_of_a_changed_layer_is_seen_at_the_output(dtype: torch.dtype) -> None:
    class Reading(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            y: Tensor = self[2](self[1](h)) + h.sum()
            return y

    plain = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 5)).to(dtype)
    x = torch.randn(4, 6).to(dtype)
    todo = steps(Plan.collapse(find_sites(plain, x)).entries)
    with pytest.raises(SurgeryError, match="the output of the model"):
        proven(Reading(*plain), todo, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_width_that_is_read_in_python_is_seen_at_the_output(dtype: torch.dtype) -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) / self[0].out_features
            return y

    model, x = Scaled(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 5)).to(dtype), torch.randn(4, 6).to(dtype)
    todo = steps([Entry.narrow(site, torch.arange(8)) for site in find_sites(model, x)])
    with pytest.raises(SurgeryError, match="the output of the model"):
        proven(model, todo, x)


def test_a_forward_that_was_set_on_the_instance_and_runs_other_modules_is_refused() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 5))

    model, x = build(), torch.randn(4, 6)
    todo = steps([Entry.narrow(site, torch.arange(8)) for site in find_sites(model, x)])
    run: Callable[[Tensor], Tensor] = model.forward
    model.forward = lambda x: run(x)
    with pytest.raises(SurgeryError, match="runs 0 times"):
        proven(model, todo, x)


def test_of_meta_tensors_the_shapes_are_compared() -> None:
    model, x = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 5)).to("meta"), torch.randn(4, 6, device="meta")
    todo = steps([Entry.narrow(site, torch.arange(8)) for site in find_sites(model, x)])
    assert proven(model, todo, x)[0].weight.shape == (8, 6)
    with pytest.raises(SurgeryError):
        proven(model, todo, x, lambda step, now: edits_of_step(step, now)[:2])

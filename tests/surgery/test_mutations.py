"""Surgery that is altered at random is refused; `python -m benchmarks mutations` tries thousands of alterations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.mutations import DTYPES, KINDS, Mutation, case, trial
from shallower.errors import SurgeryError
from shallower.modules.edits import Weights
from shallower.surgery.operating import edits_of_step
from shallower.surgery.proof import proven

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_altered_surgery_is_refused_in_every_type(dtype: torch.dtype) -> None:
    tally = trial(dtype, most=25, each=1)
    assert tally.accepted == []
    assert tally.counted >= 25


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_surgery_as_it_is_passes(kind: str, dtype: torch.dtype) -> None:
    for seed in range(100, 103):
        made = case(kind, dtype, seed)
        proven(made.model, made.todo, made.x)


def test_a_weight_that_is_not_set_is_seen_although_only_heads_are_taken_away() -> None:
    made = case("heads", torch.bfloat16, seed=5)
    edits = edits_of_step(made.todo[0], made.model)
    first = next(j for j, edit in enumerate(edits) if isinstance(edit, Weights))
    with pytest.raises(SurgeryError, match="differs from the simulated one"):
        proven(made.model, made.todo, made.x, Mutation(made.todo[0], "left out", first).edits_of)

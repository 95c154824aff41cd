"""Surgery on a whole model, proven in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import OutOfMemoryError, SurgeryError
from shallower.finding.kinds import find_sites
from shallower.modules.edits import Edit, Identity
from shallower.planning.forms import Step, steps
from shallower.planning.plan import Plan
from shallower.surgery.observing import Pass
from shallower.surgery.operating import edits_of_step
from shallower.surgery.whole import check_distance, check_rounded, is_narrow, whole_network, widened

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


def deep(dtype: torch.dtype) -> tuple[nn.Module, Tensor, list[Step]]:
    """A network that makes much of rounding behind the site."""
    torch.manual_seed(0)
    site = [nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4)]
    model = nn.Sequential(*site, *[nn.LayerNorm(4, eps=0.0, elementwise_affine=False)]).to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(1e-5)
        model[2].bias.fill_(1.0)
    x = torch.randn(3, 4, dtype=dtype)
    return model, x, steps(Plan.collapse(find_sites(model, x)).entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_a_network_amplifies_is_no_difference(dtype: torch.dtype) -> None:
    model, x, todo = deep(dtype)
    assert isinstance(whole_network(model, todo, Pass(x), edits_of_step)[0], nn.Identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_is_a_difference_all_the_same(dtype: torch.dtype) -> None:
    model, x, todo = deep(dtype)

    def without_identities(step: Step, now: nn.Module) -> list[Edit]:
        return [edit for edit in edits_of_step(step, now) if edit != Identity("1")]

    with pytest.raises(SurgeryError, match="differs from the simulated one"):
        whole_network(model, todo, Pass(x), without_identities)


def test_an_edit_that_the_model_does_not_allow_is_told_with_the_site() -> None:
    model, x, todo = deep(torch.float32)
    with pytest.raises(SurgeryError, match=r"0: surgery fails: .*nowhere"):
        whole_network(model, todo, Pass(x), lambda _step, _now: [Identity("nowhere")])


def test_out_of_memory_is_told_as_that() -> None:
    class Greedy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self[0], nn.Identity):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            y: Tensor = super().forward(x)
            return y

    model, x, todo = deep(torch.float32)
    with pytest.raises(OutOfMemoryError, match=r"2.00 GiB"):
        whole_network(Greedy(*model), todo, Pass(x), edits_of_step)


def test_an_empty_plan_has_a_name_in_errors() -> None:
    with pytest.raises(SurgeryError, match=r"^an empty plan: the model does not run"):
        whole_network(nn.Linear(2, 2), [], Pass(torch.randn(1, 3)), edits_of_step)


def test_a_forward_that_reads_a_width_that_changed_is_told_so() -> None:
    class Reading(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y / self[0].weight.shape[0]

    model, x, todo = deep(torch.float32)
    with pytest.raises(SurgeryError, match=r"has no attribute 'weight'.*attribute of a changed layer"):
        whole_network(Reading(*model), todo, Pass(x), edits_of_step)


def test_narrow_numbers_are_widened_and_must_be_the_rounding_of_what_was_proven() -> None:
    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.BatchNorm1d(3))
    wide = widened(model)
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32, torch.int64}
    assert is_narrow(model[0].weight)
    check_rounded(wide, model)
    with torch.no_grad():
        model[0].weight[0] *= 2
    with pytest.raises(SurgeryError, match=r"0.weight: in torch.bfloat16"):
        check_rounded(wide, model)
    with pytest.raises(SurgeryError, match="Convert the model to float32"):
        check_distance(0.5, 0.06, torch.bfloat16)

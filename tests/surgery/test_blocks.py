"""Narrow types proven block by block, where memory is short."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.mutations import Mutation
from shallower.errors import SurgeryError
from shallower.finding.kinds import find_sites
from shallower.modules.edits import Weights
from shallower.planning.entries import Entry
from shallower.planning.forms import Step, steps
from shallower.surgery.blocks import block_by_block
from shallower.surgery.observing import Pass
from shallower.surgery.operating import edits_of_step
from shallower.surgery.proof import proven
from tests.finding.test_heads import ByHand
from tests.followed import Stages, drawn
from tests.networks import Gated

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


class Layers(nn.Module):
    """Attention and a gated MLP, twice, in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([ByHand(), Gated(16, 6, nn.SiLU(), True)]) for _ in "12")
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in self.layers:
            x = mlp(attention(x))
        y: Tensor = self.head(x)
        return y


def squeezed() -> tuple[nn.Module, Tensor, list[Step]]:
    torch.manual_seed(0)
    model, x = Layers().bfloat16().eval(), torch.randn(2, 5, 16).bfloat16()
    sites = find_sites(model, x, kinds=("hidden", "heads")).select(lambda site: site.kind != "hidden")
    assert {site.kind for site in sites} == {"heads", "gated"}
    return model, x, steps([Entry.narrow(site, torch.arange(site.width)[1:]) for site in sites])


def test_the_result_is_that_of_the_proof_as_a_whole() -> None:
    model, x, todo = squeezed()
    small = block_by_block(model, todo, Pass(x), edits_of_step)
    expected = proven(model, todo, x)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(small.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(small(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize("i", range(4))
def test_wrong_surgery_on_any_block_is_refused(i: int) -> None:
    model, x, todo = squeezed()
    edits = edits_of_step(todo[i], model)
    first = next(j for j, edit in enumerate(edits) if isinstance(edit, Weights) and "weight" in edit.tensors)
    wrong = Mutation(todo[i], "row", first, "weight", 0, 1.5)
    with pytest.raises(SurgeryError, match="differs from the simulated one"):
        block_by_block(model, todo, Pass(x), wrong.edits_of)


def test_sites_that_overlap_are_one_block() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model, x = nn.Sequential(inner, nn.Linear(4, 4)).bfloat16(), torch.randn(3, 4).bfloat16()
    todo = steps([Entry.collapse(site) for site in find_sites(model, x) if site.producer is not None])
    small = block_by_block(model, todo, Pass(x), edits_of_step)
    assert [type(m) for m in small[0][:4]] == [nn.Identity] * 4


def test_a_stream_is_one_block() -> None:
    model, x = drawn(Stages(), torch.bfloat16), torch.randn(2, 3, 8, 8).bfloat16()
    todo = steps([Entry.narrow(site, range(3)) for site in find_sites(model, x, kinds="stream")])
    small = block_by_block(model, todo, Pass(x), edits_of_step)
    torch.testing.assert_close(small.state_dict(), proven(model, todo, x).state_dict(), rtol=0, atol=0)

"""The order of steps, and chains of sites that are decided together."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from shallower.errors import PlanError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import steps
from shallower.planning.forms.steps import in_execution_order
from shallower.planning.paying import paying
from shallower.planning.plan import Plan
from shallower.sites import LinearMap, Place, Site
from shallower.surgery.applying import apply


def chain(n: int, kernel: int = 0) -> list[Site]:
    """Overlapping sites: linear layers of several widths, or convolutions that pad, one after the other."""
    widths = [8 + 7 * i % 13 if not kernel else 8 for i in range(n + 2)]
    maps = []
    for i in range(n + 1):
        m = LinearMap(f"layer{i}", "linear", widths[i], widths[i + 1], True, 10)
        if kernel:
            m = LinearMap(f"layer{i}", "conv2d", 8, 8, True, 640, (kernel, kernel), padding=(1, 1), size=(8, 8))
        maps.append(m)
    sites = []
    for i in range(n):
        whole = Site(f"site{i}", "feed-forward", widths[i + 1], maps[i], (maps[i + 1],), Place(f"act{i}"), "relu")
        sites.append(whole)
    return sites


@pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
@pytest.mark.parametrize("kernel", [0, 3])
def test_a_thousand_overlapping_sites_are_planned_and_judged(kernel: int) -> None:
    sites = chain(1000, kernel)
    start = time.process_time()
    plan = Plan.collapse(sites)
    assert len(plan.steps) == 1000
    assert len(paying(sites)[0]) in (0, 1000)
    assert time.process_time() - start < 20  # 2 to 3 seconds; it was hours


def test_a_chain_merges_into_one_map() -> None:
    plan = Plan.collapse(chain(5))
    assert {step.form.kind for step in plan.steps} == {"merged"}
    last = plan.steps[-1].form.consumers[0]
    assert (last.d_in, last.d_out) == (chain(5)[0].producer.d_in, chain(5)[-1].consumers[0].d_out)  # type: ignore[union-attr]


def test_a_depthwise_convolution_merges_where_that_pays_with_the_next_one() -> None:
    size = {"size": (8, 8)}
    maps = [
        LinearMap("expand", "conv2d", 4, 24, True, 64, **size),  # type: ignore[arg-type]
        LinearMap("depthwise", "conv2d", 24, 24, True, 64, (3, 3), groups=24, **size),  # type: ignore[arg-type]
        LinearMap("project", "conv2d", 24, 4, True, 64, **size),  # type: ignore[arg-type]
    ]
    first = Site("first", "convolution", 24, maps[0], (maps[1],), Place("a"), "relu", channels_first=True)
    second = Site("second", "convolution", 24, maps[1], (maps[2],), Place("b"), "relu", channels_first=True)
    alone = steps([Entry.collapse(first)])
    assert [step.form.kind for step in alone] == ["apart"] or alone[0].form.kind == "pair"
    assert [step.form.kind for step in steps(map(Entry.collapse, (first, second)))] == ["merged", "merged"]


def test_entries_are_ordered_as_the_network_runs_and_else_as_given() -> None:
    sites = chain(4)
    given = [Entry.collapse(sites[i]) for i in (2, 0, 3, 1)]
    assert [entry.site.name for entry in in_execution_order(given)] == ["site0", "site1", "site2", "site3"]
    apart = [Entry.collapse(sites[i]) for i in (2, 0)]
    assert [entry.site.name for entry in in_execution_order(apart)] == ["site2", "site0"]


def test_an_activation_is_planned_once() -> None:
    site = chain(1)[0]
    place = Site("act0", "activation", 0, None, (), site.activation, "relu")
    with pytest.raises(PlanError, match="the activation `act0` is already changed by the entry of `site0`"):
        Plan((Entry.narrow(site, [0]), Entry.collapse(place)))


def test_a_plan_walks_its_steps_once() -> None:
    plan = Plan.collapse(chain(2))
    assert plan.steps is plan.steps


def test_heads_come_after_the_site_whose_consumer_makes_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.qkv, self.out = nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 24), nn.Linear(8, 3)
            self.heads = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, n, _ = x.shape
            q, k, v = (
                t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(self.act(self.fc(x))).chunk(3, -1)
            )
            z = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(z.transpose(1, 2).reshape(b, n, -1))

    model, x = Block().eval(), torch.randn(2, 5, 6)
    sites = find_sites(model, x, kinds=("hidden", "heads"))
    heads, mlp = (next(s for s in sites if (s.kind == "heads") == wanted) for wanted in (True, False))
    plan = Plan((Entry.narrow(heads, [1]), Entry.narrow(mlp, range(10))))
    assert [step.entry.site.name for step in plan.steps] == [mlp.name, heads.name]
    (rows,) = [cut for cut in plan.steps[1].form.cuts if cut.tensor == "qkv.weight"]
    assert (rows.before, rows.after) == ((24, 10), (12, 10))
    small = apply(model, plan, x)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == plan.params_saved


class Reading(nn.Module):
    """What a norm stands behind is read by the producer of the next site."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.act, self.c = (
            nn.Linear(4, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 12),
            nn.GELU(),
            nn.Linear(12, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(self.act(self.b(self.norm(self.a(x)))))
        return y


def test_channels_that_the_producer_of_another_site_reads_are_cut_after_it() -> None:
    model, x = Reading().eval(), torch.randn(2, 4)
    followed, plain = find_sites(model, x)
    assert (followed.followed, plain.followed) == (True, False)
    plan = Plan((Entry.narrow(followed, range(5)), Entry.narrow(plain, range(7))))
    assert [step.entry.site for step in plan.steps] == [plain, followed]
    small = apply(model, plan, x)
    assert small.b.weight.shape == (7, 5)
    fit = Fit((torch.randn(12, 5).double(),), (torch.zeros(12).double(),))
    with pytest.raises(PlanError, match=r"`b` are already changed by the entry of"):
        Plan((Entry.narrow(followed, range(5), fit=fit), Entry.narrow(plain, range(7)))).steps  # noqa: B018

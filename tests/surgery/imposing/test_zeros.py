"""Channels set to zero wherever they stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.sites import Site, Slot, Span
from shallower.surgery.imposing.zeros import impose_cuts
from tests.followed import Stages, drawn


@given(
    start=st.integers(0, 3), repeats=st.integers(1, 3), apart=st.integers(0, 3), block=st.integers(1, 3),
    width=st.integers(2, 4), data=st.data(),
)  # fmt: skip
def test_zeros_stand_where_the_slot_says(
    start: int, repeats: int, apart: int, block: int, width: int, data: st.DataObject
) -> None:
    stride = width * block + apart
    size = start + repeats * stride + 2
    dropped = data.draw(st.sets(st.integers(0, width - 1), min_size=1, max_size=width - 1))
    slot = Slot("weight", (size, 2), 0, (Span(start, repeats, stride, block),), "rows")
    site = Site("site", "stream", width, None, (), None, slots=(slot,))
    model = nn.Linear(2, size)
    nn.init.ones_(model.weight)
    impose_cuts(model, [sh.Entry.narrow(site, sorted(set(range(width)) - dropped))])
    gone = (model.weight == 0).all(1).nonzero().flatten()
    assert gone.tolist() == slot.positions(torch.tensor(sorted(dropped))).tolist()


@pytest.mark.parametrize("name", ["stem:stream", "down:stream"])
def test_the_output_does_not_depend_on_what_is_zero(name: str) -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    site = find_sites(model, x, kinds="stream")[name]
    entry = sh.Entry.narrow(site, range(3))
    impose_cuts(model, [entry])
    zeroed = model(x)
    # numbers that only the dropped channels read may be anything
    for slot in site.slots:
        if slot.side == "rows":
            tensor = model.get_parameter(slot.tensor)
            with torch.no_grad():
                tensor.index_fill_(slot.axis, slot.positions(entry.dropped), 7.0)
    torch.testing.assert_close(model(x), zeroed)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)])
def test_a_norm_computes_on_what_stays(norm: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3)), torch.randn(5, 4)
    drawn(model)
    (site,) = find_sites(model, x, kinds="hidden")
    kept = torch.tensor([0, 2, 5])
    y = model[0](x)[:, kept]
    if isinstance(norm, nn.LayerNorm):
        y = F.layer_norm(y, (3,), norm.weight[kept], norm.bias[kept])
    else:
        assert isinstance(norm, nn.RMSNorm)
        y = F.rms_norm(y, (3,), norm.weight[kept])
    expected = y @ model[2].weight[:, kept].T + model[2].bias
    torch.testing.assert_close(sh.simulate(model, sh.Plan((sh.Entry.narrow(site, kept),)))(x), expected)


def test_two_sites_under_one_norm() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 6)
            self.norm, self.c = nn.LayerNorm(10), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(torch.cat((self.a(x), self.b(x)), -1)))

    model, x = drawn(Both()), torch.randn(5, 4)
    sites = find_sites(model, x, kinds="hidden")
    assert [site.width for site in sites] == [4, 6]
    plan = sh.Plan((sh.Entry.narrow(sites[0], [1, 2]), sh.Entry.narrow(sites[1], [0, 3, 5])))
    small = sh.apply(model, plan, x)
    assert small.norm.normalized_shape == (5,)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))


def test_a_buffer_that_repeats_one_number_is_zero_only_where_channels_go() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("scale", torch.full((1,), 2.0).expand(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) * self.scale).relu())

    model, x = Scaled().eval(), torch.randn(3, 6)
    plan = sh.Plan((sh.Entry.narrow(find_sites(model, x, kinds="all")["a"], [1, 2, 5]),))
    simulated = sh.simulate(model, plan)
    assert simulated.get_buffer("scale").nonzero().flatten().tolist() == [1, 2, 5]
    assert model.scale.tolist() == [2.0] * 8
    torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), simulated(x + 1))


def test_a_norm_that_holds_its_size_computes_on_what_stays() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalized_shape = (6,)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, None, None, eps=1e-5)

    model, x = nn.Sequential(nn.Linear(4, 6), Plain(), nn.Linear(6, 3)), torch.randn(5, 4)
    (site,) = find_sites(model, x, kinds="hidden")
    plan = sh.Plan((sh.Entry.narrow(site, [0, 2, 5]),))
    small = sh.apply(model, plan, x)
    y = model[0](x)[:, [0, 2, 5]]
    expected = F.layer_norm(y, (3,), eps=1e-5) @ model[2].weight[:, [0, 2, 5]].T + model[2].bias
    torch.testing.assert_close(small(x), expected)
    torch.testing.assert_close(sh.simulate(model, plan)(x), expected)


def test_a_norm_whose_size_is_written_has_no_tensor_that_bounds_it() -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, (64,), None, None, eps=1e-5)

    model, x = nn.Sequential(nn.Linear(4, 64), Written(), nn.Linear(64, 3)), torch.randn(5, 4)
    (site,) = find_sites(model, x, kinds="hidden")
    plan = sh.Plan((sh.Entry.narrow(site, range(32)),))
    torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), sh.simulate(model, plan)(x + 1))


def test_groups_and_channels_within_them_are_cut_together() -> None:
    model = drawn(nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1)))
    x = torch.randn(2, 3, 5, 5)
    sites = find_sites(model, x, kinds="hidden")
    assert [site.width for site in sites] == [4, 4]
    plan = sh.Plan(tuple(sh.Entry.narrow(site, [0, 2]) for site in sites))
    small = sh.apply(model, plan, x)
    assert (small[1].num_groups, small[1].num_channels) == (2, 4)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))

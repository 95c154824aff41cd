"""What a model computes at some places, compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import ForwardError, SurgeryError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Place
from shallower.surgery.applying import apply
from shallower.surgery.observing import Observed, Pass, compared, observed, relative_error
from shallower.surgery.taps import Tap

X = torch.randn(3, 4, dtype=torch.float64)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)).double()


def tap(net: nn.Module, name: str = "3") -> Tap:
    return Tap(find_sites(net, X)[0], Place(name))


def test_taps_and_output_are_kept_and_the_mode_stays() -> None:
    net = model()
    seen = observed(net, Pass(X), [tap(net)], after=False)
    assert torch.equal(seen.taps[0][0], net.eval()(X))
    assert torch.equal(seen.outputs[0], net(X))
    assert not net.train()[3]._forward_hooks


def test_a_part_runs_on_the_arguments_of_its_calls() -> None:
    net = nn.Sequential(model(), nn.Linear(2, 2).double())
    calls = [((X,), {}), ((), {"input": 2 * X})]
    seen = observed(net, Pass(calls, "0"), [], after=False)
    assert torch.equal(seen.outputs[1], net[0].eval()(2 * X))
    with pytest.raises(ForwardError, match="0 does not run"):
        observed(net, Pass([((X[:, :2],), {})], "0"), [], after=False)


def test_the_first_difference_is_found_and_says_where() -> None:
    net = model()
    taps = [tap(net, "0"), tap(net)]
    expected = observed(net, Pass(X), taps, after=False)
    assert compared(taps, expected, observed(net, Pass(X), taps, after=True)) is None
    with torch.no_grad():
        net[3].bias += 1e-6
    difference = compared(taps, expected, observed(net, Pass(X), taps, after=True))
    assert difference is not None
    assert difference.name == "3"
    assert "Exclude" in str(difference.error())


def test_what_did_not_run_is_an_error_and_not_a_match_of_nothing_with_nothing() -> None:
    net = model()
    with pytest.raises(SurgeryError, match=r"runs 0 times .* and 0 times after surgery"):
        compared([tap(net)], Observed([[]]), Observed([[]]))


def test_rounding_may_make_as_much_as_a_change_in_the_last_bit() -> None:
    y = torch.ones(4, dtype=torch.float64)
    expected, found = Observed([], [y]), Observed([], [y + 1e-12])
    assert compared([], expected, found) is not None
    assert compared([], expected, found, nudged=Observed([], [y + 1e-13])) is None
    assert compared([], expected, Observed([], [y + 1e-9]), nudged=Observed([], [y + 1])) is not None


def test_equal_infinities_do_not_differ_and_complex_numbers_are_compared() -> None:
    y = torch.tensor([1.0, math.inf, math.nan])
    assert relative_error(y, y.clone()) == 0
    assert relative_error(y, torch.tensor([1.0, 2.0, math.nan])) == math.inf
    z = torch.tensor([1 + 1j])
    assert relative_error(z, z + 1j) > 0.5


def test_a_layer_inside_vmap_is_refused_with_the_remedy() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: self.b(torch.relu(self.a(row))))(x)

    model, x = Mapped().eval(), torch.randn(5, 4)
    site = next(site for site in find_sites(model, x, kinds="hidden") if site.width == 6)
    with pytest.raises(SurgeryError, match=r"torch\.vmap"):
        apply(model, Plan((Entry.narrow(site, range(3)),)), x)

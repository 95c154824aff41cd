"""The fates of one site: what is accepted and what is refused."""

from __future__ import annotations

import pytest
import torch

from shallower.errors import PlanError
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from shallower.sites import LinearMap
from tests.planning.samples import N, site

ONES = torch.ones(N)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fates": torch.ones(N + 1)}, "fates has shape"),
        ({"fates": torch.full((N,), 3)}, "fates are the integers"),
        ({"fates": ONES}, "fates are the integers"),
        ({"fates": [1] * N}, "fates is a tensor"),
        ({"slopes": ONES[:3]}, "slopes has shape"),
        ({"slopes": ONES * float("nan")}, "slopes has a number that is not finite"),
        ({"offsets": ONES * float("inf")}, "offsets has a number that is not finite"),
        ({"alphas": ONES[:2]}, "alphas has shape"),
        ({"family": "cubic"}, "family of slopes"),
        ({"fit": Fit((torch.zeros(5, 3),), (torch.zeros(5),))}, r"consumers.0 of the fit has shape \(5, 3\)"),
        ({"fit": Fit((), (torch.zeros(4),))}, r"biases.0 of the fit has shape \(4,\)"),
        ({"fit": Fit((), ())}, "0 biases for 1 consumers"),
        ({"fit": Fit((), (torch.zeros(5),), torch.zeros(2, 6))}, "not the second"),
        ({"fit": Fit((), (torch.zeros(5),), torch.zeros(2, 6), (torch.zeros(5, 3),))}, "ups.0 of the fit has shape"),
        ({"fit": Fit((), (torch.zeros(5),), torch.zeros(2, 7), (torch.zeros(5, 2),))}, "fitted for 7 inputs"),
        ({"fit": Fit((), (torch.zeros(5) / 0,))}, "biases.0 of the fit is not a tensor of finite"),
    ],
)
def test_an_entry_that_does_not_fit_its_site_is_refused(fields, reason):
    good = {"fates": torch.ones(N, dtype=torch.int8), "slopes": ONES, "offsets": torch.zeros(N)}
    with pytest.raises(PlanError, match=reason):
        Plan((Entry(site(), **{**good, **fields}),))


def test_a_constant_before_a_padded_convolution_is_refused():
    padded = LinearMap("2", "conv2d", N, 5, True, 4, kernel=(3, 3), padding=(1, 1))
    convolution = site(producer=LinearMap("0", "conv2d", 6, N, True, 4), consumers=(padded,), channels_first=True)
    with pytest.raises(PlanError, match="wrong along the border"):
        Entry.narrow(convolution, torch.arange(3), constants=torch.ones(N))


def test_attention_heads_cannot_be_linear():
    with pytest.raises(PlanError, match="an attention head is kept or dropped"):
        Entry.collapse(site(kind="heads"))

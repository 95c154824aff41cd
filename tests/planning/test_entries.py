"""The fates of one site: what is accepted and what is refused."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize(
    "kept",
    [
        [1, 4],
        (4, 1),
        range(1, 5, 3),
        torch.tensor([1, 4]),
        torch.tensor([1, 4]).numpy(),
        torch.tensor([i in (1, 4) for i in range(N)]),
        [i in (1, 4) for i in range(N)],
    ],
    ids=str,
)
def test_channels_are_kept_by_indices_or_a_mask(kept: Any) -> None:
    assert Entry.narrow(site(), kept).kept.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ([-1], "there is no channel -1"),
        ([N], f"there is no channel {N}; the site has {N}"),
        ([0, 0], "an index comes twice"),
        (torch.tensor([1] + [0] * (N - 1)), "make it boolean"),
        ([0.5], "integers or booleans"),
        (torch.ones(2, 2, dtype=torch.int64), "one row of numbers"),
        (torch.ones(N + 1, dtype=torch.bool), r"must have shape \(12,\)"),
        (torch.ones(2, device="meta"), "no data"),
        (3, "indices or a mask"),
        (None, "indices or a mask"),
        (["a"], "indices or a mask"),
    ],
    ids=str,
)
def test_a_choice_of_channels_that_says_nothing_clear_is_refused(kept: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Entry.narrow(site(), kept)

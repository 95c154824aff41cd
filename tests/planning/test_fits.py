"""Fitted maps: which shapes are accepted."""

from __future__ import annotations

import pytest
import torch

from shallower.errors import PlanError
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from tests.planning.samples import site


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"down_bias": torch.zeros(2)}, "down_bias of the fit needs down"),
        ({"producer": torch.zeros(3, 6)}, r"producer of the fit has shape \(3, 6\)"),
        ({"producer_bias": torch.zeros(4)}, "producer_bias of the fit needs producer"),
        ({"producer": torch.zeros(4, 6), "producer_bias": torch.zeros(3)}, r"must have shape \(4,\)"),
        ({"producer": torch.zeros(4, 7)}, "fitted for 7 inputs"),
        ({"gate": torch.zeros(4, 6)}, "no gate whose kept rows"),
        ({"producer": torch.zeros(4, 6) / 0}, "producer of the fit is not a tensor of finite"),
    ],
)
def test_fitted_rows_that_do_not_fit_their_layer_are_refused(changes, reason):
    fit = Fit((torch.zeros(5, 4),), (torch.zeros(5),), **changes)
    with pytest.raises(PlanError, match=reason):
        Plan((Entry.narrow(site(), torch.arange(4), fit=fit),))

"""Of how many channels a linear path needs."""

from __future__ import annotations

import pytest
import torch

from shallower.errors import PlanError
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms.linear_path import path_of
from shallower.sites import LinearMap, Place, Site


def entry(d_in: int, n: int, d_out: int, linear: int, fit: Fit | None = None) -> Entry:
    up, down = LinearMap("up", "linear", d_in, n, True, 10), LinearMap("down", "linear", n, d_out, True, 10)
    site = Site("mlp", "feed-forward", n, up, (down,), Place("act"), "relu")
    fates = torch.tensor([1] * linear + [0] * (n - linear))
    return Entry(site, fates, torch.ones(n), torch.zeros(n), fit=fit)


def path(e: Entry, d_in: int | None = None) -> tuple[int, str]:
    producer = e.site.producer
    assert producer is not None
    if d_in is not None:
        producer = LinearMap("up", "linear", d_in, producer.d_out, True, 10)
    return path_of(e, producer, e.site.consumers)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((6, 12, 5, 3), (3, "channels")), ((6, 12, 9, 8), (6, "inputs")), ((9, 12, 5, 8), (5, "outputs"))],
)
def test_a_path_goes_through_the_fewest_of_channels_inputs_and_outputs(sizes, expected) -> None:  # type: ignore[no-untyped-def]
    assert path(entry(*sizes)) == expected


def test_without_linear_channels_there_is_no_path() -> None:
    assert path(entry(6, 12, 5, 0)) == (0, "channels")


def test_a_path_that_was_fitted_for_other_inputs_is_refused() -> None:
    fit = Fit((torch.zeros(5, 12),), (torch.zeros(5),), torch.zeros(3, 6), (torch.zeros(5, 3),))
    assert path(entry(6, 12, 5, 0, fit)) == (3, "channels")
    with pytest.raises(PlanError, match="was fitted for 6 inputs, and `up` has 4"):
        path(entry(6, 12, 5, 0, fit), 4)

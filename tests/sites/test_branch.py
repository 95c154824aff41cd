"""Branches as data."""

from __future__ import annotations

import pytest

from shallower.errors import SiteError
from shallower.sites import Branch, Emptied, Site


def site(branch: Branch) -> Site:
    return Site("0:branch", "branch", 1, None, (), None, branch=branch)


def test_a_branch_is_written_and_read() -> None:
    made = site(Branch((Emptied("0.attn", 2),), closing="0.attn", params=40, macs=300))
    assert Site.from_json(made.to_json()) == made
    assert (made.params, made.macs, made.layers) == (40, 300, ("0.attn",))
    assert str(made.bridge.not_linear) == "a branch is kept or dropped"
    assert made.bridge.not_narrow is None


def test_a_layer_closes_with_nothing() -> None:
    assert Branch((Emptied("0"),)).layer == "0"
    assert Branch((Emptied("0.a"), Emptied("0.b")), closing="0.b").layer == ""


def test_a_branch_of_nothing_is_refused() -> None:
    data = site(Branch((Emptied("0"),))).to_json()
    data["branch"]["emptied"] = []
    with pytest.raises(SiteError, match="emptied"):
        Site.from_json(data)

"""The data that sites are: costs, selection, printing, JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import SiteError
from shallower.sites import Between, LinearMap, Place, Residual, Site, Sites


def linear(name: str, d_in: int, d_out: int, positions: int = 10) -> LinearMap:
    return LinearMap(name, "linear", d_in, d_out, True, positions)


def site(name: str = "block.0", **changes: Any) -> Site:
    made = Site(
        name=name,
        kind="feed-forward",
        width=32,
        producer=linear(f"{name}.up", 8, 32),
        consumers=(linear(f"{name}.down", 32, 8),),
        activation=Place(f"{name}.act"),
        activation_name="gelu",
        dropouts=(Place(name, (("dropout", 0),)),),
    )
    return replace(made, **changes)


def test_costs_now_and_if_collapsed_are_those_of_the_matrices() -> None:
    assert site().params == 8 * 32 + 32 + 32 * 8 + 8
    assert site().params_collapsed == 8 * 8 + 8
    assert site().macs == 10 * (8 * 32 + 32 * 8)
    assert site().macs_collapsed == 10 * 64


def test_a_site_that_cannot_become_linear_costs_the_same_collapsed() -> None:
    refused = site(not_linear="padding")
    assert (refused.params_collapsed, refused.macs_collapsed) == (refused.params, refused.macs)


def test_a_gate_and_norms_count() -> None:
    gated = site(gate=linear("gate", 8, 32), norm_before="bn", norm_params=2)
    assert gated.params == site().params + 8 * 32 + 32 + 2 * 32
    assert gated.gated
    assert [m.name for m in gated.maps] == ["gate", "block.0.up", "block.0.down"]


def depthwise(name: str, channels: int) -> LinearMap:
    return LinearMap(name, "conv2d", channels, channels, False, 10, kernel=(3, 3), padding=(1, 1), groups=channels)


def test_a_depthwise_convolution_between_counts_with_its_norms() -> None:
    long = site(norm_before="bn1", norm_params=4, between=(Between(depthwise("dw", 32), norm_before="bn2"),))
    assert long.params == site().params + 32 * 9 + 2 * 2 * 32
    assert long.macs == site().macs + 10 * 32 * 9
    assert [m.name for m in long.maps] == ["block.0.up", "dw", "block.0.down"]


def test_an_activation_that_is_used_elsewhere_costs_the_site_nothing() -> None:
    assert site(activation_params=32).params == site().params + 32
    assert site(activation_params=32, activation_shared=True).params == site().params


def test_a_convolution_costs_its_taps_and_groups() -> None:
    conv = LinearMap("conv", "conv2d", 8, 16, False, 100, kernel=(3, 3), groups=2)
    assert conv.params == 4 * 16 * 9
    assert conv.macs == 100 * 4 * 16 * 9


maps = st.builds(
    LinearMap,
    name=st.text(min_size=1, max_size=8),
    kind=st.sampled_from(["linear", "conv1d", "conv2d"]),
    d_in=st.integers(1, 99),
    d_out=st.integers(1, 99),
    bias=st.booleans(),
    positions=st.integers(0, 999),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
place_values = st.builds(
    Place, module=st.text(max_size=8), calls=st.lists(st.tuples(st.text(max_size=5), st.integers(0, 9))).map(tuple)
)
site_values = st.builds(
    Site,
    name=st.text(max_size=8),
    kind=st.sampled_from(["feed-forward", "gated", "head", "convolution"]),
    width=st.integers(0, 99),
    producer=st.none() | maps,
    consumers=st.lists(maps, max_size=2).map(tuple),
    activation=st.none() | place_values,
    gate=st.none() | maps,
    dropouts=st.lists(place_values, max_size=2).map(tuple),
    between=st.lists(
        st.builds(Between, map=maps, norm_before=st.text(max_size=5), activation=st.none() | place_values), max_size=2
    ).map(tuple),
    residual=st.none()
    | st.builds(
        Residual, place=place_values, branch=st.integers(0, 1), norm=st.text(max_size=5), source=st.text(max_size=5)
    ),
)


@given(site_values)
def test_a_site_survives_json(value: Site) -> None:
    assert Site.from_json(json.loads(json.dumps(value.to_json()))) == value


@pytest.mark.parametrize(
    "change",
    [{"width": "wide"}, {"width": -1}, {"unknown": 1}, {"consumers": 3}, {"activation": {"calls": []}}, {"name": 7}],
    ids=str,
)
def test_a_wrong_description_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SiteError, match=r"^site"):
        Site.from_json({**site().to_json(), **change})


def test_a_missing_field_is_refused() -> None:
    data = site().to_json()
    del data["producer"]
    with pytest.raises(SiteError, match="producer"):
        Site.from_json(data)


SITES = Sites((site("a.0"), site("a.1"), site("b")), {"c": "it is tied"}, params=10**6, macs=10**7)


def test_sites_are_reached_by_name_number_and_slice() -> None:
    assert SITES["a.1"] is SITES[1]
    assert [s.name for s in SITES[1:]] == ["a.1", "b"]
    assert "b" in SITES
    assert SITES[0] in SITES
    assert "c" not in SITES


def test_a_missing_site_names_those_there_are_and_a_skipped_one_its_reason() -> None:
    with pytest.raises(SiteError, match=r"a\.0, a\.1, b"):
        SITES["z"]
    with pytest.raises(SiteError, match="it is tied"):
        SITES["c"]
    with pytest.raises(SiteError, match="has 3"):
        SITES[7]


def test_a_selection_keeps_order_and_what_is_known_of_the_model() -> None:
    chosen = SITES.select("a.*")
    assert [s.name for s in chosen] == ["a.0", "a.1"]
    assert (chosen.params, chosen.skipped) == (SITES.params, SITES.skipped)
    assert [s.name for s in SITES.select(lambda s: s.name == "b")] == ["b"]
    assert len(SITES.select("nothing")) == 0


def test_the_table_shows_every_site_and_every_reason() -> None:
    table = str(SITES)
    for text in ("a.0", "a.1", "feed-forward", "gelu", "32", "c: it is tied", "1M params"):
        assert text in table

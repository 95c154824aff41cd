"""Sites as a sequence: names, subsets, reasons, and groups that share a layer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shallower.errors import MethodError, Refusal, SiteError
from shallower.sites import LinearMap, Place, Site, Sites, overlapping


def site(name: str, up: str = "", down: str = "") -> Site:
    maps = [LinearMap(layer, "linear", 8, 8, True, 4) for layer in (up or f"{name}.up", down or f"{name}.down")]
    f = Place(f"{name}.act")
    return Site(name=name, kind="feed-forward", width=8, producer=maps[0], consumers=(maps[1],), activation=f)


def three() -> Sites:
    return Sites(tuple(map(site, ("a.0", "a.1", "b"))), {"head": "it is tied"}, params=100, macs=10)


def test_sites_are_a_sequence_and_have_names() -> None:
    sites = three()
    assert isinstance(sites, Sequence)
    assert (len(sites), sites.names, sites[0].name, sites[-1].name) == (3, ("a.0", "a.1", "b"), "a.0", "b")
    assert sites["b"] is sites[2]
    assert "a.1" in sites
    assert sites[1:].names == ("a.1", "b")
    assert sites[1:].params == 100


@pytest.mark.parametrize(("key", "message"), [("c", "no site 'c'"), ("head", "it is tied"), (3, "no site number 3")])
def test_what_is_not_there_is_an_error_that_says_what_is(key: str | int, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        three()[key]


def test_a_subset_by_pattern_or_predicate_keeps_what_is_known_of_the_model() -> None:
    assert three().select("a.*").names == ("a.0", "a.1")
    chosen = three().select(lambda site: site.name == "b")
    assert (chosen.names, chosen.params, dict(chosen.skipped)) == (("b",), 100, {"head": "it is tied"})


def test_reasons_of_what_a_method_cannot_use_go_to_skipped() -> None:
    usable = three().usable(lambda s: Refusal("too far up") if s.name == "b" else None, "nothing to do")
    assert usable.names == ("a.0", "a.1")
    assert dict(usable.skipped) == {"head": "it is tied", "b": "too far up"}


def test_nothing_usable_is_an_error_with_the_reasons() -> None:
    with pytest.raises(MethodError, match=r"nothing to do: a\.0: no; a\.1: no"):
        three().usable(lambda _: Refusal("no"), "nothing to do", MethodError)
    with pytest.raises(SiteError, match=r"^nothing to do$"):
        Sites(()).usable(lambda _: None, "nothing to do")


def test_the_table_names_sites_and_reasons() -> None:
    text = str(three())
    assert text.splitlines()[0] == "3 sites; the model has 100 params and 10 MACs"
    assert "head: it is tied" in text
    assert all(name in text for name in three().names)


def test_a_chain_overlaps_and_neighbours_do_not() -> None:
    chain = [site("0", "l0", "l1"), site("1", "l2", "l3"), site("2", "l1", "l2"), site("3", "x", "y")]
    assert [[s.name for s in group] for group in overlapping(chain)] == [["0", "1", "2"], ["3"]]
    assert overlapping([]) == []


@given(ends=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12))
def test_groups_share_no_layer_and_are_connected(ends: list[tuple[int, int]]) -> None:
    sites = [site(str(i), f"l{up}", f"l{down}") for i, (up, down) in enumerate(ends)]
    groups = overlapping(sites)
    assert sorted(s.name for group in groups for s in group) == sorted(s.name for s in sites)
    layers = [{m.name for s in group for m in s.maps} for group in groups]
    assert sum(map(len, layers)) == len(set().union(*layers))
    for group in groups:
        reached, waiting = {m.name for m in group[0].maps}, list(group[1:])
        while waiting:
            touching = [s for s in waiting if reached & {m.name for m in s.maps}]
            assert touching
            reached |= {m.name for s in touching for m in s.maps}
            waiting = [s for s in waiting if s not in touching]


def test_the_table_says_what_channels_may_become_and_how_much_the_layers_hold() -> None:
    table = str(three())
    assert "keep drop linear" in table
    # three sites of two layers, each 8 x 8 and a bias
    assert three().params_held == 6 * 72
    shared = Sites((site("a", up="x", down="y"), site("b", up="y", down="z")), params=1000)
    assert shared.params_held == 3 * 72
    assert "their layers hold 216 params (22%)" in str(shared)
    # x loses 32 + 4 of 72, y 48 + 4, z 32
    assert "with half of every width 880 params remain (88%)" in str(shared)


def test_reasons_that_many_have_are_said_once_and_no_line_is_long() -> None:
    skipped = {f"a.long.name.of.a.layer.{i}": "it is tied" for i in range(9)}
    lines = str(Sites((), skipped)).splitlines()
    assert [line for line in lines if "it is tied" in line] == ["  it is tied:"]
    assert all(name in " ".join(lines) for name in skipped)
    assert max(map(len, lines)) < 100


def test_letters_say_which_methods_use_a_site() -> None:
    table = three().described({three().names[0]: "SL"}, "methods: S squeeze, L layer-collapse")
    rows = table.splitlines()
    assert rows[1].endswith("methods")
    assert rows[2].endswith("SL")
    assert rows[3].endswith("-")
    assert "methods: S squeeze, L layer-collapse" in rows

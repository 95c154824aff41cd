"""Sites of the kinds that are asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.finding.kinds import KINDS, find_sites, kinds_of
from tests.followed import Attending, Excited, Grouped, Joined, Scaled, Stages, WrittenOut, drawn


def test_hidden_sites_are_the_default() -> None:
    sites = find_sites(Stages(), torch.randn(1, 3, 8, 8))
    assert {site.kind for site in sites} <= {"convolution", "feed-forward", "head", "gated", "hidden"}


def test_why_channels_may_not_become_linear_is_said_and_forbids_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    (site,) = find_sites(model, torch.randn(2, 4))
    assert site.bridge.not_narrow is None
    assert "the norm 2 (LayerNorm) stands in between" in str(site.bridge.not_linear)


def test_streams_are_found_with_all_their_writers_and_readers() -> None:
    sites = find_sites(Stages(), torch.randn(1, 3, 8, 8), kinds="stream")
    assert [(site.name, site.kind, site.width) for site in sites] == [
        ("stem:stream", "stream", 6),
        ("down:stream", "stream", 8),
    ]
    stem = {(slot.tensor, slot.side) for slot in sites["stem:stream"].slots if slot.side}
    written = {"stem.weight", "first.project.weight", "second.project.weight"}
    read = {"first.expand.weight", "second.expand.weight", "down.weight", "skip.weight"}
    assert stem == {*((name, "rows") for name in written), *((name, "columns") for name in read)}


def test_both_branches_of_squeeze_and_excitation_are_one_space() -> None:
    sites = find_sites(Excited(), torch.randn(1, 6, 5, 5), kinds="hidden")
    (expanded,) = sites.select(lambda site: "reduce" in {slot.module for slot in site.slots if slot.side == "columns"})
    assert expanded.width == 10
    assert {slot.module for slot in expanded.slots} == {"expand", "norm", "depthwise", "reduce", "excite", "project"}


def test_whole_groups_go_and_their_number_follows() -> None:
    sites = find_sites(Grouped(), torch.randn(1, 3, 5, 5), kinds="hidden")
    groups = sites.select(lambda site: any(f.attribute == "groups" for f in site.followers))
    assert [site.width for site in groups] == [4]


def test_numbers_that_count_heads_are_found_by_trying() -> None:
    site = find_sites(Attending(), torch.randn(2, 5, 8), kinds="heads")[0]
    assert (site.kind, site.width) == ("heads", 2)
    assert {(f.attribute, f.each) for f in site.followers} == {("num_heads", 2), ("num_groups", 1)}


@pytest.mark.parametrize("model", [WrittenOut(), Scaled()], ids=lambda model: type(model).__name__)
def test_a_forward_that_does_not_follow_is_skipped_with_the_reason(model: nn.Module) -> None:
    x = torch.randn(2, 3, 5, 5)
    if isinstance(model, Scaled):
        x = torch.randn(2, 6)
    sites = find_sites(model, x, kinds="hidden")
    assert len(sites) == 0
    assert sites.skipped


def test_a_reason_goes_where_the_channels_are_reached() -> None:
    model, x = Joined(), torch.randn(1, 3, 6, 6)
    everything = find_sites(model, x, kinds="all")
    assert {site.name: site.width for site in everything if site.followed} == {"a": 4, "b": 6}
    assert "a" not in everything.skipped
    assert "b" not in everything.skipped


def test_kinds_are_checked() -> None:
    with pytest.raises(sh.SiteError, match="no kind of site 'width'; kinds are hidden"):
        find_sites(nn.Linear(2, 2), torch.randn(1, 2), kinds="width")  # type: ignore[arg-type]
    with pytest.raises(sh.SiteError, match="no kind of site"):
        kinds_of("hidden,streams")
    assert kinds_of("stream, hidden") == ["hidden", "stream"]
    assert kinds_of("all") == list(KINDS)


def test_the_model_is_left_as_it_was() -> None:
    model = drawn(Attending())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_sites(model, torch.randn(2, 5, 8), kinds="all")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert vars(model)["num_heads"] == 4


def test_models_on_the_meta_device_are_followed() -> None:
    with torch.device("meta"):
        model = Stages()
    assert len(find_sites(model, torch.empty(1, 3, 8, 8, device="meta"), kinds="stream")) == 2

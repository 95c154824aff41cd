"""Zero padding between two convolutions."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import CheckpointError, PlanError, SiteError
from shallower.finding.kinds import find_sites
from shallower.modules.activations import SlopeActivation
from shallower.modules.attachment import attach, detached_copy
from shallower.modules.edits import edits, encoded, replay
from shallower.planning.entries import Entry
from shallower.planning.moving import as_moved, worth_moving
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from shallower.surgery.padding import border_error, move_padding
from shallower.surgery.simulation import simulate
from tests.networks import Block, Inverted, _randomised

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(stride: int = 1, **second: int) -> nn.Module:
    torch.manual_seed(0)
    up = nn.Conv2d(4, 6, 3, stride=stride, padding=1)
    down = nn.Conv2d(6, 4, 3, padding=1, **second)
    whole = Block(up, nn.ReLU(), down, nn.BatchNorm2d(6), nn.BatchNorm2d(6), residual=False)
    return _randomised(whole, torch.float64)


def paddings(model: nn.Module) -> list[tuple[int, int]]:
    return [m.padding for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("stride", [1, 2])
def test_moved_padding_keeps_the_size_and_changes_the_border_only(stride):
    model = block(stride)
    moved = move_padding(model, find_sites(model, X))
    assert paddings(moved) == [(1 + stride, 1 + stride), (0, 0)]
    assert paddings(model) == [(1, 1), (1, 1)]
    before, after = model(X), moved(X)
    assert before.shape == after.shape
    assert torch.allclose(before[..., 1:-1, 1:-1], after[..., 1:-1, 1:-1])
    assert not torch.allclose(before, after)


def test_after_moving_the_padding_a_pair_merges_exactly():
    model = block()
    moved = move_padding(model, find_sites(model, X))
    plan = Plan((Entry.collapse(find_sites(moved, X)[0], becomes="merged"),))
    small = apply(moved, plan, X)
    assert small.down.kernel_size == (5, 5)
    expected = simulate(moved, plan)(X)
    assert (small(X) - expected).norm() <= 1e-10 * expected.norm()


def test_without_moving_a_merge_is_refused_with_the_error_that_it_would_make():
    model = block()
    site = find_sites(model, X)[0]
    error = border_error(model, site, X)
    assert 0.01 < error < 10
    with pytest.raises(PlanError, match=f"pads with zeros behind .*move_padding.*would differ by {error:.1e}"):
        apply(model, Plan((Entry.collapse(site, becomes="merged"),)), X)


def test_the_border_error_is_what_merging_changes():
    model = block()
    site = find_sites(model, X)[0]
    linear = simulate(model, Plan.collapse([site]))(X).detach()
    moved = move_padding(model, site)
    merged = simulate(moved, Plan.collapse([find_sites(moved, X)[0]]))(X).detach()
    assert border_error(model, site, X) == pytest.approx(float((merged - linear).norm() / linear.norm()))


def test_a_plan_from_before_the_move_does_not_fit():
    model = block()
    plan = Plan.collapse(find_sites(model, X))
    with pytest.raises(PlanError, match=r"with padding \(1, 1\), and it is \(2, 2\)"):
        apply(move_padding(model, find_sites(model, X)), plan, X)


def test_in_place_the_parameters_stay_and_attached_methods_too():
    model = block()
    site = find_sites(model, X)[0]
    slope = attach(model, site.activation, SlopeActivation(nn.ReLU()))
    parameters = list(model.parameters())
    assert move_padding(model, site, inplace=True) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.f is slope
    assert paddings(detached_copy(model)) == [(2, 2), (0, 0)]


def test_the_move_is_recorded_and_replayed():
    model = block()
    moved = move_padding(model, find_sites(model, X))
    record = json.loads(json.dumps([encoded(edit) for edit in edits(moved)]))
    assert [edit["edit"] for edit in record] == ["padding", "padding"]
    assert torch.equal(replay(copy.deepcopy(model), record)(X), moved(X))


@pytest.mark.parametrize("edit", [{"name": "before", "padding": [1, 1]}, {"name": "up", "padding": [-1, 0]},
                                  {"name": "up", "padding": [1]}, {"name": "", "padding": [1, 1]}])  # fmt: skip
def test_hostile_paddings_are_refused(edit):
    with pytest.raises(CheckpointError):
        replay(block(), [{"edit": "padding", **edit}])


def test_an_inverted_residual_becomes_one_convolution_with_its_skip_inside():
    torch.manual_seed(0)
    model = _randomised(Inverted(4, 24, 3, 1, 1, nn.ReLU6(), residual=True), torch.float64)
    short = find_sites(model, X).select(lambda site: not site.between)
    moved = move_padding(model, short)
    first, second = find_sites(moved, X).select(lambda site: not site.between)
    plan = Plan((Entry.collapse(first), Entry.collapse(second, fold_skip=True)))
    small = apply(moved, plan, X)
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in convolutions] == [(4, 4, 3, 3)]
    expected = simulate(moved, plan)(X)
    assert (small(X) - expected).norm() <= 1e-10 * expected.norm()
    assert torch.allclose(convolutions[0](X), small(X))


def test_padding_of_another_mode_does_not_move():
    model = block()
    model.down.padding_mode = "circular"
    with pytest.raises(SiteError, match="pads with circular"):
        move_padding(model, find_sites(model, X))


def test_a_site_of_linear_layers_has_no_padding_to_move():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x: Tensor = torch.randn(2, 4)
    with pytest.raises(SiteError, match="not a convolution"):
        move_padding(model, find_sites(model, x))


def narrow_and_wide() -> nn.Module:
    """Two inverted residuals, of which the first widens so little that one convolution is dearer."""
    torch.manual_seed(0)
    blocks = [Inverted(4, 5, 3, 1, 1, nn.ReLU6(), residual=False), Inverted(4, 24, 3, 1, 1, nn.ReLU6(), residual=False)]
    return _randomised(nn.Sequential(*blocks), torch.float64)


def test_padding_is_worth_moving_only_where_something_cheaper_comes_of_it():
    model = narrow_and_wide()
    short = find_sites(model, X).select(lambda site: not site.between)
    chosen = worth_moving(short)
    assert [site.producer.name for site in chosen] == ["1.layers.0"]
    moved = move_padding(model, chosen)
    assert paddings(moved)[:3] == paddings(model)[:3]
    plan = Plan.collapse(find_sites(moved, X).select(lambda site: not site.between and site.name.startswith("1")))
    small = apply(moved, plan, X)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_sites_after_a_move_are_described_without_the_model():
    for model in (narrow_and_wide(), block(), block(stride=2)):
        short = find_sites(model, X).select(lambda site: not (site.between or site.followed))
        chosen = [site for site in short if site.consumers[0].padding != (0, 0)]
        found = find_sites(move_padding(model, chosen), X).select(lambda site: not (site.between or site.followed))
        assert as_moved(short, chosen) == list(found)


def test_padding_that_was_moved_goes_back():
    model = block()
    sites = find_sites(model, X)
    moved = move_padding(model, sites)
    again = move_padding(moved, sites, back=True)
    assert paddings(again) == paddings(model)
    assert torch.equal(again(X), model(X))
    assert torch.equal(replay(copy.deepcopy(model), edits(again))(X), model(X))

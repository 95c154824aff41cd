"""What linear sites become is exact or as near as was allowed, told with its costs, and never slower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.errors import MethodError
from shallower.finding.kinds import find_sites
from shallower.measuring.timing import Ratio
from shallower.methods.tlc.choosing import Rival, choose_forms, surely_fastest
from shallower.planning.entries import Entry
from shallower.planning.forms import form_of
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate


class Block(nn.Module):
    """Two 3x3 convolutions with a skip around them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


def block(channels: int = 8, hidden: int = 8) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(channels, hidden))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval(), torch.randn(4, channels, 16, 16)


def feed_forward() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32)).eval()
    return model, torch.randn(64, 32)


def chosen(model: nn.Module, x: Tensor, **options: Any) -> Entry:
    (entry,) = choose_forms(model, collapsed(model, x), x, rounds=3, **options).entries
    return entry


def collapsed(model: nn.Module, x: Tensor) -> Plan:
    return Plan(tuple(Entry.collapse(site) for site in find_sites(model, x)))


def test_a_widening_site_merges_into_one_layer() -> None:
    model, x = feed_forward()
    entry = chosen(model, x)
    assert form_of(entry).kind == "merged"
    assert entry.note.startswith("merged: -15.6K params, -983K MACs, 0.")


def test_padded_convolutions_stay_apart_without_data() -> None:
    model, x = block()
    entry = chosen(model, x)
    assert form_of(entry).kind == "apart"
    assert "merged" not in entry.note


def test_with_data_one_kernel_with_the_skip_inside_takes_the_place_of_a_pair() -> None:
    model, x = block(16, 16)
    batches = [torch.randn(4, 16, 16, 16) for _ in range(3)]
    plan = collapsed(model, x)
    (entry,) = choose_forms(model, plan, torch.randn(8, 16, 32, 32), batches=batches, error=1.0, ranks=()).entries
    assert form_of(entry).kind == "merged"
    assert form_of(entry).consumers[0].taps < 25
    assert "kernel" in entry.note


def test_what_errs_too_much_is_told_and_not_taken() -> None:
    model, x = block()
    batches = [torch.randn(4, 8, 16, 16) for _ in range(3)]
    entry = chosen(model, x, batches=batches, error=0.0)
    assert form_of(entry).kind == "apart"
    assert "more than 0" in entry.note


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_plan_with_its_forms_is_what_surgery_does(error: float) -> None:
    model, x = block(hidden=6)
    batches = [torch.randn(4, 8, 16, 16) for _ in range(3)]
    plan = choose_forms(model, collapsed(model, x), x, batches=batches, error=error, rounds=2)
    torch.testing.assert_close(apply(model, plan, x)(x), simulate(model, plan)(x), rtol=1e-4, atol=1e-4)


def test_the_model_and_the_plan_are_left_as_they_were() -> None:
    model, x = block()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = collapsed(model, x)
    choose_forms(model, plan, x, batches=[x, x], rounds=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert plan.entries[0].becomes == ""


def test_entries_that_keep_channels_stay_as_they_are() -> None:
    model, x = feed_forward()
    (site,) = find_sites(model, x)
    plan = Plan((Entry.narrow(site, torch.arange(100)),))
    assert choose_forms(model, plan, x, rounds=2).entries == plan.entries


def test_overlapping_sites_are_decided_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    x = torch.randn(64, 32)
    plan = choose_forms(model, collapsed(model, x), x, rounds=5)
    assert [form_of(entry).kind for entry in plan.entries] == ["merged", "merged"]
    torch.testing.assert_close(apply(model, plan, x)(x), simulate(model, plan)(x), rtol=1e-4, atol=1e-4)


def test_numbers_out_of_range_are_errors() -> None:
    model, x = block()
    with pytest.raises(MethodError, match="a rank is a part of 1"):
        choose_forms(model, collapsed(model, x), x, ranks=(2,))


def test_a_site_through_a_pooling_is_left_to_the_surgery() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    plan = collapsed(model, x)
    assert choose_forms(model, plan, x, batches=[x, x], rounds=2).entries == plan.entries


SAME, CHEAPER, DEARER = (100, 100), (80, 90), (120, 90)
AS_IT_IS = Rival(SAME, Ratio(1, 1, 1))


@pytest.mark.parametrize(
    ("cost", "time", "taken"),
    [
        (CHEAPER, Ratio(0.8, 0.7, 0.9), True),
        (CHEAPER, Ratio(0.99, 0.9, 1.1), True),
        (CHEAPER, Ratio(1.05, 1.01, 1.1), False),
        (DEARER, Ratio(0.8, 0.7, 0.9), True),
        (DEARER, Ratio(0.94, 0.92, 0.96), False),
        (DEARER, Ratio(0.8, 0.6, 1.1), False),
        (SAME, Ratio(0.9, 0.85, 0.95), True),
        (SAME, Ratio(0.99, 0.9, 1.1), False),
    ],
)
def test_a_form_is_taken_where_it_is_surely_faster_or_cheaper_and_not_surely_slower(
    cost: tuple[int, int], time: Ratio, taken: bool
) -> None:
    assert surely_fastest([AS_IT_IS, Rival(cost, time)]) == taken


def test_what_may_be_as_fast_and_is_exact_comes_before_what_is_fitted() -> None:
    fitted, exact = Rival(CHEAPER, Ratio(0.5, 0.45, 0.55), fitted=True), Rival(CHEAPER, Ratio(0.51, 0.46, 0.56))
    assert surely_fastest([AS_IT_IS, fitted, exact]) == 2


def test_what_is_fitted_is_taken_where_it_is_surely_faster() -> None:
    fitted, exact = Rival(CHEAPER, Ratio(0.5, 0.45, 0.55), fitted=True), Rival(CHEAPER, Ratio(0.8, 0.75, 0.85))
    assert surely_fastest([AS_IT_IS, fitted, exact]) == 1

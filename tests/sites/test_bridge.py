"""What stands between a site's layers, asked instead of read from flags."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.finding.kinds import find_sites
from shallower.sites import Bridge, Site
from tests.networks import AfterSum


class Packed(nn.Module):
    """A gate and an up projection in one map."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.both, self.down, self.gate_first = nn.Linear(6, 16), nn.Linear(8, 6), gate_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, -1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


def only(model: nn.Module, *shape: int) -> Site:
    (site,) = find_sites(model.eval(), torch.randn(*shape))
    return site


def kinds(bridge: Bridge) -> list[str]:
    return [stage.kind for stage in bridge.stages]


def test_a_plain_site_has_an_activation_and_nothing_else() -> None:
    bridge = only(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), 3, 4).bridge
    assert kinds(bridge) == ["activation"]
    assert (bridge.not_linear, bridge.not_narrow, bridge.not_merged, bridge.not_refitted) == (None,) * 4
    assert (bridge.gated, bridge.packed, bridge.block, bridge.dim) == (False, False, 1, -1)
    assert bridge.direct
    assert bridge.columns(torch.tensor([1, 3])).tolist() == [1, 3]


def test_stages_stand_in_the_order_in_which_a_channel_passes_them() -> None:
    layers: list[Any] = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)]
    bridge = only(nn.Sequential(*layers), 2, 3, 5, 5).bridge
    assert kinds(bridge) == ["norm", "activation", "norm"]
    assert bridge.norms == ("1", "3")
    assert (bridge.norm_before, bridge.norm_after) == ("1", "3")
    assert bridge.params == 8 * 4
    assert (bridge.dim, bridge.image) == (1, True)


def test_a_norm_on_one_side_of_the_activation_is_of_that_side() -> None:
    before = only(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), 3, 4).bridge
    after = only(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)), 3, 4).bridge
    assert (before.norm_before, before.norm_after) == ("1", "")
    assert (after.norm_before, after.norm_after) == ("", "2")


def test_a_norm_behind_a_depthwise_convolution_is_not_directly_behind_the_activation() -> None:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), depthwise, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)]
    bridge = find_sites(nn.Sequential(*layers).eval(), torch.randn(2, 3, 5, 5))["0...4"].bridge
    assert (bridge.norms, bridge.norm_before, bridge.norm_after) == (("3",), "", "")


def test_depthwise_convolutions_are_stages() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    bridge = find_sites(nn.Sequential(*layers).eval(), torch.randn(2, 3, 5, 5))["0...4"].bridge
    assert kinds(bridge) == ["activation", "depthwise", "activation"]
    assert [m.name for m in bridge.depthwise] == ["2"]
    assert [place.module for place in bridge.activations] == ["1", "3"]
    assert not bridge.direct


def test_a_flattened_image_gives_each_channel_a_block_of_columns() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 2)]
    bridge = only(nn.Sequential(*layers), 2, 3, 3, 3).bridge
    assert bridge.has("flatten")
    assert not bridge.pixelwise
    assert bridge.columns(torch.tensor([2])).tolist() == list(range(18, 27))


@pytest.mark.parametrize("gate_first", [True, False])
def test_the_rows_of_a_packed_gate(gate_first: bool) -> None:
    torch.manual_seed(0)
    model = Packed(gate_first)
    site = only(model, 3, 6)
    bridge, x, kept = site.bridge, torch.randn(5, 6), torch.tensor([0, 5])
    assert bridge.packed
    assert bridge.gate_first == gate_first
    with torch.no_grad():
        made = model.both(x)
        gate, up = bridge.split(made)
        torch.testing.assert_close(model.down(F.silu(gate) * up), model(x))
        assert torch.equal(made[:, bridge.up_rows(kept)], up[:, kept])
        assert torch.equal(made[:, bridge.gate_rows(kept)], gate[:, kept])


def test_a_padded_consumer_has_a_border() -> None:
    site = only(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)), 2, 3, 5, 5)
    assert site.bridge.pads(site.consumers)
    site = only(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)), 2, 3, 5, 5)
    assert not site.bridge.pads(site.consumers)


def test_an_activation_place_has_no_channels_to_narrow() -> None:
    (place,) = find_sites(AfterSum().eval(), torch.randn(2, 8), kinds=("hidden", "activation"))
    assert place.bridge.not_narrow is not None
    assert place.bridge.not_linear is None

"""The sites' curves of error."""

from __future__ import annotations

import torch
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import narrowable
from shallower.methods.squeezing.sweeping import Sweep


def curves(walking: bool = True, collapse: bool = True) -> list[dict[int, float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))
    batches = [torch.randn(64, 6) for _ in range(4)]
    calibration = Calibration(batches, SqueezeOptions(collapse=collapse))
    return list(Sweep(model, narrowable(find_sites(model, batches[0])), calibration, walking=walking).errors.values())


def test_an_error_falls_with_the_width_to_nothing_with_all_channels() -> None:
    for curve in curves():
        errors = [curve[width] for width in sorted(curve) if width > 0]
        assert errors == sorted(errors, reverse=True)
        assert abs(errors[-1]) < 1e-6 * errors[0]


def test_a_full_collapse_is_on_the_curve_where_it_is_allowed() -> None:
    assert all(0 in curve for curve in curves())
    assert not any(0 in curve for curve in curves(collapse=False))


def test_passes_from_finished_blocks_tell_the_same() -> None:
    for one, other in zip(curves(True), curves(False), strict=True):
        assert one.keys() == other.keys()
        torch.testing.assert_close(torch.tensor(list(one.values())), torch.tensor(list(other.values())))

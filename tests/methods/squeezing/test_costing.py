"""What widths cost: as counted, what the model then has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.costing import Times, WidthCosts
from shallower.methods.squeezing.latencies import narrowed_copy
from shallower.methods.squeezing.options import SqueezeOptions


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def apart() -> nn.Sequential:
    layers = [nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 6), nn.LayerNorm(6)]
    return nn.Sequential(*layers, nn.Linear(6, 30), nn.GELU(), nn.Linear(30, 3))


def held(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("make", [chain, apart])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_counted_is_what_the_narrower_model_has(make: type[nn.Sequential], dtype: torch.dtype) -> None:
    model = make().eval().to(dtype)
    sites = find_sites(model, torch.zeros(2, 6, dtype=dtype))
    widths = {site.name: site.width // 2 for site in sites}
    small = narrowed_copy(model, list(sites), widths)
    found = WidthCosts(model, sites).after(widths)
    assert found.params == sum(p.numel() for p in small.parameters())
    assert found.size == held(small)


def test_what_is_expected_follows_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 64)).eval()
    x = torch.randn(64, 64)
    times = Times(model, find_sites(model, x), x, SqueezeOptions())
    widths = {site.name: 256 for site in times.sites}
    assert times.predicted(widths) < times.before
    assert times.expected(widths) == pytest.approx(times.predicted(widths))
    times.learn(widths, times.before)
    assert times.predicted(widths) < times.expected(widths) < times.before

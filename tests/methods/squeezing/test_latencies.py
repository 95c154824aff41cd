"""Latencies of sites: what is measured, interpolated and kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.latencies import Latency, cache_file, candidates, site_latencies


class Blocks(nn.Module):
    """Residual blocks whose hidden layers take nearly all of the time."""

    def __init__(self, d: int = 64, n: int = 2048, blocks: int = 2) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(d, n) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(n, d) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


def test_measured_widths_are_interpolated() -> None:
    latency = Latency(100, 0.5, {0: 0.1, 25: 0.4, 50: 0.6})
    assert latency.at(100) == 0.5
    assert latency.at(0) == pytest.approx(0.05)
    assert latency.at(50) == pytest.approx(0.3)
    assert latency.at(75) == pytest.approx(0.4)
    assert latency.at(10) == pytest.approx(0.5 * (0.4 - 15 * 0.2 / 25))


def test_a_site_that_was_not_measured_narrower_stays_as_slow_as_it_is() -> None:
    assert Latency(1, 0.25, {}).at(1) == 0.25


def test_candidates_are_multiples_below_the_width() -> None:
    assert candidates(64, 8) == [8, 16, 24, 32, 40, 48, 56]
    assert candidates(100, 16) == [16, 32, 48, 64, 80]
    assert candidates(2) == [1]
    assert candidates(1) == []


def test_fewer_channels_and_one_linear_map_take_less_time(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(64, 64)
    sites = find_sites(model, x)
    found = site_latencies(model, sites, x, collapse=[s.name for s in sites], cache=tmp_path / "l.json")
    for latency in found.values():
        assert latency.at(0) < latency.at(512) < latency.at(2048)
    assert 0.5 < sum(latency.part for latency in found.values()) <= 1


def test_what_was_measured_is_read_from_the_disk(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(4, 64)
    sites = find_sites(model, x)
    path = tmp_path / "folder" / "l.json"
    first = site_latencies(model, sites, x, cache=path)
    assert site_latencies(model, sites, x, cache=path) == first
    before = path.read_text()
    site_latencies(model, sites, x[:2], cache=path)
    assert path.read_text() != before


def test_machines_with_other_processors_do_not_share_what_was_measured(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 64)
    sites = find_sites(model, x)
    path = tmp_path / "l.json"
    site_latencies(model, list(sites), x, cache=path)
    before = path.read_text()
    monkeypatch.setattr("os.cpu_count", lambda: 1024)
    site_latencies(model, list(sites), x, cache=path)
    assert path.read_text() != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [[2.0, {"3": "x"}]]}', '{"a": [[-1, {}]]}'])
def test_a_damaged_cache_is_measured_again(model: nn.Module, tmp_path: Path, content: str) -> None:
    x = torch.randn(2, 64)
    sites = find_sites(model, x)
    path = tmp_path / "l.json"
    path.write_text(content)
    found = site_latencies(model, sites, x, cache=path)
    assert site_latencies(model, sites, x, cache=path) == found


def test_a_cache_that_cannot_be_written_is_no_error(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    x = torch.randn(2, 64)
    sites = find_sites(model, x)
    assert set(site_latencies(model, sites, x, cache=tmp_path / "file" / "l.json")) == {s.name for s in sites}


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    assert cache_file() == tmp_path / "latencies.json"


def test_measuring_leaves_the_model_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    sites = find_sites(model, x)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    site_latencies(model, sites, x, cache=tmp_path / "l.json")
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

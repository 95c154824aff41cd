"""Linear paths beside kept channels, from calibration to what is saved and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.core.inputs import call
from shallower.core.trees import tensors
from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.refitting import may_have_path, price_of_path
from shallower.methods.squeezing.squeeze import narrowable, squeeze
from shallower.methods.squeezing.sweeping import Sweep
from shallower.modules.activations import PartialActivation
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import form_of
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import load, save
from shallower.saving.exporting import export
from shallower.sites import Site
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate
from tests.networks import seeds
from tests.zoo import ZOO, Specimen

DISTINCT = {"bert", "vit", "albert", "gpt2", "phi3", "llama", "timm_convnext"}
"""Separate layers, tied calls, transposed weights, packed and separate gates, convolutions of 1x1."""


class PartlyLinear(nn.Module):
    """relu(a x) - relu(-a x) is a x: twelve channels say something linear of rank two, and four something else."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            a, c = 0.3 * torch.randn(6, 2) @ torch.randn(2, 8), 0.1 * torch.randn(8, 2) @ torch.randn(2, 6)
            self.up.weight[:12].copy_(torch.cat([a, -a]))
            self.up.bias[:12].zero_()
            self.down.weight[:, :12].copy_(torch.cat([c, -c], 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.relu(self.up(x)))
        return y


class Gated(nn.Module):
    """SwiGLU with gates that vary little, so that much of it is linear."""

    def __init__(self, packed: bool = False, d: int = 8, n: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(d, 2 * n if packed else n)
        self.up = nn.Identity() if packed else nn.Linear(d, n, bias=False)
        self.down = nn.Linear(n, d, bias=False)
        self.packed = packed
        with torch.no_grad():
            self.gate.weight[:n] *= 0.3
            self.gate.bias[:n] += 1.0

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.packed else (self.gate(x), self.up(x))
        y: Tensor = self.down(F.silu(gate) * up)
        return x + y


class Pointwise(nn.Module):
    """Convolutions of 1x1, with a BatchNorm behind the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Conv2d(6, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.norm(self.up(x))))


def rows(count: int = 8, *shape: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape or (64, 8), generator=generator) for _ in range(count)]


def error(small: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - dense(x)).norm() / dense(x).norm())


def rank(entry: Entry) -> int:
    return 0 if entry.fit is None or entry.fit.down is None else len(entry.fit.down)


def with_random_path(site: Site) -> Entry:
    """Half of the channels beside a path of rank two, all with whatever weights."""
    assert site.producer is not None
    kept = torch.arange(0, site.width, 2)
    pixel = (1, 1) if site.producer.kind == "conv2d" else ()

    def small(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, *pixel)

    fit = Fit(
        tuple(small(c.d_out, len(kept)) for c in site.consumers),
        tuple(0.2 * torch.randn(c.d_out) * c.bias for c in site.consumers),
        small(2, site.producer.d_in),
        tuple(small(c.d_out, 2) for c in site.consumers),
    )
    return Entry.narrow(site, kept, fit=fit)


def test_what_is_linear_of_a_hidden_tensor_goes_through_the_path() -> None:
    model, batches = PartlyLinear().eval(), rows()
    sites = find_sites(model, batches[0])
    plans = [
        squeeze(
            model, sites, batches, "macs:38%", options=SqueezeOptions(collapse=False, producers=False, linear_path=path)
        )
        for path in (False, True)
    ]
    without, with_path = (error(apply(model, plan, batches[0]), model, rows(1, seed=2)[0]) for plan in plans)
    assert (len(plans[1].entries[0].kept), rank(plans[1].entries[0])) == (4, 2)
    assert with_path < 1e-3
    assert without > 0.05


@pytest.mark.parametrize("make", [Gated, lambda: Gated(packed=True)], ids=["separate", "packed"])
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_path_beside_a_gate_costs_no_more_than_was_asked_for(make: type[Gated], unit: str) -> None:
    model, batches = make().eval(), rows()
    options = SqueezeOptions(collapse=False, producers=False, linear_path=True)
    plan = squeeze(model, find_sites(model, batches[0]), batches, f"{unit}:60%", options=options)
    small = apply(model, plan, batches[0])
    (entry,) = plan.entries
    assert rank(entry) > 0
    assert len(entry.kept) + price_of_path(entry.site) * rank(entry) <= 0.6 * entry.site.width
    assert any(isinstance(module, PartialActivation) for module in small.modules())
    before, after = getattr(entry.site, unit), getattr(form_of(entry), unit)
    assert after <= 0.6 * before
    if unit == "params":
        assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())


def test_convolutions_of_one_pixel_have_paths() -> None:
    model, batches = Pointwise().eval(), rows(8, 8, 6, 5, 5)
    sites = find_sites(model, batches[0])
    plan = squeeze(model, sites, batches, "macs:30%", options=SqueezeOptions(producers=False, linear_path=True))
    assert rank(plan.entries[0]) > 0
    apply(model, plan, batches[0])  # proves itself


def test_other_convolutions_are_squeezed_as_without_the_option() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)).eval()
    batches = rows(4, 8, 3, 6, 6)
    sites = find_sites(model, batches[0])
    first, second = (
        squeeze(model, sites, batches, "macs:50%", options=SqueezeOptions(linear_path=path)).entries[0]
        for path in (False, True)
    )
    assert first.fit is not None
    assert second.fit is not None
    assert torch.equal(first.fates, second.fates)
    assert first.fit.tensors.keys() == second.fit.tensors.keys()
    assert all(torch.equal(tensor, second.fit.tensors[name]) for name, tensor in first.fit.tensors.items())


@given(seed=seeds)
@settings(max_examples=6)
def test_a_path_is_taken_only_where_held_out_rows_say_that_it_is_better(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)).eval()
    batches = rows(4, 48, 6, seed=seed)
    sites = find_sites(model, batches[0])
    for producers in (False, True):
        sweeps = [
            Sweep(model, sites, Calibration(batches, SqueezeOptions(producers=producers, linear_path=path)))
            for path in (False, True)
        ]
        without, found = (sweep.plan({sites[0].name: 7})[0].entries[0] for sweep in sweeps)
        assert found.error is not None
        assert without.error is not None
        assert found.error <= without.error
        assert rank(found) > 0 or torch.equal(found.fates, without.fates)


def test_the_curve_of_errors_knows_of_the_path() -> None:
    model, batches = PartlyLinear().eval(), rows()
    sites = find_sites(model, batches[0])
    without, found = (
        Sweep(model, sites, Calibration(batches, SqueezeOptions(linear_path=path))).errors[sites[0].name]
        for path in (False, True)
    )
    assert all(found[width] <= without[width] * (1 + 1e-9) for width in range(1, 17))
    assert found[6] < 0.01 * without[6]


def test_rank_and_width_are_multiples() -> None:
    model, batches = Gated(n=64).eval(), rows()
    sites = find_sites(model, batches[0])
    (entry,) = squeeze(
        model, sites, batches, "macs:50%", options=SqueezeOptions(producers=False, linear_path=True, round_to=4)
    ).entries
    assert rank(entry) > 0
    assert len(entry.kept) % 4 == 0
    assert rank(entry) % 4 == 0


def test_of_overlapping_sites_the_earlier_has_no_path() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)]
    model, batches = nn.Sequential(*layers).eval(), rows()
    sites = find_sites(model, batches[0])
    plan = squeeze(model, sites, batches, "params:40%", options=SqueezeOptions(collapse=False, linear_path=True))
    assert [rank(entry) > 0 for entry in plan.entries] == [False, True]
    apply(model, plan, batches[0])  # proves itself


def test_a_latency_is_timed_with_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2048), nn.GELU(), nn.Linear(2048, 64)).eval()
    batches = rows(4, 256, 64)
    sites = find_sites(model, batches[0])
    (entry,) = squeeze(
        model, sites, batches, "latency:1.5x", options=SqueezeOptions(linear_path=True, producers=False)
    ).entries
    assert len(entry.kept) + rank(entry) < 2048


def test_a_path_survives_saving_and_loading(tmp_path: Path) -> None:
    model, batches = Gated().eval(), rows()
    plan = squeeze(
        model,
        find_sites(model, batches[0]),
        batches,
        "macs:60%",
        options=SqueezeOptions(producers=False, linear_path=True),
    )
    assert rank(plan.entries[0]) > 0
    plan.save(tmp_path / "plan")
    small = apply(model, Plan.load(tmp_path / "plan"), batches[0])
    save(small, tmp_path / "small", source="tests.methods.squeezing.test_squeeze_paths:Gated")
    again = load(tmp_path / "small", model=Gated()).eval()
    with torch.no_grad():
        assert torch.equal(again(batches[0]), small(batches[0]))


def test_a_path_is_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, batches = Gated().eval(), rows()
    plan = squeeze(
        model,
        find_sites(model, batches[0]),
        batches,
        "macs:60%",
        options=SqueezeOptions(producers=False, linear_path=True),
    )
    assert rank(plan.entries[0]) > 0
    small = apply(model, plan, batches[0])
    export(small, batches[0], tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: batches[0].numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), small(batches[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "specimen",
    [pytest.param(s, id=s.name, marks=() if s.name in DISTINCT else pytest.mark.slow) for s in ZOO],
)
def test_fitted_paths_are_applied_exactly(specimen: Specimen) -> None:
    model, inputs = specimen.build()
    try:
        found = narrowable(find_sites(model, inputs))
    except SiteError:
        pytest.skip("nothing to squeeze")
    made = {m.name for site in found for m in (site.producer, site.gate) if m is not None}
    sites = [s for s in found if s.width > 6 and may_have_path(s) and not made & {m.name for m in s.consumers}]
    if not sites:
        pytest.skip("no site of it can have a path")
    torch.manual_seed(0)
    plan = Plan(tuple(with_random_path(site) for site in sites))
    small = apply(model, plan, inputs)
    assert all(form_of(entry).kind == "partial" for entry in plan.entries)
    with torch.no_grad():
        outputs = [next(tensors(call(m, inputs))) for m in (small, simulate(model, plan))]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)

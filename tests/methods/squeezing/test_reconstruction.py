"""Producers of narrowed sites fitted by Gauss-Newton steps."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.calibrating.site_grams import SiteRows
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.reconstruction import Reconstruction, reconstruct
from shallower.methods.squeezing.site_layers import SiteLayers
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate


class Gated(nn.Module):
    """SwiGLU with a residual, without biases."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.packed = packed
        self.gate = nn.Linear(6, 40 if packed else 20, bias=False)
        self.up = nn.Identity() if packed else nn.Linear(6, 20, bias=False)
        self.down = nn.Linear(20, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            gate, up = self.gate(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        y: Tensor = self.down(F.silu(gate) * up)
        return x + y


def feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6))


def with_slopes() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.PReLU(20), nn.Linear(20, 6))


def norm(channels: int) -> nn.BatchNorm2d:
    """Not the identity."""
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        made.weight.uniform_(0.5, 2)
        made.bias.normal_()
        made.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
        made.running_var.uniform_(0.1, 0.5)  # type: ignore[union-attr]
    return made


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 12, 3, 2, 1, bias=False), norm(12), nn.ReLU(), nn.Conv2d(12, 5, 3, padding=1))


def depthwise_between() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 12, 1, bias=False),
        norm(12),
        nn.SiLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        norm(12),
        nn.SiLU(),
        nn.Conv2d(12, 5, 1, bias=False),
        norm(5),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "feed-forward": (feed_forward, (400, 6)),
    "PReLU": (with_slopes, (400, 6)),
    "gated": (Gated, (400, 6)),
    "packed": (lambda: Gated(packed=True), (400, 6)),
    "convolutions": (convolutions, (40, 4, 8, 8)),
    "depthwise between": (depthwise_between, (40, 4, 8, 8)),
}


def case(name: str) -> tuple[nn.Module, Site, Tensor, Tensor]:
    """Model, its site, inputs, and the site's consumer's outputs."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.randn(shape)
    site = next(s for s in find_sites(model, x[:2]) if not s.not_narrow)
    seen: list[Tensor] = []
    handle = model.get_submodule(site.consumers[0].name).register_forward_hook(lambda _m, _a, y: seen.append(y))
    with torch.no_grad():
        model(x)
    handle.remove()
    return model, site, x, seen[0]


def fitted(name: str, keep: int = 5) -> tuple[nn.Module, Site, Tensor, Tensor, Reconstruction]:
    model, site, x, y = case(name)
    kept = torch.arange(0, site.width, site.width // keep)[:keep]
    layers = SiteLayers.of(model, site, kept)
    assert layers is not None
    cut = len(x) * 3 // 4
    root = torch.eye(y.shape[1], dtype=torch.float64)
    bias = site.consumers[0].bias or site.channels_first
    with torch.no_grad():
        found = reconstruct(
            layers, [SiteRows(x[:cut], y[:cut])], [SiteRows(x[cut:], y[cut:])], root, ridge=1e-6, intercept=bias
        )
    return model, site, x, kept, found


@pytest.mark.parametrize("name", NETWORKS)
def test_fitted_producers_leave_less_error_on_held_out_rows(name: str) -> None:
    *_, found = fitted(name)
    assert found.after < 0.99 * found.before


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_order_change_is_what_a_small_step_does(name: str) -> None:
    model, site, x, _ = case(name)
    layers = SiteLayers.of(model, site, torch.arange(site.width))
    assert layers is not None
    deltas = {n: 1e-4 * torch.randn(len(p.weight), p.weight[0].numel() + p.free) for n, p in layers.producers.items()}
    with torch.no_grad():
        before, slopes, others = layers.linearised(x)
        there = layers.moved(deltas).hidden(x) - layers.moved({n: -d for n, d in deltas.items()}).hidden(x)
        change = layers.change(x, slopes, others, deltas)
    torch.testing.assert_close(before, layers.hidden(x))
    # a kink that is crossed within the step is no error of the derivative
    assert (there / 2 - change).norm() < 0.05 * change.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_surgery_does_what_was_fitted(name: str) -> None:
    model, site, x, kept, found = fitted(name)
    consumer = site.consumers[0]
    weight = found.weight.reshape(consumer.d_out, len(kept), *(consumer.kernel if site.channels_first else ()))
    entry = Entry.narrow(site, kept, fit=found.added_to(Fit((weight,), (found.bias,))))
    before = copy.deepcopy(model.state_dict())
    small = apply(model, Plan((entry,)), x[:2])
    with torch.no_grad():
        torch.testing.assert_close(small(x), simulate(model, Plan((entry,)))(x), atol=1e-4, rtol=1e-4)
        seen: list[Tensor] = []
        small.get_submodule(consumer.name).register_forward_hook(lambda _m, _a, y: seen.append(y))
        small(x)
        z = found.layers.hidden(x)
        expected = F.conv2d(z, weight, found.bias, padding=consumer.padding) if z.dim() > 2 else F.linear(z, weight)
        expected = expected + (found.bias if z.dim() == 2 and consumer.bias else 0)
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in before.items())

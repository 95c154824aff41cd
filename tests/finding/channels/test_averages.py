"""Averages over channels: those of norms, and others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.channels.spaces import AVERAGED
from shallower.finding.kinds import find_sites
from tests.followed import drawn


class OwnNorm(nn.Module):
    """A norm written out, with a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class Transformer(nn.Module):
    """Two pre-norm blocks with a tied head over a vocabulary."""

    def __init__(self, norm: type[nn.Module] = OwnNorm) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 16, 8))
        self.norms = nn.ModuleList(norm(8) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


class Outside(nn.Module):
    """An average over channels in the forward of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h - h.mean(-1, keepdim=True))


@pytest.mark.parametrize("norm", [OwnNorm, nn.LayerNorm, nn.RMSNorm])
def test_the_residual_stream_is_cut_with_its_norms_embeddings_and_tied_head(norm: type[nn.Module]) -> None:
    model, ids = drawn(Transformer(norm)), torch.randint(0, 11, (2, 5))
    (stream,) = find_sites(model, ids, kinds="stream")
    assert stream.width == 8
    assert {average.module for average in stream.averages} == {"norms.0", "norms.1", "norms.2"}
    assert {"tokens.weight", "positions"} <= {slot.tensor for slot in stream.slots}
    plan = sh.Plan((sh.Entry.narrow(stream, [0, 1, 3, 6, 7]),))
    small = sh.apply(model, plan, ids)
    assert small.head.weight is small.tokens.weight
    assert small.positions.shape == (1, 16, 5)
    longer = torch.randint(0, 11, (3, 9))
    torch.testing.assert_close(small(longer), sh.simulate(model, plan)(longer))


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised in every pass."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(rows, None, None, training=True, eps=1e-5).reshape_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


class Seen(nn.Module):
    """Pixels weighted by the average and the extremes of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        seen = (h.mean(1, keepdim=True), h.amax(1, keepdim=True), h.std(1, keepdim=True))
        return self.b(h * self.weight(torch.cat(seen, 1)))


class Compared(Seen):
    """A loss of hidden channels is returned, and one head attends with the usual scale."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).flatten(2).mT
        other = nn.functional.scaled_dot_product_attention(h, h, h)
        return self.b((h + other).mT[..., None]), nn.functional.mse_loss(h, other)


def _standardised() -> nn.Module:
    return nn.Sequential(Standardised(3, 6, 1), nn.ReLU(), Standardised(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Outside(), (5, 4)), (Seen(), (2, 3, 5, 5)), (Compared(), (2, 3, 5, 5)), (_standardised(), (2, 3, 5, 5))],
)
def test_an_average_anywhere_is_that_of_the_channels_that_stay(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    drawn(model)
    sites = find_sites(model, x, kinds="hidden")
    assert all(site.averages for site in list(sites)[:1])
    plan = sh.Plan(tuple(sh.Entry.narrow(site, [0, 1, 4]) for site in sites))
    small = sh.apply(model, plan, x)
    assert small.get_submodule(sites[0].name).weight.shape[0] == 3
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))


def test_an_average_over_one_of_two_dimensions_with_the_same_channels_is_refused() -> None:
    class Pairs(Outside):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b((h[:, :, None] * h[:, None]).mean(1))

    sites = find_sites(Pairs(), torch.randn(2, 4), kinds="hidden")
    assert sites.skipped["a"] == AVERAGED


def test_a_norm_that_reads_a_gate_computes_on_what_stays_of_both() -> None:
    class GatedNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6) + 0.5)

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            if gate is not None:
                x = x * torch.nn.functional.silu(gate)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.norm, self.b = nn.Linear(4, 6), nn.Linear(4, 6), GatedNorm(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x), self.gate(x)))

    model, x = drawn(Gated()), torch.randn(5, 4)
    (site,) = find_sites(model, x)
    assert set(site.layers) == {"a", "gate", "norm", "b"}
    plan = sh.Plan((sh.Entry.narrow(site, [0, 3, 4, 5]),))
    small = sh.apply(model, plan, x)
    assert small.norm.weight.shape == (4,)
    torch.testing.assert_close(small(x + 1), sh.simulate(model, plan)(x + 1))


def test_a_norm_of_what_does_not_depend_on_the_inputs_is_one() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.norm = nn.Embedding(3, 6), OwnNorm(6)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.queries(torch.arange(3))) + self.a(x))

    model, x = drawn(Queries()), torch.randn(5, 3, 4)
    (site,) = find_sites(model, x)
    assert [average.module for average in site.averages] == ["norm"]
    plan = sh.Plan((sh.Entry.narrow(site, [1, 2, 4]),))
    torch.testing.assert_close(sh.apply(model, plan, x)(x + 1), sh.simulate(model, plan)(x + 1))

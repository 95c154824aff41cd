"""One site as a rival sees it: its weights, and what its consumers read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Centred, Gram
from shallower.errors import FitError
from shallower.methods.dropout.ordering import magnitudes
from shallower.modules.layers import bias_of, weight_of
from shallower.planning.fits import Fit
from shallower.sites import Site


@dataclass(frozen=True)
class View:
    """What a rival may know of a site with n channels, each with m columns of its consumers.

        view = View(model, site, gram)
        view.of_channels(view.variance * view.weight.square().sum(0))

    A channel has several columns where a consumer is a convolution (one for each tap) and where it is a head.

    Attributes:
        model: whose weights are seen.
        site: of this model.
        gram: moments of what the consumers read, with its columns as columns (products of all) or as outputs (squares
            alone); None for a rival that needs no data.
        seed: of whatever is random.
    """

    model: nn.Module
    site: Site
    gram: Gram | None = None
    seed: int = 0

    @cached_property
    def weight(self) -> Tensor:
        """(d, n m) float64, the consumers' weights below one another."""
        found: list[Tensor] = []
        for m in self.site.consumers:
            found.append(weight_of(self.model.get_submodule(m.name)).double().cpu().flatten(1))
        return torch.cat(found)

    @cached_property
    def bias(self) -> Tensor:
        """(d,) float64, the consumers' biases; 0 where they have none."""
        found: list[Tensor] = []
        for m in self.site.consumers:
            bias = bias_of(self.model.get_submodule(m.name))
            if bias is None:
                bias = torch.zeros(m.d_out)
            found.append(bias.double().cpu())
        return torch.cat(found)

    @cached_property
    def magnitude(self) -> Tensor:
        """(n,) float64, the product of the norms of a channel's rows and columns."""
        return magnitudes(self.model, [self.site])[self.site.name]

    def moments(self, intercept: bool = True) -> Centred:
        """Second moments of the columns, about their means or about 0.

        Raises:
            FitError: no data were seen.
        """
        if self.gram is None:
            raise FitError(f"{self.site.name}: this needs data, and none were read")
        return self.gram.centred(intercept)

    @cached_property
    def mean(self) -> Tensor:
        """(n m,) float64."""
        moments = self.moments()
        return torch.cat([moments.mean_z, moments.mean_y]).cpu()

    @cached_property
    def variance(self) -> Tensor:
        """(n m,) float64."""
        moments = self.moments()
        if len(moments.mean_z):
            return moments.squares.cpu().clamp_min(0)
        return moments.yy.cpu()

    @property
    def energy(self) -> Tensor:
        """(n m,) float64, E[z^2]."""
        return self.variance + self.mean.square()

    def of_channels(self, values: Tensor) -> Tensor:
        """(n,), the sums over each channel's columns of values (n m,)."""
        return values.view(self.site.width, -1).sum(1)

    def columns(self, channels: Tensor) -> Tensor:
        """The places of these channels' columns, int64."""
        each = self.site.columns_each
        return (channels[:, None] * each + torch.arange(each)).flatten()

    @property
    def intercept(self) -> bool:
        """Whether a fit may change the bias: always at convolutions; elsewhere where the consumers have one."""
        return all(m.bias or m.kind != "linear" for m in self.site.consumers)

    def fit(self, kept: Tensor, weight: Tensor, bias: Tensor) -> Fit:
        """Consumers with these weights (d, k m) for the k kept channels, and biases (d,)."""
        sizes = [m.d_out for m in self.site.consumers]
        weights: list[Tensor] = []
        for m, part in zip(self.site.consumers, torch.split(weight, sizes), strict=True):
            if m.kind == "conv2d":
                part = part.reshape(m.d_out, len(kept), *m.kernel)
            weights.append(part.clone())
        return Fit(tuple(weights), tuple(map(torch.clone, torch.split(bias, sizes))))

"""What a slope activation becomes in a plan: channels whose slope arrived are linear, the others stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shallower.calibrating.moments import Moments, gaussian_prelu
from shallower.errors import MethodError
from shallower.modules.activations import SlopeActivation
from shallower.modules.layers import normal_after
from shallower.planning.entries import Entry, Family, Fate
from shallower.sites import Site


@dataclass(frozen=True)
class Fates:
    """How entries of a plan are made from slopes.

        entry = Fates(model, tolerance=0.05).entry(site, activation)

    Attributes:
        model: that the activations are attached to.
        tolerance: slopes with |1 - a| < tolerance become linear.
        unit: the line is the identity; else the one nearest to the slope activation.
        moments: by the name of the site, where they were measured; otherwise the BatchNorm before the activation says
            how its input is distributed.
    """

    model: nn.Module
    tolerance: float
    unit: bool = False
    moments: Mapping[str, Moments] = field(default_factory=dict)

    def entry(self, site: Site, activation: SlopeActivation) -> Entry | None:
        """The entry of a site; None where no slope ever left 0, so that the activation is f still.

        Raises:
            MethodError: an activation place has neither arrived nor stayed as it was.
        """
        alphas = unsharded(activation.slope).detach().cpu().double()
        linear = (1 - alphas).abs() < self.tolerance
        if activation.family == "blend" and not bool(alphas.any()):
            return None
        if site.kind == "activation":
            if not bool(linear.all()):
                raise MethodError(
                    f"{site.name}: an activation place is either linear or as it was, and its slope is "
                    f"{float(alphas):.3f}: train it further, or leave the site out when you construct the method"
                )
            return Entry.collapse(site)
        fates = torch.where(linear, int(Fate.LINEAR), int(Fate.KEEP)).to(torch.int8).expand(site.width).clone()
        slopes, offsets = self._line(site, activation, bool(linear.any()))
        kept = None if bool(linear.all()) else alphas
        family: Family = "blend" if site.bridge.gated else activation.family
        return Entry(site, fates, slopes, offsets, alphas=kept, family=family)

    def _line(self, site: Site, activation: SlopeActivation, needed: bool) -> tuple[Tensor, Tensor]:
        """Slope and offset, (n,) each, of the line that takes the place of the almost linear channels."""
        if needed and site.name in self.moments:
            slope, offset = self.moments[site.name].best_affine()
            return slope.cpu(), offset.cpu()
        norm = site.bridge.norm_before
        if needed and not self.unit and norm and not site.bridge.gated:
            normal = normal_after(self.model.get_submodule(norm))
            if normal is None:
                raise MethodError(f"{site.name}: {norm} before the activation is not a BatchNorm any more")
            return _under_normal(activation, *normal)
        return torch.ones(site.width, dtype=torch.float64), torch.zeros(site.width, dtype=torch.float64)


def unsharded(slope: Tensor) -> Tensor:
    """The slope of all shards, where FSDP has distributed it."""
    return slope.full_tensor() if isinstance(slope, DTensor) else slope


@torch.no_grad()
def _under_normal(activation: SlopeActivation, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The line nearest to the activation for h ~ N(mean, std^2): in closed form of a PReLU, else by quadrature."""
    if activation.kernel == "relu":
        return gaussian_prelu(mean, std, unsharded(activation.slope).cpu())
    return Moments.gaussian(mean, std, copy.deepcopy(activation).cpu().double()).best_affine()

"""Networks with branches and layers out of use, in which all that stays keeps its name.

small = emptied(model, [sites["model.layers.3:layer"]])
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import lent
from shallower.modules.prepared.absent import PassedOn, Zeros
from shallower.sites import Site


def emptied(model: nn.Module, dropped: Iterable[Site]) -> nn.Module:
    """A copy that computes what the model does without these branches, and as fast; its weights are the model's own.

    The modules stay, since a forward may ask them for more than their outputs, and do not run.
    """
    small = detached_copy(model, lent(model.parameters()))
    for site in dropped:
        branch = site.branch
        if branch is None:
            continue
        for gone in branch.emptied:
            instead: nn.Module = Zeros(gone.returns)
            if branch.layer:
                instead = PassedOn(gone.returns)
            elif gone.module == branch.closing:
                instead = Zeros(gone.returns, branch.channels, branch.stride)
            vars(small.get_submodule(gone.module))["forward"] = instead.forward
    return small


def inside(site: Site, dropped: Iterable[Site]) -> bool:
    """Whether a site goes with one of these branches, as a part of it.

    inside(sites["model.layers.3.mlp"], [sites["model.layers.3:layer"]])
    """
    for other in dropped:
        if other.branch is None or other.name == site.name:
            continue
        names = [gone.module for gone in other.branch.emptied]
        if any(_belongs(layer, name) for layer in site.layers for name in names):
            return True
    return False


def _belongs(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")

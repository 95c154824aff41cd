"""The layers of a few sites in a row, taken out of their model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from shallower.core.failures import is_out_of_memory
from shallower.errors import ShallowerError
from shallower.modules import attachment
from shallower.planning.entries import Entry
from shallower.sites import LinearMap, Site


class Chain(nn.Module):
    """The layers of overlapping sites, with what stands between them and the skip around the last.

        chain = Chain(model, sites)
        chain(x)                            # what the last consumer makes of the first producer's input

    Args:
        model: before or after surgery on the sites.
        sites: each one's consumer is the next one's producer.
        entries: of the sites, where surgery has been done: a skip that was folded in is not added again.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], entries: Sequence[Entry] = ()) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        seen: set[str] = set()
        for i, site in enumerate(sites):
            first = cast("LinearMap", site.producer).name
            for name in (first, site.bridge.norm_before):
                if name and name not in seen:
                    layers.append(model.get_submodule(name))
            layers += _activation(model, site)
            if site.bridge.norm_after:
                layers.append(model.get_submodule(site.bridge.norm_after))
            seen |= {first, *(consumer.name for consumer in site.consumers)}
            if i + 1 < len(sites):
                layers.append(model.get_submodule(site.consumers[0].name))
        last = sites[-1]
        self.layers = nn.Sequential(*layers)
        self.ends = nn.ModuleList(model.get_submodule(consumer.name) for consumer in last.consumers)
        self.norm: nn.Module = nn.Identity()
        if last.residual is not None and last.residual.norm:
            self.norm = model.get_submodule(last.residual.norm)
        self.skip = last.residual is not None and not any(entry.fold_skip for entry in entries)
        self.eval()

    def runs_on(self, x: Tensor) -> bool:
        """Whether this is all that happens to x: a reshape between the layers would be missing here."""
        try:
            self(x)
        except RuntimeError as error:
            if isinstance(error, ShallowerError) or is_out_of_memory(error):
                raise
            return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        """The first consumer's output for the first producer's input; the other consumers run for their time."""
        z = self.layers(x)
        y: Tensor = self.norm(self.ends[0](z))
        for end in self.ends[1:]:
            end(z)
        if self.skip:
            y = y + x
        return y


def _activation(model: nn.Module, site: Site) -> list[nn.Module]:
    """The activation as a module, unless it is part of the norm in front of it."""
    place, norm = site.activation, site.bridge.norm_before
    if place is None or (norm and place.module.startswith(f"{norm}.")):
        return []
    with attachment.exposed(model, [place]) as modules:
        return [copy.deepcopy(modules[place])]

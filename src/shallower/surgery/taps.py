"""Where a model with its plan simulated and the model after surgery can be compared.

    for tap in taps_of(steps):
        tap.module_in(model)

That is where each site is read: the outputs of its consumers, the sum that a skip was folded into, the activation that
is gone at an activation place. Where a consumer is changed by a later step itself, those of its channels that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shallower.errors import SurgeryError
from shallower.modules.rewriting import name_at
from shallower.planning.forms import Step
from shallower.sites import Place, Site


@dataclass(frozen=True)
class TapChannels:
    """Channels of one output that a model before and one after surgery have in common."""

    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Tap:
    """The output of one module, in the simulated model and in the one after surgery.

    Attributes:
        site: that is read there.
        place: where the module is.
        dim: dimension of the output that holds its channels.
        common: the channels to compare; None for all.
        loose: whether other dimensions of the output may be narrower after surgery, where it is not compared.
    """

    site: Site
    place: Place
    dim: int = -1
    common: TapChannels | None = None
    loose: bool = False

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return str(self.place)

    def module_in(self, model: nn.Module) -> nn.Module:
        """Whose output it is.

        Raises:
            SurgeryError: the model has no such module.
        """
        try:
            return model.get_submodule(name_at(model, self.place))
        except AttributeError:
            raise SurgeryError(
                f"{self.site.name}: after surgery `{self.name}` is missing, so nothing can be compared there"
            ) from None

    def read(self, output: Tensor, *, after: bool) -> Tensor:
        """A copy of the channels to compare."""
        if self.common is None:
            return output.detach().clone()
        channels = self.common.after if after else self.common.before
        return output.detach().index_select(self.dim, channels.to(output.device))


def taps_of(todo: Sequence[Step]) -> list[Tap]:
    """Where to compare what these steps make."""
    roles = _roles(todo)
    loose = any(step.entry.site.followed for step in todo)
    # entries of lists that are cut have other names afterwards
    lists: tuple[str, ...] = ()
    for step in todo:
        for listed in step.entry.site.lists:
            lists += (f"{listed.module}.",)
        branch = step.entry.site.branch
        if branch is not None and branch.layer:
            lists += (f"{branch.layer.rpartition('.')[0]}.",)
    taps = [replace(tap, loose=loose) for step in todo for tap in _taps_of_step(step, roles)]
    return [tap for tap in taps if not tap.place.module.startswith(lists)]


def _taps_of_step(step: Step, roles: Mapping[str, TapChannels | None]) -> Iterator[Tap]:
    site = step.entry.site
    tapped: set[str] = set()
    for slot in site.slots:
        if slot.side == "columns" and slot.output:
            tapped.add(slot.module)
            yield Tap(site, Place(slot.module), slot.output, roles.get(slot.module))
    if site.producer is None and site.activation is not None:
        yield Tap(site, site.activation)
        return
    if step.entry.fold_skip and site.residual is not None:
        yield Tap(site, site.residual.place)
        return
    for m in site.consumers:
        if m.name in tapped:
            continue
        if m.name not in roles:
            yield Tap(site, Place(m.name))
            continue
        common = roles[m.name]
        if common is not None:  # else nothing of it is left, and what reads it is compared instead
            yield Tap(site, Place(m.name), 1 if m.kind == "conv2d" else -1, common)


def _roles(todo: Sequence[Step]) -> dict[str, TapChannels | None]:
    """What each step leaves of the outputs of its own producers, by their names; None where nothing is left."""
    roles: dict[str, TapChannels | None] = {}
    rows: dict[str, Tensor] = {}
    for step in todo:
        site = step.entry.site
        for slot in site.slots:
            if slot.side == "rows" and slot.output:
                left = rows.setdefault(slot.module, torch.ones(slot.shape[slot.axis], dtype=torch.bool))
                left[slot.positions(step.entry.dropped)] = False
                kept = left.nonzero().flatten()
                roles[slot.module] = TapChannels(kept, torch.arange(len(kept)))
        for made in (site.producer, site.gate):
            if made is not None:
                roles[made.name] = _of_producer(step)
    return roles


def _of_producer(step: Step) -> TapChannels | None:
    """The kept channels: first in what is left, in a packed producer first in each half."""
    kept, site = step.entry.kept, step.entry.site
    if len(kept) == 0:
        return None
    first = torch.arange(len(kept))
    if not site.bridge.packed:
        return TapChannels(kept, first)
    half = len(kept) + step.form.rank
    return TapChannels(torch.cat([kept, kept + site.width]), torch.cat([first, first + half]))

"""What becomes of the tensors of a followed site, whose channels are cut wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from shallower.errors import PlanError
from shallower.planning.entries import Entry
from shallower.sites import LinearMap, Slot


@dataclass(frozen=True, eq=False)
class TensorCut:
    """A parameter or buffer before and after a followed site has lost channels.

    Attributes:
        tensor: dotted name.
        before, after: its shape.
        kept: for each axis that is cut, the positions that stay, as the tensor is before.
        trained: as in `Slot`.
        macs: multiply-accumulate operations of its maps before and after.
    """

    tensor: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: tuple[tuple[int, Tensor], ...]
    trained: bool
    macs: tuple[int, int]

    @property
    def elements(self) -> tuple[int, int]:
        """Its numbers before and after."""
        return prod(self.before), prod(self.after)


class TensorsLeft:
    """The tensors of a model's followed sites as the entries so far have left them."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._left: dict[tuple[str, int], Tensor] = {}

    def cut(self, entry: Entry, maps: Mapping[str, LinearMap], gone: set[str]) -> tuple[TensorCut, ...]:
        """Cut an entry's dropped channels out of all its tensors.

        Args:
            entry: of a followed site.
            maps: linear maps by name as the other entries have left them.
            gone: names of the maps that are no more.

        Raises:
            PlanError: a tensor has gone.
        """
        slots: dict[str, list[Slot]] = {}
        for slot in entry.site.slots:
            if slot.module in gone:
                raise PlanError(
                    f"{entry.site.name}: `{slot.tensor}` goes with another entry of the plan. Apply that entry first, "
                    "and find the sites again in the result"
                )
            if not slot.holds(entry.site.width):
                raise PlanError(f"{entry.site.name}: its {entry.site.width} channels do not lie in `{slot.tensor}`")
            if self._found.setdefault(slot.tensor, slot.shape) != slot.shape:
                raise PlanError(f"{entry.site.name}: another entry of the plan gives `{slot.tensor}` another shape")
            slots.setdefault(slot.tensor, []).append(slot)
        cuts: list[TensorCut] = []
        for own in slots.values():
            m = maps.get(own[0].module)
            cuts.append(self._cut(entry, own, m))
            cuts += self._added_bias(entry, own, m, slots)
        return (*cuts, *_biases_of(entry), *_entries_of(entry))

    def _cut(self, entry: Entry, slots: list[Slot], m: LinearMap | None) -> TensorCut:
        first = slots[0]
        before = self._shapes.get(first.tensor, first.shape)
        if m is not None and first.tensor not in self._shapes:
            before = _shape_of(m, first)
        after, kept = list(before), []
        for slot in slots:
            left = self._left.get((slot.tensor, slot.axis), torch.ones(slot.shape[slot.axis], dtype=torch.bool))
            staying = left.clone()
            staying[slot.positions(entry.dropped)] = False
            self._left[slot.tensor, slot.axis] = staying
            own = staying[left].nonzero().flatten()
            if len(own) == 0:
                raise PlanError(f"{entry.site.name}: nothing would be left of `{slot.tensor}`; keep a channel")
            kept.append((slot.axis, own))
            after[slot.axis] = len(own)
        self._shapes[first.tensor] = tuple(after)
        macs = first.macs(before), first.macs(tuple(after))
        return TensorCut(first.tensor, before, tuple(after), tuple(kept), first.trained, macs)

    def _added_bias(
        self, entry: Entry, slots: list[Slot], m: LinearMap | None, all_slots: Mapping[str, object]
    ) -> list[TensorCut]:  # fmt: skip
        """A bias that an earlier entry has given to a map whose rows are cut here."""
        rows = [slot for slot in slots if slot.side == "rows" and slot.attribute == "weight"]
        if m is None or not m.bias or not rows or f"{m.name}.bias" in all_slots:
            return []
        row = rows[0]
        bias = Slot(f"{m.name}.bias", (row.shape[row.axis],), 0, row.spans, "rows")
        return [self._cut(entry, [bias], m)]


def _biases_of(entry: Entry) -> list[TensorCut]:
    """Biases that a fit gives to layers which have none."""
    if entry.fit is None:
        return []
    found: list[TensorCut] = []
    for m, bias in zip(entry.site.consumers, entry.fit.biases, strict=True):
        if not m.bias and bool(bias.ne(0).any()):
            found.append(TensorCut(f"{m.name}.bias", (0,), (m.d_out,), (), True, (0, 0)))
    return found


def _shape_of(m: LinearMap, slot: Slot) -> tuple[int, ...]:
    """The shape of a map's weight or bias, as earlier entries have left it."""
    if slot.attribute == "bias":
        return (m.d_out,)
    if slot.attribute != "weight":
        return slot.shape
    if m.kind == "conv1d":
        return (m.d_in, m.d_out)
    return (m.d_out, m.d_in // m.groups, *slot.shape[2:])


def _entries_of(entry: Entry) -> list[TensorCut]:
    """Lists of modules that lose entries, each as one stack of all its parameters."""
    found: list[TensorCut] = []
    for listed in entry.site.lists:
        before, after = (entry.site.width, listed.params), (len(entry.kept), listed.params)
        found.append(TensorCut(listed.module, before, after, (), True, (0, 0)))
    return found

"""In which order sites collapse, and how many at a time: the options and the records of `LayerCollapse.fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from shallower.core.options import Options, option
from shallower.core.text import listing
from shallower.errors import MethodError
from shallower.training.recipe import History

Order = Literal["sensitivity", "last-first"]


@dataclass(frozen=True)
class Stages(Options):
    """How `LayerCollapse.fit` divides the sites into stages.

        method.fit(loader, task_loss, recipe, sh.Stages(3, order="last-first"))

    Attributes:
        groups: number of stages, among which the sites are divided evenly, or the names of the sites of each stage.
            None: one site after another, the paper's n-stage schedule.
        order: which sites come first: "sensitivity", those whose collapse alone raises the loss least; "last-first",
            from the output backwards as in the paper; or names.
        tolerance: slopes with |1 - a| < tolerance are set to 1 at the end of a stage.
        arrive: fraction of each stage after which the slopes of its sites are guaranteed to be 1: they move there
            evenly, and the rest of the stage trains the network that will remain. None leaves it to the penalty, as in
            the paper; needed where channels are to be chosen.
        probe: a few batches to measure the sensitivity on; by default the first 8 of the training batches.

    Raises:
        MethodError: a value is out of its range.
    """

    groups: int | Sequence[Sequence[str]] | None = None
    order: Order | Sequence[str] = "sensitivity"
    tolerance: float = 0.05
    arrive: float | None = option(0.5, above=0, most=1)
    probe: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        check_tolerance(self.tolerance)

    @classmethod
    def of(cls, stages: Stages | int | Sequence[Sequence[str]] | None) -> Stages:
        """A number or names alone, with everything else as it is by default."""
        return stages if isinstance(stages, Stages) else cls(stages)

    def ordered(self, names: Sequence[str], costs: Callable[[], Mapping[str, float]]) -> list[str]:
        """The sites in the order in which they collapse.

        Args:
            names: of all sites, in the network's order.
            costs: measures what the collapse of each costs; called only where the order depends on it.

        Raises:
            MethodError: the order does not fit the sites.
        """
        if self.order == "last-first":
            return list(reversed(names))
        if self.order == "sensitivity":
            if len(names) == 1:
                return list(names)
            return sorted(names, key=costs().__getitem__)
        if isinstance(self.order, str) or sorted(self.order) != sorted(names):
            raise MethodError(
                f"order={self.order!r}: pass 'sensitivity', 'last-first' or every one of these names once: "
                f"{listing(list(names))}"
            )
        return list(self.order)

    def divided(self, ordered: Sequence[str]) -> list[list[str]]:
        """The sites of each stage.

        Raises:
            MethodError: the groups do not fit the sites.
        """
        if self.groups is None:
            return [[name] for name in ordered]
        if isinstance(self.groups, int):
            if not 1 <= self.groups <= len(ordered):
                raise MethodError(f"stages={self.groups}: there are {len(ordered)} sites to divide among the stages")
            bounds = (len(ordered) * i // self.groups for i in range(self.groups + 1))
            return [list(ordered[a:b]) for a, b in pairwise(bounds)]
        named = [name for group in self.groups for name in group]
        if len(set(named)) < len(named) or not set(named) <= set(ordered) or not all(self.groups):
            raise MethodError(
                f"stages={self.groups!r}: name each site at most once; the sites are {listing(list(ordered))}"
            )
        return list(map(list, self.groups))


@dataclass(frozen=True)
class StageResult:
    """One stage of `LayerCollapse.fit`.

        for stage in method.fit(loader, task_loss, recipe):
            print(stage.sites, stage.score)

    Attributes:
        sites: names of the sites that the stage was to collapse.
        collapsed: names of all sites whose slopes are exactly 1 after it.
        slopes: mean slope of every site at its end, before those within the tolerance were set to 1.
        score: of the model at its end; None without `score`.
        taken_back: the score was below the floor, so the model is as it was before the stage.
        history: of the training.
    """

    sites: tuple[str, ...]
    collapsed: tuple[str, ...]
    slopes: Mapping[str, float]
    score: float | None
    taken_back: bool
    history: History


def check_tolerance(tolerance: float) -> None:
    """Refuse a distance from 1 within which a slope cannot sensibly count as 1.

    Raises:
        MethodError: it is not positive, or larger than the slope's whole way.
    """
    # 1 is the way from f to the straight line; a little more takes in slopes that began below 0
    if not 0 < tolerance <= 2:
        raise MethodError(f"tolerance={tolerance!r}: pass a positive distance from 1, usually 0.05")

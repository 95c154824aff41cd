"""What a network saves without some of its branches, in the unit of a target.

savings = Savings(model, branches, Target.parse("latency:1.3x"), inputs)
savings.of(site), savings.needed([site])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from shallower.core.inputs import Inputs
from shallower.core.processes import from_first_process
from shallower.errors import MethodError, TargetError
from shallower.measuring.cost import cost_as_found
from shallower.measuring.measurement import compare
from shallower.methods.depth.emptying import emptied
from shallower.planning.costs import Cost, cost_after
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Site, Sites

_ROUNDS, _SECONDS = 15, 3.0
"""A network is timed in so many rounds, for so long at most."""


class Savings:
    """Counted, or timed: branches that cost the same are timed once.

    Attributes:
        dense: the model as it is.
        sites: of this model.
        target: of a cost.
        inputs: what latencies are measured on, on the model's device.
    """

    def __init__(self, dense: nn.Module, sites: Sites, target: Target, inputs: Inputs) -> None:
        self.dense = dense
        self.sites = sites
        self.target = target
        self.inputs = inputs
        self._alike: dict[tuple[int, int], float] = {}
        self._timed: dict[tuple[str, ...], float] = {}

    @cached_property
    def before(self) -> Cost:
        """Of the model as it is."""
        counted = cost_as_found(self.dense, self.sites)
        if self.target.unit != "latency":
            return counted
        models = {"dense": self.dense}
        seconds = from_first_process(
            lambda: compare(models, self.inputs, rounds=_ROUNDS, seconds=_SECONDS)["dense"].latency
        )
        return replace(counted, latency=seconds)

    @property
    def whole(self) -> float:
        """What the target counts, of the model as it is."""
        return self.target.amount_of(self.before)

    def left(self, dropped: Sequence[Site]) -> float:
        """The same without these branches."""
        if not dropped:
            return self.whole
        if self.target.unit == "latency":
            names = tuple(sorted(site.name for site in dropped))
            if names not in self._timed:
                self._timed[names] = self.whole * self._part_left(dropped)
            return self._timed[names]
        plan = Plan(tuple(map(Entry.drop, dropped)))
        return self.target.amount_of(cost_after(plan, self.before, self.dense))

    def needed(self, dropped: Sequence[Site]) -> float:
        """What still has to go, 0 or less where the target is met."""
        return self.left(dropped) - self.target.limit(self.before)

    def of(self, site: Site) -> float:
        """What goes with one branch."""
        branch = site.branch
        assert branch is not None
        if self.target.unit != "latency":
            return self.whole - self.left([site])
        alike = (branch.params, branch.macs)
        if alike not in self._alike:
            self._alike[alike] = self.whole - self.left([site])
        return self._alike[alike]

    def _part_left(self, dropped: Sequence[Site]) -> float:
        models = {"dense": self.dense, "small": emptied(self.dense, dropped)}
        return from_first_process(lambda: compare(models, self.inputs, rounds=_ROUNDS, seconds=_SECONDS)["small"].ratio)


@dataclass(frozen=True)
class Layers:
    """So many whole layers go, whatever they cost: what `Savings` is for a target."""

    count: int

    @property
    def whole(self) -> float:
        """As many as shall go."""
        return float(self.count)

    def left(self, dropped: Sequence[Site]) -> float:
        """How many are still to go."""
        return self.whole - len(dropped)

    def needed(self, dropped: Sequence[Site]) -> float:
        """The same."""
        return self.left(dropped)

    def of(self, site: Site) -> float:
        """1 for a layer."""
        assert site.branch is not None
        return float(bool(site.branch.layer))


def savings_for(dense: nn.Module, sites: Sites, goal: Target | int, inputs: Inputs) -> Savings | Layers:
    """What counts towards a target, or towards so many layers.

        savings_for(model, sites, 2, inputs)

    Raises:
        TargetError: nothing has to go for it.
    """
    found: Savings | Layers
    if isinstance(goal, int):
        found = Layers(goal)
    elif goal.unit == "drop":
        found = Savings(dense, sites, Target("params", "share", 0.0), inputs)
    else:
        found = Savings(dense, sites, goal, inputs)
    if found.needed(()) <= 0:
        raise TargetError(f"the target {goal} is met by the model as it is")
    return found


def goal_of(target: str | Target | int) -> Target | int:
    """A target read from text, or how many layers go.

        goal_of("macs:80%"), goal_of(2)

    Raises:
        MethodError: the count of layers is not positive.
    """
    if isinstance(target, int):
        if target < 1:
            raise MethodError(f"target={target}: at least one layer goes")
        return target
    return Target.parse(target)

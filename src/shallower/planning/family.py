"""Every size of a model from one squeezing: plans from large to small, and any size in between.

family = sh.squeeze_family(model, sites, batches, smallest="macs:30%")
family.save("family/")
small = sh.apply(model, sh.Family.load("family/").plan(model, "macs:47%"), example_inputs)

family.json     what the members cost and how far their outputs are from the model's
00/, 01/, ..    their plans
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import nn

from shallower.core.codec import Bounds, decode, encode
from shallower.core.files import read_json, replacing, write_json
from shallower.core.text import amount, table
from shallower.errors import PlanError, TargetError
from shallower.planning.costs import Cost, cost_after
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.planning.targets import Target

_SCHEMA = "shallower.family"
_VERSION = 1
_MOST = 100


@dataclass(frozen=True, eq=False)
class Member:
    """One size.

    Attributes:
        plan: for the whole model.
        cost: of the model with it.
        divergence: mean over some of the calibration rows of how far the model's output is from what it was: the
            Kullback-Leibler divergence of logits, the squared difference of anything else.
    """

    plan: Plan
    cost: Cost
    divergence: float


@dataclass(frozen=True, eq=False)
class Family:
    """Plans of one model, from large to small.

        family.plan(model, "params:60%")
        print(family)

    Attributes:
        members: from large to small.
        before: what the model costs as it is.
        order: names of the sites in the order in which the network runs them.
    """

    members: tuple[Member, ...]
    before: Cost
    order: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def plan(self, model: nn.Module, target: str | Target) -> Plan:
        """The largest size that meets a target; no data are needed.

            family.plan(model, "macs:47%")

        Between two members the first sites are those of the smaller and the rest those of the larger one, as many as
        the target allows.

        Args:
            model: for which the family was made.
            target: of params, MACs, size or KV cache.

        Raises:
            TargetError: the smallest member does not meet it, or it is of a latency or a score.
        """
        target = Target.parse(target)
        if target.unit in ("latency", "drop"):
            raise TargetError(
                f"the target {target} has to be measured: a family is chosen from by params, macs or size"
            )
        before = self.before
        smaller = next((i for i, member in enumerate(self.members) if target.met(before, member.cost)), None)
        if smaller is None:
            least = min(target.amount_of(member.cost) for member in self.members) / target.amount_of(before)
            raise TargetError(
                f"the target {target} asks for {target.limit(before) / target.amount_of(before):.1%} of the model's "
                f"{target.unit}; the smallest of the {len(self)} members has {least:.1%}. Squeeze to a smaller one"
            )
        chosen = self.members[smaller].plan
        larger: tuple[Entry, ...] = ()
        if smaller:
            larger = self.members[smaller - 1].plan.entries
        for first in range(len(self.order)):
            mixed = self._mixed(chosen, larger, set(self.order[:first]))
            if target.met(before, cost_after(mixed, before, model)):
                return mixed
        return chosen

    def _mixed(self, smaller: Plan, larger: tuple[Entry, ...], first: set[str]) -> Plan:
        """These sites as in the smaller plan, the others as in the larger one."""
        by_name = {entry.site.name: entry for entry in larger if entry.site.name not in first}
        by_name |= {entry.site.name: entry for entry in smaller.entries if entry.site.name in first}
        entries = [by_name[name] for name in self.order if name in by_name]
        return Plan(tuple(entries), smaller.fingerprint, smaller.method, smaller.left_out, smaller.seen, smaller.passes)

    def __str__(self) -> str:
        """A table: what each member costs, and the divergence of its output."""
        rows = [("1", amount(self.before.params), amount(self.before.macs), "")]
        for member in self.members:
            share = f"{member.cost.params / self.before.params:.2f}"
            rows.append((share, amount(member.cost.params), amount(member.cost.macs), f"{member.divergence:.3g}"))
        return table(("part", "params", "MACs", "divergence"), rows)

    __repr__ = __str__

    def save(self, directory: str | Path) -> None:
        """Write family.json and a plan for each member into `directory`, which appears whole or not at all.

        Raises:
            PlanError: it cannot be written.
        """
        stored = []
        with replacing(Path(directory), error=PlanError) as unfinished:
            for number, member in enumerate(self.members):
                member.plan.save(unfinished / f"{number:02}")
                stored.append(_Stored(member.cost, member.divergence))
            data = encode(_File(_SCHEMA, _VERSION, self.before, self.order, tuple(stored)))
            write_json(unfinished / "family.json", data, error=PlanError)

    @classmethod
    def load(cls, directory: str | Path) -> Family:
        """Read what `save` wrote.

        Raises:
            PlanError: there is no family, or it is damaged or of another version.
        """
        folder = Path(directory)
        if not (folder / "family.json").exists():
            raise PlanError(f"{folder} holds no family of plans: family.json is missing")
        data = read_json(folder / "family.json", error=PlanError)
        stored = decode(_File, data, at="family", error=PlanError)
        if (stored.schema, stored.version) != (_SCHEMA, _VERSION):
            raise PlanError(f"{folder}: no family of plans, or of another version than {_VERSION}")
        members = []
        for number, each in enumerate(stored.members):
            members.append(Member(Plan.load(folder / f"{number:02}"), each.cost, each.divergence))
        return cls(tuple(members), stored.before, stored.order)


@dataclass(frozen=True)
class _Stored:
    cost: Cost
    divergence: float


@dataclass(frozen=True)
class _File:
    """The whole of family.json."""

    schema: str
    version: int
    before: Cost
    order: Annotated[tuple[Annotated[str, Bounds(1, 1000)], ...], Bounds(0, 20_000)]
    members: Annotated[tuple[_Stored, ...], Bounds(0, _MOST)]

"""What is to happen to each hidden channel, as plain data.

A method decides and returns a `Plan`; surgery applies it. A plan is self-contained: it names modules, holds
fates and, where they were computed, fitted maps. Saved as plan.json and plan.safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shallower.core.text import amount
from shallower.errors import PlanError
from shallower.planning.entries import Entry
from shallower.planning.forms import Step, steps
from shallower.sites import Site

"""Letters that an entry's note may have."""


class CostWarning(UserWarning):
    """What was asked for is exact, but not cheaper than what was there."""


@dataclass(frozen=True, eq=False)
class Plan:
    """An ordered list of entries, each relative to the model after the earlier ones.

        plan = sh.Plan.collapse(sites)
        print(plan)
        plan.save("plan/")
        small = sh.apply(model, sh.Plan.load("plan/"), example_inputs)

    Overlapping sites (the consumer of one is the producer of the next) are always applied in the order in which the
    network runs them. Only a fitted linear path notices: it reads what the earlier site leaves.

    Attributes:
        entries: at most one per site.
        fingerprint: of the weights the plan was made for (`fingerprint` in fingerprints.py); "" where it depends on no
            weights (a plain collapse).
        method: which method made it, for people.

    Raises:
        PlanError: entries contradict one another.
    """

    entries: tuple[Entry, ...]
    fingerprint: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        names = [entry.site.name for entry in self.entries]
        for name in names:
            if names.count(name) > 1:
                raise PlanError(f"{name}: the plan has two entries for this site")
        steps(self.entries)

    @classmethod
    def collapse(cls, sites: Iterable[Site], names: Iterable[str] | None = None) -> Plan:
        """Every channel of these sites linear with slope 1: the plain collapse to one linear map for each consumer.

        Args:
            sites: what to collapse.
            names: only the sites of these names.

        Raises:
            PlanError: a site cannot be linear, or there is no site of that name.

        Warns:
            CostWarning: a site does not become cheaper, or loses its activation and no layer becomes cheaper.
        """
        from shallower.planning.paying import paying

        chosen = list(sites)
        if names is not None:
            wanted = [names] if isinstance(names, str) else list(names)
            known = {site.name for site in chosen}
            for name in wanted:
                if name not in known:
                    raise PlanError(f"there is no site {name!r} to collapse")
            chosen = [site for site in chosen if site.name in wanted]
        plan = cls(tuple(Entry.collapse(site) for site in chosen), method="collapse")
        plan.warn_of_cost()
        apart = {step.entry.site.name for step in steps(plan.entries) if step.form.kind == "apart"}
        idle = [name for name in paying(chosen)[1] if name in apart]
        if idle:
            shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
            warnings.warn(
                f"{shown}: the activation goes and the layers stay as they are, so that nothing is saved but the "
                "operation. Leave such sites out, or move the padding first where that is what keeps layers apart",
                CostWarning,
                stacklevel=2,
            )
        return plan

    def __len__(self) -> int:
        return len(self.entries)

    def warn_of_cost(self) -> None:
        """Warn of every site that takes neither fewer parameters nor fewer MACs than it has.

        Sites that overlap are judged together, since a later one may make cheaper what an earlier one made dearer.
        There is no warning where the entry says what the site is to become, or why.
        """
        for group in _connected(steps(self.entries)):
            forms = [step.form for step in group]
            params, macs = sum(f.params for f in forms), sum(f.macs for f in forms)
            before = sum(f.params_before for f in forms), sum(f.macs_before for f in forms)
            decided = all(step.entry.becomes or step.entry.note for step in group)
            cheaper = params < before[0] or macs < before[1] or all(f.cheaper for f in forms)
            if decided or cheaper or all(f.kind == "narrower" for f in forms):
                continue
            names = ", ".join(step.entry.site.name for step in group)
            now, then = (f"{amount(a)} parameters and {amount(b)} MACs" for a, b in ((params, macs), before))
            warnings.warn(
                f"{names}: as planned it has {now}, and it had {then}. It is exact, but no "
                "cheaper: only sites that widen pay",
                CostWarning,
                stacklevel=3,
            )

    @property
    def params_saved(self) -> int:
        """How many parameters fewer the model has with all entries applied."""
        return sum(step.form.params_before - step.form.params for step in steps(self.entries))

    @property
    def macs_saved(self) -> int:
        """How many MACs fewer the model needs on the example inputs with all entries applied."""
        return sum(step.form.macs_before - step.form.macs for step in steps(self.entries))

    def __str__(self) -> str:
        """A table: site, fates, the form it takes, params and MACs before and after."""
        noted = any(entry.note for entry in self.entries)
        header = ("site", "keep", "linear", "drop", "becomes", "params", "after", "MACs", "after", "why" * noted)
        rows = []
        for step in steps(self.entries):
            entry, form = step.entry, step.form
            counts = [str(len(i)) if len(i) else "" for i in (entry.kept, entry.linear, entry.dropped)]
            costs = [form.params_before, form.params, form.macs_before, form.macs]
            path = (
                f" + path of {form.rank}" if form.kind == "partial" else f" of rank {form.rank}" * (form.kind == "pair")
            ) + ", skip inside" * entry.fold_skip
            rows.append((entry.site.name, *counts, f"{form.kind}{path}", *[amount(cost) for cost in costs], entry.note))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(
                c.ljust(w) if i in (0, 4, 9) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        made_by = f" by {self.method}" if self.method else ""
        saved = f"{_signed(-self.params_saved)} params, {_signed(-self.macs_saved)} MACs"
        return "\n".join([f"plan{made_by} for {len(self)} sites: {saved}", *(lines if rows else [])])

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; tensors are named by their shape and hash (docs/format.md)."""
        from shallower.planning.plan_file import plan_to_json

        return plan_to_json(self)[0]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan that `to_json` described.

        Args:
            data: the description.
            tensors: the tensors that it names.

        Raises:
            PlanError: it is not the description of a plan, or a tensor is missing or another one.
        """
        from shallower.planning.plan_file import plan_from_json

        return plan_from_json(data, tensors or {})

    def save(self, directory: str | Path) -> None:
        """Write plan.json and plan.safetensors into `directory`, which is made if there is none.

        Raises:
            PlanError: it cannot be written.
        """
        from shallower.planning.plan_file import save_plan

        save_plan(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanError: there is no plan, or it is damaged, of an unknown version or not a plan at all.
        """
        from shallower.planning.plan_file import load_plan

        return load_plan(Path(directory))


def _connected(done: Iterable[Step]) -> list[list[Step]]:
    """The steps in groups that share no layer."""
    groups: list[list[Step]] = []
    for step in done:
        names = {m.name for m in step.entry.site.maps}
        touching = [g for g in groups if any(names & {m.name for m in s.entry.site.maps} for s in g)]
        groups = [g for g in groups if g not in touching] + [[s for g in touching for s in g] + [step]]
    return groups


def _signed(count: int) -> str:
    return f"{'-' if count < 0 else '+'}{amount(abs(count))}"

"""What is to happen to each hidden channel, as plain data.

A method decides and returns a `Plan`; surgery applies it. A plan is self-contained: it names modules, holds
fates and, where they were computed, fitted maps. Saved as plan.json and plan.safetensors.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from shallower.core.text import amount, listing, table
from shallower.errors import PlanError
from shallower.planning import plan_file
from shallower.planning.entries import Entry
from shallower.planning.forms import Step, steps, totals
from shallower.planning.paying import paying
from shallower.sites import Site, Sites, overlapping


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
        fingerprint: of the weights the plan was made for (`modules.site_parts.fingerprint`); "" where it depends on no
            weights (a plain collapse).
        method: which method made it, for people.
        left_out: name -> reason of the sites that were given and stay as they are, for people.
        seen: digests of the rows that it was calibrated on, so that nothing is certified on them.
        passes: how often a network ran over these rows in this call for it, a gradient counted as three times; of a
            family what all of it took. Not saved: 0 where it is not known.

    Raises:
        PlanError: entries contradict one another.
    """

    entries: tuple[Entry, ...]
    fingerprint: str = ""
    method: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    seen: tuple[str, ...] = ()
    passes: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.entries, Entry) or not isinstance(self.entries, Iterable):
            raise PlanError(f"a plan is of a row of entries, not of a {type(self.entries).__name__}: Plan((entry,))")
        object.__setattr__(self, "entries", tuple(self.entries))
        for entry in self.entries:
            if not isinstance(entry, Entry):
                raise PlanError(f"a plan is of entries, not of a {type(entry).__name__}: Entry.narrow(site, kept)")
        for name, count in Counter(self.sites.names).items():
            if count > 1:
                raise PlanError(f"{name}: the plan has {count} entries for this site")
        self.steps  # noqa: B018 - raises where entries contradict one another

    @property
    def sites(self) -> Sites:
        """The sites of the entries, as they were found."""
        return Sites(tuple(entry.site for entry in self.entries))

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The entries in the order in which the network runs them, each with the form that its site takes."""
        return tuple(steps(self.entries))

    @classmethod
    def collapse(cls, sites: Iterable[Site], names: Iterable[str] | None = None) -> Plan:
        """Every channel that may be linear with slope 1: the plain collapse to one linear map for each consumer.

            plan = sh.Plan.collapse(sites)
            plan.left_out                   # the sites that cannot be linear, and why

        Args:
            sites: what to collapse, where it may become linear.
            names: only the sites of these names, all of which must be able to become linear.

        Raises:
            PlanError: no site may become linear, or one of those named may not, or there is no site of that name.

        Warns:
            CostWarning: a site does not become cheaper, or loses its activation and no layer becomes cheaper.
        """
        chosen = Sites(tuple(sites))
        if names is not None:
            if isinstance(names, str):
                names = [names]
            wanted = set(names)
            if unknown := sorted(wanted.difference(chosen.names)):
                raise PlanError(f"there is no site {unknown[0]!r} to collapse")
            chosen = chosen.select(lambda site: site.name in wanted)
        elif chosen:
            chosen = chosen.usable(lambda site: site.bridge.not_linear, "no site may become linear", PlanError)
        plan = cls(tuple(map(Entry.collapse, chosen)), method="collapse", left_out=chosen.skipped)
        plan.warn_of_cost()
        plan._warn_of_idle()
        return plan

    def _warn_of_idle(self) -> None:
        """Warn of sites that lose their activation while no layer becomes cheaper."""
        apart = {step.entry.site.name for step in self.steps if step.form.kind == "apart"}
        if not apart:
            return
        _, reasons = paying(self.sites)
        if idle := [name for name in reasons if name in apart]:
            warnings.warn(
                f"{listing(idle, 5)}: the activation goes and the layers stay as they are, so that nothing is saved "
                "but the operation. Leave such sites out, or move the padding first where that is what keeps layers "
                "apart",
                CostWarning,
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.entries)

    def warn_of_cost(self) -> None:
        """Warn of every site that takes neither fewer parameters nor fewer MACs than it has.

        Sites that overlap are judged together, since a later one may make cheaper what an earlier one made more
        expensive. There is no warning where the entry says what the site is to become, or why, or was fitted.
        """
        by_site = {step.entry.site.name: step for step in self.steps}
        for group in overlapping(step.entry.site for step in self.steps):
            names = Sites(tuple(group)).names
            done = list(map(by_site.__getitem__, names))
            forms = [step.form for step in done]
            (params_before, macs_before), (params, macs) = totals(forms)
            decided = all(map(_is_decided, done))
            cheaper = params < params_before or macs < macs_before or all(f.cheaper for f in forms)
            if decided or cheaper or all(f.kind in ("narrower", "cut") for f in forms):
                continue
            warnings.warn(
                f"{listing(names)}: the plan leaves {amount(params)} parameters and "
                f"{amount(macs)} MACs, before it was {amount(params_before)} and {amount(macs_before)}: exact, but not "
                "smaller. Collapsing pays only where the hidden width is larger than what goes in and out",
                CostWarning,
                stacklevel=3,
            )

    @property
    def params_saved(self) -> int:
        """How many parameters fewer the model has with all entries applied."""
        return self._saved[0]

    @property
    def macs_saved(self) -> int:
        """How many MACs fewer the model needs on the example inputs with all entries applied."""
        return self._saved[1]

    @cached_property
    def _saved(self) -> tuple[int, int]:
        """Parameters and MACs that go."""
        (params_before, macs_before), (params, macs) = totals(step.form for step in self.steps)
        return params_before - params, macs_before - macs

    def __str__(self) -> str:
        """A table: site, fates, the form it takes, params and MACs before and after; then what was left out."""
        title = "plan"
        if self.method:
            title += f" by {self.method}"
        saved = f"{_signed(-self.params_saved)} params, {_signed(-self.macs_saved)} MACs"
        lines = [f"{title} for {len(self)} sites: {saved}"]
        if self.entries:
            lines.append(_steps_table(self.steps))
        if self.passes:
            lines.append(f"calibrated in {self.passes:g} forward passes over the data")
        if self.left_out:
            lines.append("left as they are:")
            lines += [f"  {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; tensors are named by their shape and hash (docs/format.md)."""
        return plan_file.to_json(self._contents)[0]

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Plan:
        """The plan that `to_json` described.

        Args:
            data: the description.
            tensors: the tensors that it names.

        Raises:
            PlanError: it is not the description of a plan, or a tensor is missing or another one.
        """
        return cls._of(plan_file.from_json(data, tensors or {}))

    def save(self, directory: str | Path) -> None:
        """Write plan.json and plan.safetensors into `directory`, which is made if there is none.

        Raises:
            PlanError: it cannot be written.
        """
        plan_file.save_contents(self._contents, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanError: there is no plan, or it is damaged, of an unknown version or not a plan at all.
        """
        return cls._of(plan_file.load_contents(Path(directory)))

    @property
    def _contents(self) -> plan_file.Contents:
        saves = plan_file.Saves(self.params_saved, self.macs_saved)
        return plan_file.Contents(self.entries, self.fingerprint, self.method, dict(self.left_out), saves, self.seen)

    @classmethod
    def _of(cls, contents: plan_file.Contents) -> Plan:
        plan = cls(contents.entries, contents.fingerprint, contents.method, contents.left_out, contents.seen)
        if contents.saves != plan_file.Saves(plan.params_saved, plan.macs_saved):
            raise PlanError(
                f"the plan says that it saves {contents.saves.params} params and {contents.saves.macs} MACs, and its "
                f"entries save {plan.params_saved} and {plan.macs_saved}; the file was changed"
            )
        return plan


def _is_decided(step: Step) -> bool:
    """Whether the entry says what the site is to become, or why."""
    entry = step.entry
    return bool(entry.becomes or entry.note or entry.error is not None)


def _steps_table(steps: Sequence[Step]) -> str:
    """A row for each step; the held-out error and the reason where there are any."""
    header = ["site", "keep", "linear", "drop", "becomes", "params", "after", "MACs", "after"]
    right = [1, 2, 3, 5, 6, 7, 8]
    rows = [list(_step_row(step)) for step in steps]
    if any(step.entry.error is not None for step in steps):
        right.append(len(header))
        header.append("error")
        for step, row in zip(steps, rows, strict=True):
            row.append(_percentage(step.entry.error))
    if any(step.entry.note for step in steps):
        header.append("why")
        for step, row in zip(steps, rows, strict=True):
            row.append(step.entry.note)
    return table(header, rows, right)


def _step_row(step: Step) -> tuple[str, ...]:
    """A step's row of the table."""
    entry, form = step.entry, step.form
    fates = map(_count, (entry.kept, entry.linear, entry.dropped))
    costs = map(amount, (form.params_before, form.params, form.macs_before, form.macs))
    becomes = form.kind + {"partial": f" + path of {form.rank}", "pair": f" of rank {form.rank}"}.get(form.kind, "")
    if entry.fold_skip:
        becomes += ", skip inside"
    return (entry.site.name, *fates, becomes, *costs)


def _count(channels: Tensor) -> str:
    return str(len(channels) or "")


def _percentage(part: float | None) -> str:
    if part is None:
        return ""
    return f"{part:.2%}"


def _signed(count: int) -> str:
    if count < 0:
        return f"-{amount(-count)}"
    return f"+{amount(count)}"

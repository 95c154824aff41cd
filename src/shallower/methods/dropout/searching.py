"""Choices of widths for all sites at once: equal shares, and a search for better ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shallower.errors import TargetError
from shallower.methods.dropout.widths import Table, at_most, full, named_widths, smallest
from shallower.planning.allocation import Choice, allocate
from shallower.planning.costs import Cost
from shallower.planning.targets import Target

WidthChoice = dict[str, int]


@dataclass(frozen=True)
class WidthSearch:
    """A search along a table of widths for choices that cost little and lose little.

        search = WidthSearch(table, cost=lambda widths: method.cost(widths).params)
        known = search.losses(search.alone(3), scored)
        for widths in search.between(known, points=8):
            method.set_width(widths)

    Attributes:
        table: by the name of the site, its widths.
        cost: of a choice of widths, in the unit that is divided among the sites.
    """

    table: Table
    cost: Callable[[Mapping[str, int]], float]

    def alone(self, levels: int) -> list[tuple[str, int]]:
        """Every site narrowed alone, to `levels` widths spread over its table; none where there is one site only."""
        if levels == 0 or len(self.table) < 2:
            return []
        tries: list[tuple[str, int]] = []
        for name, widths in self.table.items():
            below = widths[:-1]
            if not below:
                continue
            gap = (len(below) - 1) / max(1, levels - 1)
            picked = {below[round(i * gap)] for i in range(levels)}
            tries.extend((name, k) for k in sorted(picked))
        return tries

    def losses(
        self, tries: Sequence[tuple[str, int]], scored: Callable[[Mapping[str, int]], float]
    ) -> dict[str, dict[int, float]]:
        """By site and width, how much lower the score is with that site alone narrowed.

        Args:
            tries: what `alone` returned.
            scored: the score at a choice of widths, higher is better.
        """
        at_full = full(self.table)
        best = scored(at_full)
        known = {name: {widths[-1]: 0.0} for name, widths in self.table.items()}
        for name, k in tries:
            known[name][k] = best - scored(at_full | {name: k})
        return known

    def between(self, known: Mapping[str, Mapping[int, float]], points: int) -> Iterator[WidthChoice]:
        """Choices between the smallest and the full cost, each that of least summed loss for its cost.

        Losses are taken to add up over the sites, and to lie on straight lines between the widths that were tried.

        Args:
            known: what `losses` returned.
            points: cost levels, the two ends included, which are not returned.
        """
        at_full = full(self.table)
        menus: dict[str, list[Choice]] = {}
        for name, widths in self.table.items():
            loss = interpolated(widths, known[name])
            menus[name] = [Choice(k, self.cost(at_full | {name: k}), loss[k]) for k in widths]
        low, high = self.cost(smallest(self.table)), self.cost(at_full)
        for i in range(1, points - 1):
            limit = high + (low - high) * i / (points - 1)
            chosen = allocate(menus, self._within(limit))
            yield {name: chosen[name].width for name in self.table}

    def _within(self, limit: float) -> Callable[[Mapping[str, Choice]], bool]:
        def met(choices: Mapping[str, Choice]) -> bool:
            return self.cost({name: choice.width for name, choice in choices.items()}) <= limit

        return met


def equal_shares(table: Table, points: int) -> Iterator[tuple[str, WidthChoice]]:
    """Choices with about the same share of channels at every site, from all down to the smallest, each with a label."""
    whole = sum(full(table).values())
    for i in range(points):
        share = 1 - i / (points - 1)
        widths = {}
        for name, own in table.items():
            widths[name] = own[round((len(own) - 1) * share)]
        label = "full"
        if i > 0:
            label = f"{sum(widths.values()) / whole:.0%}"
        yield label, widths


def largest_shares(table: Table, target: Target, cost: Callable[[Mapping[str, int]], Cost]) -> WidthChoice:
    """The widths that meet a target of cost with the largest share of their channels, the same at every site.

    Sites that take nothing from what the target counts keep all of theirs: feed-forward channels, of a KV cache.

    Args:
        table: of the widths that there are.
        target: of a cost.
        cost: of a choice of widths.

    Raises:
        TargetError: the smallest widths do not meet it; the error says what they leave.
    """
    whole, least = full(table), smallest(table)
    before = cost(whole)
    start = target.amount_of(before)
    counted: dict[str, tuple[int, ...]] = {}
    shares = {1.0}
    for name, widths in table.items():
        if target.amount_of(cost(whole | {name: least[name]})) < start:
            counted[name] = widths
            shares.update(k / widths[-1] for k in widths)
    for share in sorted(shares, reverse=True):
        chosen = {name: at_most(widths, share * widths[-1]) for name, widths in counted.items()}
        if target.met(before, cost(whole | chosen)):
            return whole | chosen
    if target.unit == "kv" and not counted:
        raise TargetError(
            f"the target {target} counts the KV cache, and none of the {len(table)} sites takes anything from it: only "
            'attention heads do. Find the sites with kinds=("hidden", "heads")'
        )
    raise TargetError(
        f"the target {target} asks for {target.limit(before) / start:.1%} of the model's {target.unit}; with the "
        f"smallest widths ({named_widths(least)}) {target.amount_of(cost(least)) / start:.1%} would remain. Ask for "
        "less, or train with a smaller lower_bound or at more sites"
    )


def interpolated(widths: Sequence[int], known: Mapping[int, float]) -> dict[int, float]:
    """The loss at every width, between those that were tried along straight lines, never negative."""
    tried = sorted(known)
    losses = {}
    for k in widths:
        right = next((x for x in tried if x >= k), tried[-1])
        left = max((x for x in tried if x <= k), default=right)
        part = 0.0
        if right > left:
            part = (k - left) / (right - left)
        losses[k] = max(0.0, known[left] * (1 - part) + known[right] * part)
    return losses

"""Which widths meet a target: allocated by the sites' curves of error, the same share everywhere, or by bisection.

What is allocated is not compared with equal widths by a network whose consumers alone are refitted: on the small Llama
that ranks equal widths first (divergence 1.331 against 1.372), and with producers refitted they are 5 % worse in
perplexity. A late site can make up for what earlier ones left, and the more so the more of it is refitted.

search = Search(sweep, counts, times, round_to=8)
plan = search.plan(Target.parse("macs:60%"), score=None)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from shallower.core.processes import agreed_result, from_first_process
from shallower.errors import MethodError, TargetError
from shallower.methods.squeezing.costing import SiteWidths, Times, WidthCosts
from shallower.methods.squeezing.sweeping import Sweep
from shallower.planning.allocation import Choice, allocate, in_proportion
from shallower.planning.costs import Cost
from shallower.planning.family import Member
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Site, Sites
from shallower.training.loop import Score

_TARGET_TRIALS = 6
"""Steps of the bisection for a score."""

_TIMINGS = 4
"""How often the whole model is timed, and the widths corrected, until a latency is met."""

_CLOSE = 0.97
"""A latency target is met well enough at this part of what it allows."""


@dataclass(frozen=True)
class Search:
    """Finds widths for a target, and squeezes to them.

    Attributes:
        sweep: squeezes to given widths.
        counts: what widths cost.
        times: how long the model takes with them.
        round_to: widths are multiples of this.
        uniform: keep the same share of every site's channels.
    """

    sweep: Sweep
    counts: WidthCosts
    times: Times
    round_to: int
    uniform: bool = False

    @property
    def sites(self) -> Sites:
        """That may be squeezed."""
        return self.counts.sites

    def plan(self, target: Target, score: Score | None) -> Plan:
        """The best plan found that meets the target.

        Raises:
            TargetError: none does, or nothing has to be done for it.
            MethodError: a `drop:` target comes without a score.
        """
        if target.unit == "kv" and not any(site.cached_each for site in self.sites):
            self._refuse_kv(target)
        if target.unit != "drop":
            return self.sweep.plan(self.widths(target))[0]
        if score is None:
            raise MethodError(f"the target {target} needs score=, a function from a model to its quality")
        return self._within(target, score)

    def members(self, smallest: Target, count: int) -> Iterator[Member]:
        """Plans for so many targets, evenly between the whole model and the smallest one.

        Raises:
            TargetError: the smallest cannot be reached.
        """
        if smallest.unit == "kv" and not any(site.cached_each for site in self.sites):
            self._refuse_kv(smallest)
        before = self.counts.before
        gone = 1 - smallest.limit(before) / smallest.amount_of(before)
        # the smallest first: if it cannot be reached that is said at once
        for number in range(count, 0, -1):
            widths = self.widths(Target(smallest.unit, "share", 1 - gone * number / count))
            plan, small = self.sweep.plan(widths)
            yield Member(plan, self.counts.after(widths), self.sweep.divergence(small))

    def _refuse_kv(self, target: Target) -> NoReturn:
        """Say that no widths lead to a target of the KV cache."""
        kept = target.amount_of(self.counts.before)
        raise TargetError(
            f"the target {target} counts the KV cache ({kept:g} bytes for each token), and none of the "
            f"{len(self.sites)} sites takes anything from it: only attention heads do. Find the sites with "
            'kinds=("hidden", "heads")'
        )

    def _within(self, target: Target, score: Score) -> Plan:
        """The smallest plan found by bisection whose score is not below the floor of a `drop:` target.

        Raises:
            TargetError: none was found.
        """
        floor = target.floor(agreed_result(score, self.sweep.dense))
        low, high = 0.0, 1.0
        best: Plan | None = None
        tried = "no narrower model was found"
        for _ in range(_TARGET_TRIALS):
            share = (low + high) / 2
            try:
                plan, small = self.sweep.plan(self.widths(Target("params", "share", share)))
            except TargetError:
                low = share
                continue
            reached = agreed_result(score, small)
            if reached >= floor:
                best, high = plan, share
            else:
                low, tried = share, f"with {share:.1%} of the parameters it is {reached:.4g}"
        if best is None:
            raise TargetError(
                f"the target {target} allows a score of {floor:.4g}, and {tried}. Allow more loss, or calibrate on "
                "more data"
            )
        return best

    def widths(self, target: Target) -> dict[str, int]:
        """How many channels each site keeps; 0 for a full collapse.

        Raises:
            TargetError: no widths meet the target, or nothing has to be done for it.
        """
        if target.unit != "latency":
            return self._allocated(target)
        if not self.uniform:
            _ = self.sweep.errors  # a pass over the data, in which all processes take part; the timing is one's
        return from_first_process(lambda: self._timed(target))

    def _timed(self, target: Target) -> dict[str, int]:
        """Widths with which the whole model, measured, meets a target of latency."""
        times = self.times
        limit = target.limit(self._before(target))
        best: tuple[float, dict[str, int]] | None = None
        fastest = times.before
        for timing in range(_TIMINGS):
            try:
                found = self._allocated(target)
            except TargetError:
                if timing == 0:
                    raise
                break
            seconds = times.measured(found)
            fastest = min(fastest, seconds)
            if seconds <= limit and (best is None or seconds > best[0]):
                best = (seconds, found)
            if _CLOSE * limit <= seconds <= limit:
                break
            times.learn(found, seconds)
        if best is None:
            raise TargetError(
                f"the target {target} asks for {limit * 1e3:.3g} ms, and the model takes {times.before * 1e3:.3g} ms; "
                f"of the plans that were timed the fastest takes {fastest * 1e3:.3g} ms. Ask for less, or allow more "
                "sites"
            )
        return best[1]

    def _allocated(self, target: Target) -> dict[str, int]:
        """The same as `widths`, by counted cost or by the latencies of single sites."""
        before = self._before(target)
        widths = {site.name: site.width for site in self.sites}

        def met(chosen: SiteWidths) -> bool:
            return target.met(before, self._after(target, chosen))

        try:
            if self.uniform:
                found = self._in_proportion(target, widths, met)
            else:
                chosen = allocate(self._menus(target), lambda choices: met(_widths_of(choices)))
                found = _widths_of(chosen)
        except TargetError as error:
            smallest = {site.name: min(site.width, self._multiple(site)) for site in self.sites}
            least = target.amount_of(self._after(target, smallest)) / target.amount_of(before)
            raise TargetError(
                f"the target {target} asks for {target.limit(before) / target.amount_of(before):.1%} of the model's "
                f"{target.unit}; with the least width at each of the {len(widths)} sites, {least:.1%} would remain. "
                "Ask for less, or allow more sites"
            ) from error
        if target.amount_of(self._after(target, found)) >= target.amount_of(before):
            raise TargetError(
                f"the target {target} is met by the model as it is ({target.amount_of(before):.4g} {target.unit}): "
                "no plan is cheaper in what was asked for"
            )
        return found

    def _in_proportion(
        self, target: Target, widths: SiteWidths, met: Callable[[SiteWidths], bool]
    ) -> dict[str, int]:  # fmt: skip
        """The same share of the width of every site of which the target counts anything."""
        free: dict[str, int] = {}
        for site in self.sites:
            counts = target.unit != "kv" or site.cached_each > 0
            if counts:
                free[site.name] = site.width
        multiples = {site.name: self._multiple(site) for site in self.sites}
        return {**widths, **in_proportion(free, lambda chosen: met({**widths, **chosen}), multiples)}

    def _multiple(self, site: Site) -> int:
        """Of what the site's widths are multiples: heads are few, and each is many channels already."""
        if site.kind == "heads":
            return 1
        return self.round_to

    def _before(self, target: Target) -> Cost:
        if target.unit != "latency":
            return self.counts.before
        return replace(self.counts.before, latency=self.times.before)

    def _after(self, target: Target, widths: SiteWidths) -> Cost:
        if target.unit != "latency":
            return self.counts.after(widths)
        return replace(self.counts.before, latency=self.times.expected(widths))

    def _menus(self, target: Target) -> dict[str, list[Choice]]:
        """For each site, what may be chosen: a width, what it costs, and the error it makes."""
        menus: dict[str, list[Choice]] = {}
        for site in self.sites:
            curve = self.sweep.errors[site.name]
            menu = menus[site.name] = []
            for width in sorted(curve):
                if width % self._multiple(site) == 0 or width == site.width:
                    menu.append(Choice(width, self._site_cost(site, width, target), curve[width]))
        return menus

    def _site_cost(self, site: Site, width: int, target: Target) -> float:
        if target.unit == "latency":
            return self.times.latencies[site.name].at(width)
        return self.counts.of_site(site, width, target.unit)


def _widths_of(choices: Mapping[str, Choice]) -> dict[str, int]:
    return {name: choice.width for name, choice in choices.items()}

"""Which branches go: those that harm the output least for what they save, measured anew as others go.

chooser = Chooser(dense, branches, judge, savings)
for removed in chooser.removals():      # one more each time, until the target is met
    removed.sites, removed.divergence
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from torch import nn
from tqdm.auto import tqdm

from shallower.core.text import listing
from shallower.errors import TargetError
from shallower.methods.depth.emptying import emptied, inside
from shallower.methods.depth.judging import Judge
from shallower.methods.depth.saving import Layers, Savings
from shallower.sites import Site

TRIED = 4
"""Candidates that are measured anew after each removal."""

_TIED = 1e-6
"""Relative difference of divergences that count as the same."""


@dataclass(frozen=True)
class Removal:
    """Branches that are gone, without those inside others.

    Attributes:
        sites: in the order in which they were chosen.
        divergence: of the network without them.
    """

    sites: tuple[Site, ...] = ()
    divergence: float = 0.0


class Chooser:
    """Takes away one branch after the other.

    A candidate's score is the divergence that it adds, over what it saves of what still has to go. All are measured
    first; after each removal the `TRIED` best by what was last known of them, so that n candidates of which k go take
    at most n + k (TRIED + 1) passes.

    Attributes:
        dense: the model as it is.
        branches: that may go.
        judge: measures divergences.
        savings: in the unit of the target.
    """

    def __init__(self, dense: nn.Module, branches: Sequence[Site], judge: Judge, savings: Savings | Layers) -> None:
        self.dense = dense
        self.branches = [site for site in branches if savings.of(site) > 0]
        self.judge = judge
        self.savings = savings
        # what each candidate added to the divergence when it was last measured
        self._added: dict[str, float] = {}

    def note(self, removed: Removal) -> str:
        """Why these went, for people."""
        others = "" if len(removed.sites) == 1 else f" with the other {len(removed.sites) - 1}"
        return (
            f"divergence on rows held out {removed.divergence:.3g} without it{others}; {self.judge.passes} passes over "
            f"these rows for {len(self.branches)} candidates"
        )

    def removals(self) -> Iterator[Removal]:
        """One more gone each time; the last one meets the target.

        Raises:
            TargetError: the target is not met without any of them.
        """
        removed = Removal()
        bar = tqdm(desc="trying branches", total=len(self.branches), delay=2, leave=False, unit="pass")
        with bar:
            while self.savings.needed(removed.sites) > 0:
                best = self._best(removed, bar)
                if best is None:
                    self._refuse(removed)
                removed = self._whole_layers(best)
                if self.savings.needed(removed.sites) <= 0:
                    removed = self._without_excess(removed)
                yield removed

    def _best(self, removed: Removal, bar: tqdm[None]) -> Removal | None:
        """The best next removal; None where nothing is left to remove."""
        needed = self.savings.needed(removed.sites)
        gone = {site.name for site in removed.sites}
        worth: dict[str, float] = {}
        for site in self.branches:
            if site.name in gone or inside(site, removed.sites):
                continue
            saved = self.savings.of(site)
            saved -= sum(self.savings.of(other) for other in removed.sites if inside(other, [site]))
            if saved > 0:
                worth[site.name] = min(saved, needed)
        options = [site for site in self.branches if site.name in worth]
        if self._added:
            options.sort(key=lambda site: self._added[site.name] / worth[site.name])
            options = options[:TRIED]
        best: tuple[float, Removal] | None = None
        bar.total = self.judge.passes + len(options)
        for site in options:
            found = self._measured((*(other for other in removed.sites if not inside(other, [site])), site))
            bar.update()
            added = found.divergence - removed.divergence
            self._added[site.name] = added
            if best is None or added / worth[site.name] < best[0]:
                best = (added / worth[site.name], found)
        return None if best is None else best[1]

    def _measured(self, sites: tuple[Site, ...]) -> Removal:
        return Removal(sites, self.judge.divergence(emptied(self.dense, sites)))

    def _whole_layers(self, removed: Removal) -> Removal:
        """With a layer in the place of its branches, where all are gone and nothing else of it matters."""
        for layer in self.branches:
            own = [site for site in self.branches if inside(site, [layer])]
            if layer.branch is None or not layer.branch.layer or not own:
                continue
            if all(site in removed.sites for site in own):
                found = self._measured((*(site for site in removed.sites if site not in own), layer))
                if found.divergence <= removed.divergence * (1 + _TIED):
                    return found
        return removed

    def _without_excess(self, removed: Removal) -> Removal:
        """Without those of the earlier ones that need not go for the target."""
        for site in removed.sites[:-1]:
            others = tuple(other for other in removed.sites if other is not site)
            if self.savings.needed(others) <= 0:
                found = self._measured(others)
                if found.divergence <= removed.divergence:
                    removed = found
        return removed

    def _refuse(self, removed: Removal) -> NoReturn:
        """Say that the target cannot be met."""
        left = self.savings.left(removed.sites) / self.savings.whole
        names = listing([site.name for site in removed.sites])
        raise TargetError(
            f"without all branches that may go ({names or 'none'}) {left:.1%} would remain, and the target asks for "
            "less. Ask for less, allow more branches, or narrow what stays (squeeze)"
        )

"""How many channels each site keeps, so that the whole model meets a target at the least error.

    chosen = allocate(menus, lambda choice: cost(choice) <= limit)

Every site offers a menu: choices, each with a cost and an error. The least total error under a limit on
the total cost is a knapsack; its Lagrangian solves it up to the gap of the menus' convex hulls, which for curves of
hundreds of widths is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shallower.errors import TargetError

_HALVINGS = 60


@dataclass(frozen=True)
class Choice:
    """One way for a site.

    Attributes:
        width: channels kept; 0 for a full collapse to one linear map.
        cost: of the site then, in the unit of the target.
        error: that this makes, in a unit common to all sites.
    """

    width: int
    cost: float
    error: float


Menus = Mapping[str, Sequence[Choice]]
Met = Callable[[Mapping[str, Choice]], bool]


def allocate(menus: Menus, met: Met) -> dict[str, Choice]:
    """The choice for each site with the least total error, such that the target is met.

    Args:
        menus: by site, at least one choice each.
        met: whether these choices together are cheap enough. Must hold for the cheapest of all if it holds for any.

    Raises:
        TargetError: the cheapest choices do not meet the target.
    """
    if met(best(menus, 0.0)):
        return best(menus, 0.0)
    cheapest = _least(menus, lambda c: (c.cost, c.error))
    if not met(cheapest):
        raise TargetError("the target cannot be met, even with the cheapest choice at every site")
    low, high = _bracket(menus, met)
    if high is None:
        return filled(menus, cheapest, met)
    chosen = best(menus, high)
    for _ in range(_HALVINGS):  # prices range over many powers of ten: halve the bracket of their logarithms
        price = (low * high) ** 0.5
        trial = best(menus, price)
        if met(trial):
            high, chosen = price, trial
        else:
            low = price
    return filled(menus, chosen, met)


def best(menus: Menus, price: float) -> dict[str, Choice]:
    """What is best for each site where a unit of cost is worth `price` units of error; the cheaper of two equals."""
    return _least(menus, lambda c: (c.error + price * c.cost, c.cost))


def _least(menus: Menus, key: Callable[[Choice], tuple[float, float]]) -> dict[str, Choice]:
    """The choice of each menu with the least key."""
    return {name: min(menu, key=key) for name, menu in menus.items()}


def filled(menus: Menus, chosen: Mapping[str, Choice], met: Met) -> dict[str, Choice]:
    """Spend what is left of the budget: take the single change that lowers the error most, while the target is met."""
    current = dict(chosen)
    while True:
        changes = []
        for name, menu in menus.items():
            now = current[name]
            for choice in menu:
                if choice.error < now.error and choice.cost > now.cost:
                    changes.append((now.error - choice.error, name, choice))
        changes.sort(key=lambda change: -change[0])
        for _, name, choice in changes:
            trial = {**current, name: choice}
            if met(trial):
                current = trial
                break
        else:
            return current


def in_proportion(
    widths: Mapping[str, int], met: Callable[[Mapping[str, int]], bool], multiples: Mapping[str, int]
) -> dict[str, int]:
    """The same share of every site's channels, rounded down to a multiple, as large as the target allows.

    Args:
        widths: channels of each site now.
        met: whether these widths are small enough.
        multiples: the widths of each site are multiples of this, and at least this much stays.

    Raises:
        TargetError: even the smallest widths do not meet the target.
    """

    def at(share: float) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, n in widths.items():
            each = multiples[name]
            found[name] = max(min(n, each), int(share * n + 1e-9) // each * each)
        return found

    shares = sorted({k / n for n in widths.values() for k in range(0, n + 1)})
    if not met(at(0.0)):
        raise TargetError("the target cannot be met, even with the smallest width at every site")
    low, high = 0, len(shares)
    while high - low > 1:
        middle = (low + high) // 2
        if met(at(shares[middle])):
            low = middle
        else:
            high = middle
    return at(shares[low])


def _bracket(menus: Menus, met: Met) -> tuple[float, float | None]:
    """Prices at which the target is not met and is met; None where no finite price is needed to tell them apart."""
    price = 1e-18
    for _ in range(60):
        if met(best(menus, price * 10)):
            return price, price * 10
        price *= 10
    return price, None

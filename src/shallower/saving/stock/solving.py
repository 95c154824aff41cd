"""Numbers of a config with which a class makes every tensor as it is in a model, found by trying.

    changes = NumberSearch(config, build, wanted).solved()      # {("text_config", "hidden_size"): 32}

`build` makes the class of a config without weights. One number is changed at a time, by the ratio of a size that is to
be and one that is; what answers to it shows in the shapes. A change stays where what is wrong becomes less.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Any

from torch import nn

from shallower.saving.slots import slots_of

Spot = tuple[str, str | int]
"""A tensor and an axis, -1 where it is there or not; or a module and an attribute."""

Leaf = tuple[str | int, ...]
"""Where a number stands in a config: keys, and places in lists."""

Numbers = Mapping[Leaf, Any]
Wrongness = tuple[float, int]
"""How much is wrong: in sizes, and how many settings besides."""

_MOST_PAIRS = 40
_MOST_RATIOS = 6
_MOST_LEAVES = 400
_EPSILON = 1e-9


@dataclass(frozen=True)
class Structure:
    """The shapes of a model's tensors, and the plain values that its modules hold."""

    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[Spot, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """That of a model as it is."""
        return cls({name: tuple(slot.tensor.shape) for name, slot in slots_of(model).items()}, settings_of(model))

    def gaps(self, wanted: Structure, required: frozenset[Spot] = frozenset()) -> dict[Spot, float]:
        """What is not as wanted, and by how much: |log| of the sizes of an axis, 1 for anything else."""
        found: dict[Spot, float] = {}
        for name in (*wanted.shapes, *self.shapes):
            own, other = self.shapes.get(name), wanted.shapes.get(name)
            if own == other:
                continue
            if own is None or other is None or len(own) != len(other) or 0 in (*own, *other):
                found[name, -1] = 1.0
                continue
            for axis, (a, b) in enumerate(zip(own, other, strict=True)):
                if a != b:
                    found[name, axis] = abs(math.log(a / b))
        for spot in required:
            if self.settings.get(spot) != wanted.settings.get(spot):
                found[spot] = 1.0
        return found

    def differing(self, other: Structure) -> set[Spot]:
        """Everything that is not the same in the two."""
        found = set(self.gaps(other))
        for spot, value in self.settings.items():
            if other.settings.get(spot) != value:
                found.add(spot)
        return found


def settings_of(model: nn.Module) -> dict[Spot, Any]:
    """The plain values that the modules of a model hold: how many heads, what is scaled by how much.

    settings_of(model)["layers.0.attention", "num_heads"]       # 12
    """
    found: dict[Spot, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute != "training" and not attribute.startswith("_") and _is_plain(value):
                found[name, attribute] = value
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, (int, float, str)) for item in value)
    return isinstance(value, (int, float, str))


Build = Callable[[Mapping[str, Any]], Structure | None]
"""The structure that a config makes; None where the class does not take it."""


def with_numbers(config: Mapping[str, Any], changes: Numbers) -> dict[str, Any]:
    """A copy of a config with other numbers.

    with_numbers({"depths": [2, 2]}, {("depths", 0): 1})     # {"depths": [1, 2]}
    """
    made: dict[str, Any] = copy.deepcopy(dict(config))
    for (first, *inner), number in changes.items():
        made[str(first)] = _with_number(made.get(str(first)), inner, number)
    return made


def _with_number(value: Any, leaf: Sequence[str | int], number: Any) -> Any:
    """A value with a number somewhere in it."""
    if not leaf:
        return number
    first, *inner = leaf
    if isinstance(first, int):
        items = list(value)
        items[first] = _with_number(items[first], inner, number)
        return items
    value[first] = _with_number(value.get(first), inner, number)
    return value


def numbers_in(config: Mapping[str, Any], common: frozenset[str]) -> dict[Leaf, Any]:
    """The numbers of a config and its parts, and what is None and may be a number.

        numbers_in({"text_config": {"hidden_size": 32}}, frozenset())        # {("text_config", "hidden_size"): 32}

    Args:
        config: as plain data.
        common: keys that all configs have, which are no sizes.
    """
    found: dict[Leaf, Any] = {}

    def visit(value: Any, leaf: Leaf) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                if key not in common and isinstance(key, str):
                    visit(item, (*leaf, key))
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                if item is not None:
                    visit(item, (*leaf, i))
        elif value is None or type(value) in (int, float):
            found[leaf] = value

    visit(config, ())
    return found


@dataclass
class NumberSearch:
    """Numbers of a config that bring what its class makes nearer to what is wanted.

        search = NumberSearch(config, build, Structure.of(small))
        search.whole(search.solved())       # whether the config can say it

    Attributes:
        config: to begin with.
        build: what a config makes.
        wanted: what it is to make.
        common: keys of the config that are no sizes.
        asked: keys that it does not have and its class asks for.
        most: how often something is built.
    """

    config: Mapping[str, Any]
    build: Build
    wanted: Structure
    common: frozenset[str] = frozenset()
    asked: frozenset[Leaf] = frozenset()
    most: int = 160
    _built: dict[tuple[tuple[Leaf, Any], ...], Structure | None] = field(default_factory=dict)
    _answers: dict[tuple[Leaf, ...], set[Spot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numbers = {**dict.fromkeys(sorted(self.asked, key=repr)), **numbers_in(self.config, self.common)}
        self.before = self.at({})
        required = set()
        if self.before is not None:
            for spot, value in self.before.settings.items():
                if self.wanted.settings.get(spot, value) != value:
                    required.add(spot)
        self.required = frozenset(required)

    def at(self, changes: Numbers) -> Structure | None:
        """What the config makes with these numbers changed."""
        key = tuple(sorted(changes.items(), key=repr))
        if key not in self._built:
            self._built[key] = None
            if len(self._built) <= self.most:
                self._built[key] = self.build(with_numbers(self.config, changes))
        return self._built[key]

    def solved(self) -> dict[Leaf, Any]:
        """The numbers that leave least wrong."""
        if self.before is None or len(self.numbers) > _MOST_LEAVES or self.whole({}):
            return {}
        changes = self._implied(self.before)
        for leaf in self.asked - set(changes):
            del self.numbers[leaf]
        while step := self._step(changes):
            changes |= step
        for leaf in list(changes):
            fewer = all_but(changes, leaf)
            if self.at(fewer) == self.at(changes):  # the others say it
                changes = fewer
        return changes

    def said_rightly(self, changes: Numbers) -> dict[Leaf, Any]:
        """Those of the changes whose every effect is as wanted."""
        left = dict(changes)
        while wrong := self._wrongly_changed(left):
            kept = {}
            for leaf, number in left.items():
                now, other = self.at(left), self.at(all_but(left, leaf))
                if now is not None and other is not None and not now.differing(other) & wrong:
                    kept[leaf] = number
            if len(kept) == len(left):
                return {}
            left = kept
        return left

    def whole(self, changes: Numbers) -> bool:
        """Whether nothing is left that is not as wanted."""
        now = self.at(changes)
        return now is not None and not now.gaps(self.wanted, self.required)

    def obstacle(self, changes: Numbers) -> str:
        """What is not as wanted even so, as the end of a sentence: "make `embed.weight` 13 wide"."""
        now = self.at(changes)
        if now is None:
            return ""
        for name, axis in now.gaps(self.wanted, self.required):
            if isinstance(axis, str):
                return f"give `{name}` {axis} = {self.wanted.settings.get((name, axis))}"
            if axis >= 0:
                return f"make `{name}` {self.wanted.shapes[name][axis]} wide"
        return ""

    def unlike(self, changes: Numbers) -> set[Spot]:
        """Settings that are not as wanted and no mere copies of a number that changed."""
        now = self.at(changes)
        if now is None:
            return set()
        copies = [(self.numbers[leaf], number) for leaf, number in changes.items()]
        found: set[Spot] = set()
        for spot, value in self.wanted.settings.items():
            other = now.settings.get(spot, value)
            if other != value and (value, other) not in copies:
                found.add(spot)
        return found

    def _wrongly_changed(self, changes: Numbers) -> set[Spot]:
        """What the changes change where something is not as wanted: in that layer, or in one beside it."""
        now, found = self.at(changes), set[Spot]()
        if not changes or now is None or self.before is None:
            return found
        gaps = now.gaps(self.wanted, self.required)
        holders = set()
        for name, axis in gaps:
            if isinstance(axis, int):
                holders.add(_holder(name))
        for spot in now.differing(self.before):
            if spot in gaps or (isinstance(spot[1], int) and _holder(spot[0]) in holders):
                found.add(spot)
        return found

    def _implied(self, before: Structure) -> dict[Leaf, Any]:
        """Numbers that the config leaves to its class, which modules hold under that name: said, nothing changes.

        The size of a head that is that of the model by the number of heads, for instance.
        """
        found: dict[Leaf, Any] = {}
        for leaf, number in self.numbers.items():
            if number is not None:
                continue
            held: Counter[int] = Counter()
            for (_, name), value in before.settings.items():
                if name == leaf[-1] and type(value) is int:
                    held[value] += 1
            for value, _ in held.most_common(3):
                if self.at({leaf: value}) == before:
                    found[leaf] = value
                    break
        return found

    # ------------------------------------------------------------------------------------------------------- one step

    def _step(self, changes: Numbers) -> dict[Leaf, Any] | None:
        """The next change: the first that makes something right and nothing worse, or else the best; None if none."""
        state = _Standing.of(self, changes)
        if state is None or not state.wrong:
            return None
        best: tuple[Wrongness, dict[Leaf, Any]] | None = None
        steps: list[dict[Leaf, Any]] = []
        for group in state.groups(self._answers):
            for step in state.proposals(group, self._answers.get(group)):
                made = self.at({**changes, **step})
                if made is None:
                    if state.keeps_types(step):
                        steps.append(step)
                    continue
                answer = self._answers[group] = made.differing(state.now)
                if not answer & state.wrong:
                    break
                steps.append(step)
                score, gaps = self._score({**changes, **step}, made)
                if not _is_less(score, state.score):
                    continue
                if state.is_better(gaps) and self.unlike({**changes, **step}) <= state.unlike:
                    return step
                if best is None or _is_less(score, best[0]):
                    best = score, step
        if state.gaps:
            best = self._together(changes, state, steps) or best
        return best and best[1]

    def _together(
        self, changes: Numbers, state: _Standing, steps: Sequence[Numbers]
    ) -> tuple[Wrongness, dict[Leaf, Any]] | None:
        """Two changes that make something right and nothing worse, or that the class takes, only together."""
        pairs = ((one, other) for one, other in combinations(steps, 2) if one.keys() != other.keys())
        taken: tuple[Wrongness, dict[Leaf, Any]] | None = None
        for one, other in islice(pairs, _MOST_PAIRS):
            step = {**one, **other}
            made = self.at({**changes, **step})
            if made is None:
                continue
            score, gaps = self._score({**changes, **step}, made)
            if _is_less(score, state.score) and state.is_better(gaps):
                return score, step
            refused = self.at({**changes, **one}) is None or self.at({**changes, **other}) is None
            if refused and taken is None and _is_less(score, state.score):
                taken = score, step
        return taken

    def _score(self, changes: Numbers, made: Structure) -> tuple[Wrongness, dict[Spot, float]]:
        gaps = made.gaps(self.wanted, self.required)
        return (sum(gaps.values()), len(self.unlike(changes))), gaps


@dataclass(frozen=True)
class _Standing:
    """How a config with some numbers changed stands to what is wanted.

    Attributes:
        now, wanted: what it makes, and what it is to make.
        numbers: all that may change, as they are.
        gaps: sizes that are wrong, and settings that have to be right.
        unlike: settings that are otherwise.
    """

    now: Structure
    wanted: Structure
    numbers: Numbers
    gaps: Mapping[Spot, float]
    unlike: set[Spot]

    @classmethod
    def of(cls, search: NumberSearch, changes: Numbers) -> _Standing | None:
        """That of a search; None where the class does not take these numbers."""
        now = search.at(changes)
        if now is None:
            return None
        gaps = now.gaps(search.wanted, search.required)
        return cls(now, search.wanted, {**search.numbers, **changes}, gaps, search.unlike(changes))

    @property
    def wrong(self) -> set[Spot]:
        """Everything that is not as wanted."""
        return {*self.gaps, *self.unlike}

    @property
    def score(self) -> Wrongness:
        """How much is wrong."""
        return sum(self.gaps.values()), len(self.unlike)

    def is_better(self, gaps: Mapping[Spot, float]) -> bool:
        """Whether something was wrong, and nothing of it or besides is worse by now."""
        for spot, size in gaps.items():
            if size > self.gaps.get(spot, 0.0) + _EPSILON:
                return False
        return bool(self.gaps)

    def keeps_types(self, step: Numbers) -> bool:
        """Whether whole numbers stay whole."""
        return all(type(number) is type(self.numbers[leaf]) for leaf, number in step.items())

    def groups(self, answers: Mapping[tuple[Leaf, ...], set[Spot]]) -> list[tuple[Leaf, ...]]:
        """Numbers to change at once, the likeliest first: each alone, and all of a list."""
        found: list[tuple[Leaf, ...]] = []
        lists: dict[Leaf, list[Leaf]] = {}
        for leaf in self.numbers:
            found.append((leaf,))
            if isinstance(leaf[-1], int):
                lists.setdefault(leaf[:-1], []).append(leaf)
        found += map(tuple, lists.values())
        sizes: Counter[Any] = Counter()
        for current, _ in self.ratios(self.wrong):
            sizes[current] += 1

        def rank(group: tuple[Leaf, ...]) -> tuple[bool, int, int]:
            best = max(sizes[self.numbers[leaf]] for leaf in group)
            return self.numbers[group[0]] is None, -best, len(group)

        return sorted(filter(lambda group: self._may_help(answers.get(group)), dict.fromkeys(found)), key=rank)

    def _may_help(self, answer: set[Spot] | None) -> bool:
        """Whether a number may help that, when it was tried, changed this."""
        if answer is None:
            return True
        if not self.gaps and any(isinstance(axis, int) for _, axis in answer):
            return False  # every size is right: what changes one of them is not it
        return not answer.isdisjoint(self.wrong)

    def ratios(self, spots: set[Spot]) -> list[tuple[Any, Any]]:
        """Sizes that are wrong there and what they are to be, the most frequent first."""
        pairs: Counter[tuple[Any, Any]] = Counter()
        for name, axis in sorted(spots, key=repr):
            if isinstance(axis, str):
                own, other = self.now.settings.get((name, axis)), self.wanted.settings.get((name, axis))
                if type(own) is int and type(other) is int and own > 0 and other > 0:
                    pairs[own, other] += 1
            elif axis >= 0:
                pairs[self.now.shapes[name][axis], self.wanted.shapes[name][axis]] += 1
            else:
                pairs[len(self.now.shapes), len(self.wanted.shapes)] += 1
        return [pair for pair, _ in pairs.most_common(_MOST_RATIOS)]

    def proposals(self, group: tuple[Leaf, ...], answer: set[Spot] | None) -> Iterator[dict[Leaf, Any]]:
        """Other values of these numbers: times a ratio of a size that is to be and one that is."""
        pairs = self.ratios(self.wrong & (answer or set())) or self.ratios(self.wrong)
        seen: list[dict[Leaf, Any]] = [{leaf: self.numbers[leaf] for leaf in group}]
        for current, target in pairs:
            for step in _scaled(group, self.numbers, current, target):
                if step not in seen:
                    seen.append(step)
                    yield step


def _scaled(group: tuple[Leaf, ...], numbers: Numbers, current: int, target: int) -> Iterator[dict[Leaf, Any]]:
    """The numbers of a group times target / current; what is None becomes the target."""
    if numbers[group[0]] is None:
        yield {group[0]: target}
        return
    for rounding in (0.0, 1e-6):
        step: dict[Leaf, Any] = {}
        for leaf in group:
            number = numbers[leaf]
            step[leaf] = number * target / current * (1 + rounding)
            if type(number) is int and number * target % current == 0:
                step[leaf] = number * target // current
        yield step
    number = numbers[group[0]]
    if len(group) == 1 and type(number) is int and number * current % target == 0:
        yield {group[0]: number * current // target}  # the more heads, the smaller is each


def all_but(changes: Numbers, leaf: Leaf) -> dict[Leaf, Any]:
    """All changes but one.

    all_but({("depth",): 2, ("width",): 8}, ("depth",))      # {("width",): 8}
    """
    fewer = dict(changes)
    del fewer[leaf]
    return fewer


def _holder(tensor: str) -> str:
    """The module of the layer that holds a tensor."""
    return tensor.rpartition(".")[0].rpartition(".")[0]


def _is_less(a: Wrongness, b: Wrongness) -> bool:
    if abs(a[0] - b[0]) > _EPSILON:
        return a[0] < b[0]
    return a[1] < b[1]

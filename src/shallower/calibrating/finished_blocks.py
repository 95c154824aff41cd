"""A model that continues from a block that is finished, instead of from its inputs.

    course = course_of(model, sites, lambda: model(**first))
    blocks = FinishedBlocks(model, course)
    with blocks.resumed(batch=0, to=course.before["layer.2"]):
        model(**first)                      # the blocks before the last one that was kept return something at once

A block is an element of an `nn.ModuleList` or `nn.Sequential` that runs once in a pass. The model's own forward runs,
so that it makes masks and position embeddings as ever, but the forward of each finished block returns what was kept:
the last one its output, the earlier ones tensors of the right shape that hold nothing but NaN. Where a model reads
more than its last finished block (skip connections over blocks, a state on the side), NaN comes out, or something else
than in a pass from the inputs: the caller has to compare (see `walking.py`), and to `give_up`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from shallower.core.memory import free_bytes
from shallower.core.tensors import nbytes_of
from shallower.core.trees import mapped, tensors
from shallower.core.watching import After, Before, copied, watching
from shallower.errors import SiteError
from shallower.modules.offloading import held_bytes
from shallower.sites import Site

_LEAST_ROOM_FOR_BLOCKS = 1 << 28
"""Bytes of finished blocks that two networks may always keep; of larger models as much as their weights take."""


@dataclass(frozen=True)
class Course:
    """When the blocks of a model run in a pass.

    Attributes:
        finished: by dotted name, the place of each block that runs once in the order in which they finish.
        before: by site, the block that finishes last before the site begins; "" where there is none.
        ahead: by site, `before` of the next site, where that is later; else of the site itself.
    """

    finished: Mapping[str, int]
    before: Mapping[str, str]
    ahead: Mapping[str, str]


def course_of(model: nn.Module, sites: Sequence[Site], run: Callable[[], object]) -> Course:
    """Which blocks finish before which site, seen in one pass.

    Args:
        model: runs as it is.
        sites: in the order in which they will be visited.
        run: calls the model once.
    """
    blocks = list(_block_names(model))
    inside = {site.name: _smallest_around(site, blocks) for site in sites}
    clock = count(1)
    began: dict[str, int] = {}
    finished: defaultdict[str, list[int]] = defaultdict(list)

    def begins(name: str) -> Before:
        def before(*_: Any) -> None:
            began.setdefault(name, next(clock))

        return before

    def finishes(name: str) -> After:
        def after(*_: Any) -> None:
            finished[name].append(next(clock))

        return after

    watched = {*blocks, *chain.from_iterable(inside.values())}
    with watching(model, before={name: begins(name) for name in watched}, after={n: finishes(n) for n in blocks}):
        run()
    once: dict[str, int] = {}
    again: list[str] = []
    for name, ticks in finished.items():
        if len(ticks) == 1:
            once[name] = ticks[0]
        else:
            again.append(name)

    def tick(name: str) -> int:
        return once.get(name, 0)

    before = {}
    for site in sites:
        before[site.name] = ""
        # in a block that runs several times a site has no single beginning
        if any(_within(layer, name) for layer in site.layers for name in again):
            continue
        start = min((began[name] for name in inside[site.name] if name in began), default=0)
        earlier = [name for name in once if once[name] < start]
        before[site.name] = max(earlier, key=tick, default="")
    ahead = {}
    for site, following in zip(sites, [*sites[1:], *sites[-1:]], strict=True):
        ahead[site.name] = max(before[site.name], before[following.name], key=tick)
    return Course(once, before, ahead)


class FinishedBlocks:
    """What the finished blocks of a model returned, batch by batch.

        with blocks.resumed(batch=0, to="layers.3"):
            model(x)

    Attributes:
        on: whether passes still start from finished blocks; where not, every pass runs from the inputs.
        reached: whether the pass that runs now has come to the block that it was to keep.
    """

    def __init__(self, model: nn.Module, course: Course, most: int | None = None) -> None:
        self.model = model
        self.course = course
        self.on = True
        self.reached = True
        if most is None:
            weights = nbytes_of(model.parameters())
            most = max(_LEAST_ROOM_FOR_BLOCKS, held_bytes(model), min(weights, free_bytes() // 2)) // 2
        self._most = most
        self._given: dict[int, dict[str, Any]] = {}
        self._at: dict[int, str] = {}
        self._bytes: dict[int, int] = {}

    def give_up(self) -> None:
        """Forget everything: from now on every pass runs from the inputs."""
        self.on = False
        self.reached = True
        self._given, self._at, self._bytes = {}, {}, {}

    def part(self, batch: int, before: str) -> float:
        """Which part of the blocks a pass over this batch runs, through the one behind the block `before`."""
        ticks = sorted(self.course.finished.values())
        begin = bisect_right(ticks, self.course.finished.get(self._at.get(batch, ""), 0))
        end = bisect_right(ticks, self.course.finished.get(before, 0)) + 1
        return min(1.0, max(end - begin, 1) / max(1, len(ticks)))

    @contextmanager
    def resumed(self, batch: int, to: str) -> Iterator[None]:
        """For one pass over this batch: from the block that was kept last, and keep what block `to` returns.

        Nothing is kept where there is no room; the next pass over this batch then runs from the inputs.

        Raises:
            SiteError: a block returns something that cannot be kept.
        """
        place = self.course.finished
        given, at = self._given.get(batch, {}), self._at.get(batch, "")
        if not to or (at and place[at] > place[to]):
            given, at = {}, ""
        seen: dict[str, Any] = {}
        self.reached = not to or at == to

        def keeps(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                if name == to:
                    seen[name] = _checked_output(output, copied)
                    self.reached = True
                else:
                    seen[name] = _checked_output(output, _nothing)
                return output

            return run

        since = place.get(at, 0)
        with ExitStack() as stack:
            for name, value in given.items():
                stack.enter_context(_forward(self.model.get_submodule(name), _giving(value)))
            for name, tick in place.items():
                if since < tick <= place.get(to, 0) and not any(_within(name, done) for done in given):
                    module = self.model.get_submodule(name)
                    stack.enter_context(_forward(module, keeps(name, module.forward)))
            yield
        if to and at != to and to in seen:
            # only what `to` returned is read from now on; of earlier blocks the shapes are enough
            old = {name: mapped(_nothing, value) for name, value in given.items()}
            self._given[batch] = _outermost(old | seen)
            self._at[batch] = to
            self._bytes[batch] = nbytes_of(tensors(seen[to]))
        if to != self._at.get(batch) or sum(self._bytes.values()) > self._most:
            for kept in (self._given, self._at, self._bytes):
                kept.pop(batch, None)


def _outermost(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the blocks returned that are within no other of them."""
    found = {}
    for name, value in given.items():
        if not any(name != outer and _within(name, outer) for outer in given):
            found[name] = value
    return found


def _checked_output(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """What a module returned, with each tensor exchanged.

    Raises:
        SiteError: there is something in it that may hold tensors in a way that is not known.
    """
    for leaf in tree_leaves(value):
        if not isinstance(leaf, (Tensor, bool, int, float, str, type(None))):
            raise SiteError(f"a block returns a {type(leaf).__name__}")
    return mapped(of, value)


def _nothing(t: Tensor) -> Tensor:
    """A tensor of this shape that takes no memory."""
    filling: float = 0
    if t.is_floating_point():
        filling = torch.nan
    return t.new_full((), filling).expand(t.shape)


def _giving(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: mapped(_given_once, value)


def _given_once(t: Tensor) -> Tensor:
    # what follows may work in place; on the tensors that take no memory it cannot, and that is an error
    if 0 in t.stride():
        return t
    return t.clone()


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for this one module."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _block_names(model: nn.Module) -> Iterator[str]:
    for container, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for name, _ in module.named_children():
                yield f"{container}.{name}".removeprefix(".")


def _smallest_around(site: Site, blocks: Sequence[str]) -> list[str]:
    """The smallest block that the whole site is in, or else its maps: before these nothing of the site runs."""
    whole = [name for name in blocks if all(_within(layer, name) for layer in site.layers)]
    if not whole:
        return list(site.layers)
    return [max(whole, key=len)]


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")

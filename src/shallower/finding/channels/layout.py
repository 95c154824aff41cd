"""An axis of a tensor as runs of channels, and what operations do to it.

    rows, columns = Run(12), Run(12)
    tie(rows, columns)                  # added to each other: channel j of one goes with channel j of the other
    heads, features = divide(rows, 4, 3)            # reshaped to (4, 3)
    resolved(columns)                   # Prod((heads, features)): the columns are divided in the same way

A layout is a run of channels, several side by side (`Cat`, from concatenation), or one within the other (`Prod`, from
reshapes: position (i, j) goes when channel i of the outer or channel j of the inner goes). Whatever becomes known later
of a run is known wherever the run stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from shallower.sites import Span

ONE = "there is only one, and one has to stay"
MISMATCH = "its channels are rearranged in a way that no cut follows"
MOST_PIECES = 64
"""How often a run may be divided so that two layouts have the same boundaries."""


class Run:
    """Channels that are cut one by one, wherever they are read or written.

    Attributes:
        size: how many; at least 1.
        closed: why they cannot be cut; "" where they can. The only channel of a run cannot.
        marks: what operations say of them: "averaged", "attended", ...
        becomes: the layout that has taken its place: another run, or its parts.
    """

    __slots__ = ("becomes", "closed", "marks", "size")

    def __init__(self, size: int, closed: str = "") -> None:
        self.size = size
        self.closed = closed or (ONE if size < 2 else "")
        self.marks: set[str] = set()
        self.becomes: Layout | None = None

    def __repr__(self) -> str:
        return f"Run({self.size}{', closed' if self.closed else ''})"


@dataclass(frozen=True, eq=False)
class Cat:
    """Layouts side by side."""

    parts: tuple[Layout, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(part.size for part in self.parts))


@dataclass(frozen=True, eq=False)
class Prod:
    """Layouts within each other, the outermost first."""

    factors: tuple[Layout, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", prod(factor.size for factor in self.factors))


Layout = Run | Cat | Prod


def fixed(size: int, reason: str) -> Run:
    """Positions that stay: pixels, tokens, rows of the batch."""
    return Run(size, reason)


def cat(parts: Iterable[Layout]) -> Layout:
    """Layouts side by side, those of no size left out."""
    flat: list[Layout] = []
    for part in parts:
        part = resolved(part)
        if isinstance(part, Cat):
            flat += part.parts
        elif part.size:
            flat.append(part)
    return _simple(flat, sum) or Cat(tuple(flat))


def within(factors: Iterable[Layout]) -> Layout:
    """Layouts within each other, those of size 1 left out."""
    flat: list[Layout] = []
    for factor in factors:
        factor = resolved(factor)
        if isinstance(factor, Prod):
            flat += factor.factors
        elif factor.size != 1:
            flat.append(factor)
    if not flat:
        return fixed(1, ONE)
    return _simple(flat, prod) or Prod(tuple(flat))


def _simple(flat: list[Layout], size: Callable[[list[int]], int]) -> Layout | None:
    """One layout for several where there is only one, or none of which is ever cut."""
    if len(flat) == 1:
        return flat[0]
    if flat and all(isinstance(layout, Run) and layout.closed for layout in flat):
        said = dict.fromkeys(layout.closed for layout in flat if isinstance(layout, Run))
        telling = [reason for reason in said if reason != ONE]
        return fixed(size([layout.size for layout in flat]), (telling or [ONE])[0])
    return None


def resolved(layout: Layout) -> Layout:
    """The layout as it is known now."""
    if isinstance(layout, Run):
        if layout.becomes is None:
            return layout
        layout.becomes = resolved(layout.becomes)
        return layout.becomes
    if isinstance(layout, Cat):
        now: Layout = cat(layout.parts)
        return layout if isinstance(now, Cat) and now.parts == layout.parts else now
    now = within(layout.factors)
    return layout if isinstance(now, Prod) and now.factors == layout.factors else now


def runs(layout: Layout) -> Iterator[Run]:
    """The runs of a layout."""
    layout = resolved(layout)
    if isinstance(layout, Run):
        yield layout
    elif isinstance(layout, Cat):
        for part in layout.parts:
            yield from runs(part)
    else:
        for factor in layout.factors:
            yield from runs(factor)


def all_runs(layouts: Iterable[Layout]) -> list[Run]:
    """The runs of several layouts, each once."""
    found: dict[Run, None] = {}
    for layout in layouts:
        found.update(dict.fromkeys(runs(layout)))
    return list(found)


def reason_of(layout: Layout) -> str:
    """Why some of its channels cannot be cut; "" where all can."""
    for run in runs(layout):
        if run.closed:
            return run.closed
    return ""


def size_of(layout: Layout, fewer: Mapping[Run, int]) -> int:
    """The positions of a layout when some runs have fewer channels."""
    return size_left(resolved(layout), fewer)


def size_left(layout: Layout, fewer: Mapping[Run, int]) -> int:
    """The same of a layout as it is known now."""
    if isinstance(layout, Run):
        return fewer.get(layout, layout.size)
    if isinstance(layout, Cat):
        return sum(size_left(part, fewer) for part in layout.parts)
    return prod(size_left(factor, fewer) for factor in layout.factors)


def is_open(layout: Layout) -> bool:
    """Whether some channel of it may be cut."""
    return any(not run.closed for run in runs(layout))


def close(layout: Layout, reason: str) -> None:
    """No channel of it may be cut, for this reason; the first reason stays."""
    for run in runs(layout):
        run.closed = run.closed or reason


def _becomes(run: Run, layout: Layout) -> None:
    """Let a layout take a run's place, with what is known of the run."""
    if run in runs(layout):
        close(layout, "its channels are mixed with one another by a reshape")
        return
    for part in runs(layout):
        part.closed = part.closed or run.closed
        part.marks |= run.marks
    run.becomes = layout


def tie(x: Layout, y: Layout) -> None:
    """Channels at the same position of two layouts of one size go together from now on."""
    x, y = resolved(x), resolved(y)
    if x is y or not (is_open(x) or is_open(y)):
        return
    assert x.size == y.size, (x, y)
    if isinstance(x, Run):
        if isinstance(y, Run) and x.closed and not y.closed:
            x, y = y, x
        _becomes(x, y)
    elif isinstance(y, Run):
        _becomes(y, x)
    elif isinstance(x, Prod) and isinstance(y, Prod):
        _tie_products(x, y)
    else:
        _tie_sums(x, y)


def _tie_products(x: Prod, y: Prod) -> None:
    a, b = x.factors[0].size, y.factors[0].size
    if a > b:
        x, y, a, b = y, x, b, a
    if b % a:
        close(x, MISMATCH)
        close(y, MISMATCH)
        return
    outer, rest = divide(y, a, y.size // a)
    tie(x.factors[0], outer)
    tie(within(x.factors[1:]), rest)


def _tie_sums(x: Layout, y: Layout) -> None:
    """At least one of the two is a Cat: tie piece by piece, as long as few pieces have to be made."""
    made = 0
    while made < MOST_PIECES:
        x, y = resolved(x), resolved(y)
        at = min(_first(x), _first(y))
        made += _first(x) != _first(y)
        if at == x.size:
            tie(x, y)
            return
        (a, x), (b, y) = split(x, at), split(y, at)
        tie(a, b)
    close(x, MISMATCH)
    close(y, MISMATCH)


def _first(layout: Layout) -> int:
    return layout.parts[0].size if isinstance(layout, Cat) else layout.size


def split(layout: Layout, at: int) -> tuple[Layout, Layout]:
    """The first `at` positions and the rest; both must be of some size."""
    layout = resolved(layout)
    assert 0 < at < layout.size
    if isinstance(layout, Run):
        first, second = Run(at, layout.closed), Run(layout.size - at, layout.closed)
        if not layout.closed:
            _becomes(layout, Cat((first, second)))
        return first, second
    if isinstance(layout, Cat):
        return _split_sum(layout, at)
    inner = layout.size // layout.factors[0].size
    if at % inner:
        close(layout, MISMATCH)
        return fixed(at, MISMATCH), fixed(layout.size - at, MISMATCH)
    one, two = split(layout.factors[0], at // inner)
    rest = layout.factors[1:]
    return within([one, *rest]), within([two, *rest])


def _split_sum(layout: Cat, at: int) -> tuple[Layout, Layout]:
    before: list[Layout] = []
    parts = list(layout.parts)
    while parts and parts[0].size <= at:
        at -= parts[0].size
        before.append(parts.pop(0))
    if at:
        first, parts[0] = split(parts[0], at)
        before.append(first)
    return cat(before), cat(parts)


def parts_of(layout: Layout, sizes: Iterable[int]) -> list[Layout]:
    """The layout in parts of these sizes, which add up to its own."""
    found: list[Layout] = []
    rest = resolved(layout)
    for size in sizes:
        if size == 0:
            found.append(fixed(0, "nothing"))
        elif size == rest.size:
            found.append(rest)
        else:
            part, rest = split(rest, size)
            found.append(part)
    return found


def divide(layout: Layout, outer: int, inner: int) -> tuple[Layout, Layout]:
    """The layout of outer * inner positions as two axes."""
    layout = resolved(layout)
    assert outer * inner == layout.size, (layout.size, outer, inner)
    if outer == 1:
        return fixed(1, ONE), layout
    if inner == 1:
        return layout, fixed(1, ONE)
    if isinstance(layout, Run):
        rows, columns = Run(outer, layout.closed), Run(inner, layout.closed)
        if not layout.closed:
            _becomes(layout, Prod((rows, columns)))
        return rows, columns
    pair = _divide_sum(layout, inner) if isinstance(layout, Cat) else _divide_product(layout, outer)
    if pair is None:
        close(layout, MISMATCH)
        return fixed(outer, MISMATCH), fixed(inner, MISMATCH)
    return pair


def _divide_sum(layout: Cat, inner: int) -> tuple[Layout, Layout] | None:
    """Each part by itself; all have the same inner channels."""
    rows: list[Layout] = []
    columns: list[Layout] = []
    for part in layout.parts:
        if part.size % inner:
            return None
    for part in layout.parts:
        row, column = divide(part, part.size // inner, inner)
        rows.append(row)
        columns.append(column)
    for column in columns[1:]:
        tie(columns[0], column)
    return cat(rows), resolved(columns[0])


def _divide_product(layout: Prod, outer: int) -> tuple[Layout, Layout] | None:
    """Factors go to the outer axis until it is full; one may be divided."""
    before: list[Layout] = []
    factors = list(layout.factors)
    while outer % factors[0].size == 0:
        outer //= factors[0].size
        before.append(factors.pop(0))
        if outer == 1:
            return within(before), within(factors)
    if factors[0].size % outer:
        return None
    first, second = divide(factors[0], outer, factors[0].size // outer)
    return within([*before, first]), within([second, *factors[1:]])


def reshaped(axes: Sequence[Layout], shape: tuple[int, ...]) -> list[Layout]:
    """The axes of a tensor after a reshape.

    Axes are taken together until they have as many positions as the next axes of the new shape, and divided again.
    """
    if 0 in shape:
        return [fixed(size, "an empty tensor") for size in shape]
    waiting, found = list(axes), list[Layout]()
    current: Layout = fixed(1, ONE)
    for size in shape:
        while current.size % size and waiting:
            current = within([current, waiting.pop(0)])
        first, current = divide(current, size, current.size // size)
        found.append(first)
    return found


def spans(layout: Layout, run: Run) -> list[Span]:
    """Every place at which a run stands in a layout.

    A run that stands within a run that repeats in several ways gives several spans.
    """
    layout = resolved(layout)
    if layout is run:
        return [Span(0, 1, 0, 1)]
    found: list[Span] = []
    if isinstance(layout, Cat):
        start = 0
        for part in layout.parts:
            found += [Span(s.start + start, s.repeats, s.stride, s.block) for s in spans(part, run)]
            start += part.size
    elif isinstance(layout, Prod):
        before, after = 1, layout.size
        for factor in layout.factors:
            after //= factor.size
            for s in spans(factor, run):
                found += _repeated(s, before, factor.size, after)
            before *= factor.size
    return found


def _repeated(span: Span, times: int, length: int, block: int) -> list[Span]:
    """A span of a factor of `length` that is repeated so often, each position `block` long."""
    start, stride, each = span.start * block, span.stride * block, span.block * block
    if span.repeats == 1:
        return [Span(start, times, length * block if times > 1 else 0, each)]
    if times == 1:
        return [Span(start, span.repeats, stride, each)]
    return [Span(start + i * length * block, span.repeats, stride, each) for i in range(times)]

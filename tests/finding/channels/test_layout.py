"""Layouts against brute force: an element goes exactly when the element that it came from goes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shallower.finding.channels.layout import (
    ONE,
    Cat,
    Layout,
    Prod,
    Run,
    Span,
    cat,
    close,
    divide,
    fixed,
    is_open,
    parts_of,
    reshaped,
    resolved,
    runs,
    spans,
    split,
    tie,
    within,
)
from tests.finding.channels.commuting import positions


class Labelled:
    """A tensor whose elements remember where they came from, and the layouts of its axes."""

    def __init__(self, labels: torch.Tensor, axes: list[Layout]) -> None:
        self.labels, self.axes = labels, axes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.labels.shape)

    def gone(self, run: Run, channel: int) -> torch.Tensor:
        """Which elements a cut takes away."""
        mask = torch.zeros(self.labels.shape, dtype=torch.bool)
        for dim, axis in enumerate(self.axes):
            places = sorted(positions(axis, run, [channel]))
            mask.index_fill_(dim, torch.tensor(places, dtype=torch.long), True)
        return mask


def sources() -> list[Labelled]:
    made, start = [], 0
    for shape in ((4, 6), (2, 12)):
        count = math.prod(shape)
        made.append(Labelled(torch.arange(start, start + count).view(shape), [Run(size) for size in shape]))
        start += count
    return made


def reshape(draw, x: Labelled) -> Labelled:
    """Two neighbouring axes become one, or one becomes two."""
    dim = draw(st.integers(0, len(x.shape) - 1))
    shape = list(x.shape)
    if draw(st.booleans()) and dim + 1 < len(shape):
        shape[dim : dim + 2] = [shape[dim] * shape[dim + 1]]
    else:
        outer = draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
        shape[dim : dim + 1] = [outer, shape[dim] // outer]
    return Labelled(x.labels.reshape(shape), reshaped(x.axes, tuple(shape)))


def permute(draw, x: Labelled) -> Labelled:
    order = draw(st.permutations(range(len(x.shape))))
    return Labelled(x.labels.permute(order), [x.axes[dim] for dim in order])


def part(draw, x: Labelled) -> Labelled:
    """Some positions of an axis side by side."""
    dim = draw(st.integers(0, len(x.shape) - 1))
    size = x.shape[dim]
    start = draw(st.integers(0, size - 1))
    length = draw(st.integers(1, size - start))
    axes = list(x.axes)
    axes[dim] = parts_of(x.axes[dim], [start, length, size - start - length])[1]
    return Labelled(x.labels.narrow(dim, start, length), axes)


def turned(draw, x: Labelled) -> Labelled:
    """The two parts of an axis in the other order."""
    dim = draw(st.integers(0, len(x.shape) - 1))
    if x.shape[dim] == 1:
        return x
    at = draw(st.integers(1, x.shape[dim] - 1))
    first, second = split(x.axes[dim], at)
    axes = list(x.axes)
    axes[dim] = cat([second, first])
    return Labelled(torch.cat([x.labels.narrow(dim, at, x.shape[dim] - at), x.labels.narrow(dim, 0, at)], dim), axes)


def repeated(draw, x: Labelled) -> Labelled:
    """Each position twice, side by side."""
    dim = draw(st.integers(0, len(x.shape) - 1))
    axes = list(x.axes)
    axes[dim] = within([x.axes[dim], fixed(2, "repetitions")])
    return Labelled(x.labels.repeat_interleave(2, dim), axes)


MOVES = (reshape, permute, part, turned, repeated)


@st.composite
def moved(draw):
    """Two tensors of random moves each, tied where axes have one size; with the tensors that they came from."""
    made = sources()
    results = []
    for x in made:
        for move in draw(st.lists(st.sampled_from(MOVES), max_size=6)):
            x = move(draw, x)
        results.append(x)
    for first in results[0].axes:
        for second in results[1].axes:
            if first.size == second.size and draw(st.booleans()):
                tie(first, second)
    return made, results


@settings(max_examples=400, deadline=None)
@given(moved())
def test_an_element_goes_with_the_one_it_came_from(tensors):
    made, results = tensors
    open_runs = {run for x in made for axis in x.axes for run in runs(axis) if not run.closed}
    for run in open_runs:
        for channel in range(run.size):
            gone = set()
            for x in made:
                gone |= set(x.labels[x.gone(run, channel)].tolist())
            for x in results:
                expected = torch.tensor([label in gone for label in x.labels.flatten().tolist()], dtype=torch.bool)
                assert torch.equal(x.gone(run, channel), expected.view(x.shape))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tied_layouts_are_the_same(data):
    """After a tie every open run stands at the same positions of both."""
    made, results = data.draw(moved())
    for first in results[0].axes:
        for second in results[1].axes:
            if first.size == second.size:
                tie(first, second)
                for run in {*runs(first), *runs(second)}:
                    if not run.closed:
                        channels = list(range(run.size))
                        assert positions(first, run, channels) == positions(second, run, channels)
    assert made


def test_the_runs_of_a_division_stand_wherever_the_run_stands():
    rows, columns = Run(12), Run(12)
    tie(rows, columns)
    heads, features = divide(rows, 4, 3)
    found = resolved(columns)
    assert isinstance(found, Prod)
    assert found.factors == (heads, features)


def test_what_is_known_later_of_a_run_is_known_of_its_parts():
    run = Run(6)
    first, second = split(run, 2)
    close(run, "why")
    assert [part.closed for part in (first, second)] == ["why", "why"]
    assert not is_open(run)


def test_the_first_reason_stays():
    run = fixed(3, "first")
    close(run, "second")
    assert run.closed == "first"


def test_the_only_channel_of_a_run_stays():
    assert Run(1).closed == ONE
    assert not is_open(split(Run(3), 1)[0])


def test_closed_layouts_side_by_side_are_one():
    assert repr(cat([fixed(2, "a"), fixed(3, "b")])) == "Run(5, closed)"
    assert isinstance(cat([Run(2), fixed(3, "b")]), Cat)


def test_a_division_that_does_not_fit_closes():
    axis = within([Run(3), Run(4)])
    divide(axis, 2, 6)
    assert not is_open(axis)
    joined = cat([Run(6), Run(2)])
    divide(joined, 2, 4)
    assert not is_open(joined)


def test_rotated_halves_go_together():
    first, second = Run(3), Run(3)
    tie(cat([first, second]), cat([second, first]))
    assert resolved(first) is resolved(second)


def test_channels_tied_to_their_neighbours_stay():
    run = Run(6)
    _, rest = split(run, 1)
    before, _ = split(run, 5)
    tie(rest, before)
    assert not is_open(run)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (lambda run: run, [Span(0, 1, 0, 1)]),
        (lambda run: within([run, fixed(3, "")]), [Span(0, 1, 0, 3)]),
        (lambda run: within([fixed(3, ""), run]), [Span(0, 3, 4, 1)]),
        (lambda run: cat([fixed(5, ""), run]), [Span(5, 1, 0, 1)]),
        (lambda run: within([fixed(2, ""), cat([Run(1), run]), fixed(3, "")]), [Span(3, 2, 15, 3)]),
        (lambda run: cat([run, fixed(1, ""), run]), [Span(0, 1, 0, 1), Span(5, 1, 0, 1)]),
    ],
)
def test_spans(layout, expected):
    run = Run(4)
    assert spans(layout(run), run) == expected


def test_many_parts_are_tied_to_as_many():
    first, second = ([Run(2) for _ in range(300)] for _ in range(2))
    tie(cat(first), cat(second))
    assert [resolved(run) for run in first] == [resolved(run) for run in second]
    assert is_open(first[299])


def test_a_long_run_tied_to_its_neighbours_is_no_deep_recursion():
    run = Run(3000)
    _, rest = split(run, 1)
    before, _ = split(run, 2999)
    tie(rest, before)
    assert not is_open(rest)

"""Positions by slices, numbers and masks."""

import pytest
import torch

from tests.finding.channels.commuting import Usage


def put(x, index, value):
    """A copy of x with a value written into it."""
    x = x.clone()
    x[index] = value
    return x


USAGES = [
    Usage("a slice", lambda x, n=4: x[:, :n], "x:2,6", "x0|x1|x1"),
    Usage("halves by slices", lambda x, n=3: (x[:, :n], x[:, n:]), "x:2,6", "x0|x1|x1"),
    Usage("the rest", lambda x, n=2: x[:, n:], "x:2,6", "x0|x1|x1"),
    Usage("a whole slice", lambda x: x[:, :], "x:2,6", "x0|x1"),
    Usage("dots and None", lambda x: x[..., None, :], "x:2,3,6", "x0|x1|x2"),
    Usage("a number", lambda x: x[:, 1], "x:3,4,6", "x0|x2"),
    Usage("the first", lambda x: x[:, 0], "x:3,4,6", "x0|x1|x2"),
    Usage("the last", lambda x: (x[..., -1], x[..., 0]), "x:3,4,6", "x0|x1|x2"),
    Usage("every second", lambda x: (x[..., ::2], x[..., 1::2]), "x:2,6", "x0|x1"),
    Usage("every second of seven", lambda x: x[..., ::2], "x:2,7", "x0"),
    Usage(
        "rotated halves",
        lambda x, c: x * c + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1),
        "x:2,6 c:6",
        "x0|x1 c0",
    ),
    Usage("rotated pairs", lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) + x, "x:2,6", "x0|x1"),
    Usage("rows by number", lambda x, i: x[i], "x:5,6 i:int5:3", "x1"),
    Usage("rows in a table", lambda x, i: x[i], "x:5,6 i:int5:3,2", "x1"),
    Usage("columns by number", lambda x, i: x[:, i], "x:4,5,6 i:int5:3", "x0|x2"),
    Usage("numbers in a list", lambda x: x[:, [0, 2]], "x:4,5,6", "x0|x2"),
    Usage("lists in a list", lambda x: x[:, [[0, 2], [1, 1]]], "x:4,5,6", "x0|x2"),
    Usage("a list of masks", lambda x: x[:, [True, False, True, False]], "x:3,4,6", "x0|x2"),
    Usage("neighbours in a list", lambda x: x[:, [-2, -1]], "x:4,5,6", "x0|x1|x2"),
    Usage(
        "one key and one value head behind the queries",
        lambda x: (x[:, :-2], x[:, [-2]], x[:, [-1]]),
        "x:4,5,6",
        "x0|x1|x2",
    ),
    Usage("two numbers of rows", lambda x, i, j: x[i, j], "x:4,5,6 i:int4:3 j:int5:3", "x2"),
    Usage("numbers apart", lambda x, i, j: x[i, :, j], "x:4,6,5 i:int4:3 j:int5:3", "x1"),
    Usage("a number and numbers", lambda x, i: x[1, :, i], "x:2,3,6 i:int6:4", "x1"),
    Usage("a mask of rows", lambda x, m: x[m], "x:5,6 m:bool:5", "x1"),
    Usage("a mask of places", lambda x, m: x[m], "x:2,3,6 m:bool:2,3", "x2"),
    Usage(
        "a mask of whole rows",
        lambda x, m: x[m[:, :, None].expand_as(x)].view(-1, x.shape[-1]),
        "x:2,3,6 m:bool:2,3",
        "x2",
    ),
    Usage("a mask behind a slice", lambda x, m: x[:, m], "x:4,2,3,6 m:bool:2,3", "x0|x3"),
    Usage("written as a whole", lambda x, y: put(x, (slice(None),), y), "x:2,6 y:6", "x0|x1 y0"),
    Usage(
        "written in a slice", lambda x, y, n=4: put(x, (slice(None), slice(0, n)), y), "x:2,6 y:2,4", "x0 y0|x1 y1|x1"
    ),
    Usage("a number written", lambda x: put(x, (slice(None), 1), 0.0), "x:2,3,6", "x0|x2"),
    Usage("written at numbers", lambda x, i, y: put(x, i, y), "x:5,6 i:int5:3 y:3,6", "x1 y1"),
    Usage("written at a mask", lambda x, m: put(x, m, 0.0), "x:2,3,6 m:bool:2,3", "x2"),
    Usage("written at a mask, all of it", lambda x, m: put(x, (m, slice(None)), 1.0), "x:2,3,6 m:bool:2,3", "x2"),
    Usage("written at two numbers", lambda x, i, j, y: put(x, (i, j), y), "x:4,5,6 i:int4:3 j:int5:3 y:3,6", "x2 y1"),
    Usage("index_put", lambda x, i, y: x.index_put((i,), y, accumulate=True), "x:5,6 i:int5:3 y:3,6", "x1 y1"),
    Usage("index_select", lambda x, i: x.index_select(1, i), "x:2,5,6 i:int5:3", "x0|x2"),
    Usage("gather", lambda x, i: x.gather(1, i), "x:2,5,6 i:int5:2,3,6", "x0 i0|x2 i2"),
    Usage("gather of fewer", lambda x, i: x.gather(1, i), "x:3,5,6 i:int5:2,3,6", "x2 i2"),
    Usage("take_along_dim", lambda x, i: torch.take_along_dim(x, i, dim=1), "x:2,5,6 i:int5:2,3,6", "x0 i0|x2 i2"),
    Usage("scatter", lambda x, i, y: x.scatter(1, i, y), "x:2,5,6 i:int5:2,3,6 y:2,3,6", "x0 i0 y0|x2 i2 y2"),
    Usage("scatter a number", lambda x, i: x.scatter(1, i, 1.0), "x:2,5,6 i:int5:2,3,6", "x0 i0|x2 i2"),
    Usage("index_add", lambda x, i, y: x.index_add(0, i, y), "x:5,6 i:int5:3 y:3,6", "x1 y1"),
    Usage("index_fill", lambda x, i: x.index_fill(0, i, 0.0), "x:5,6 i:int5:3", "x1"),
    Usage("masked_scatter", lambda x, m, y: x.masked_scatter(m, y), "x:2,6 m:bool:2,6 y:2,6", ""),
    Usage(
        "rows filled in order",
        lambda x, m, y: x.masked_scatter(m[:, None].expand_as(x), y),
        "x:4,6 m:bool:4 y:4,6",
        "x1 y1",
    ),
    Usage(
        "rows filled in order by a mask without channels",
        lambda x, m, y: x.masked_scatter(m[:, None], y),
        "x:4,6 m:bool:4 y:4,6",
        "x1 y1",
    ),
    Usage("masked_select", lambda x, m: x.masked_select(m), "x:2,6 m:bool:2,6", ""),
    Usage("nonzero", lambda x: x.nonzero(), "x:2,6", ""),
    Usage(
        "a relative table",
        lambda t, i, s: s + t[i.view(-1)].view(4, 4, -1).permute(2, 0, 1),
        "t:7,3 i:int7:4,4 s:2,3,4,4",
        "t1 s1|s0",
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()

"""Find attention heads in a recorded pass: query, key and value maps, the attention itself, the output projection.

Which channels of a map make up a head is not guessed from names: numbers of channels are sent through the very reshapes
that the model made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shallower.finding.graph import Graph, Step, Unit
from shallower.finding.pointwise import DROPOUT, RESHAPES, UNCHANGED, is_pointwise, moving
from shallower.recording.tracing import Call, Value
from shallower.sites import HeadRows, Heads, Site

MOST_CALLS = 256
"""Calls that are followed on one side of an attention before giving up."""

_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
_REARRANGED = RESHAPES - {"repeat", "roll", "unfold", "fold", "index_select", "gather", "pixel_shuffle"} | {
    "repeat",
    "repeat_interleave",
    "unsafe_split",
    "unsafe_chunk",
    "split_with_sizes",
    "tensor_split",
}


class _NotHeadsError(Exception):
    """Why an attention is no site."""


@dataclass(eq=False)
class Attention:
    """One execution of an attention.

    Attributes:
        call: that computes it: the fused function, or the product of probabilities and values.
        query, key, value: what it reads; the last two dimensions are positions and features of a head.
        result: what it gives.
        inside: the calls it is made of.
        mixed: what is added to the scores.
        units: the maps that make query, key and value, and the one that reads the result.
        heads: what they are as channels.
    """

    call: Call
    query: Value
    key: Value
    value: Value
    result: Value
    inside: list[Call]
    mixed: list[Value]
    units: tuple[Unit, ...] = ()
    heads: Heads | None = None


def head_sites(graph: Graph) -> tuple[list[tuple[int, Site]], dict[str, str]]:
    """Sites of attention heads, with their position in the execution, and what was skipped, by name."""
    groups: dict[tuple[nn.Module, ...], list[Attention]] = {}
    skipped: dict[str, str] = {}
    for frame in graph.trace.frames:
        if isinstance(frame.module, nn.MultiheadAttention) and frame.name:
            skipped.setdefault(
                frame.name, "nn.MultiheadAttention holds query, key and value in one parameter of its own"
            )
    for attention in attentions(graph):
        name = attention.call.frame.name or "model"
        if any(isinstance(f.module, nn.MultiheadAttention) for f in attention.call.frame.ancestors()):
            continue
        try:
            _describe(graph, attention)
        except _NotHeadsError as error:
            skipped.setdefault(name, str(error))
            continue
        groups.setdefault(tuple(unit.module for unit in attention.units), []).append(attention)
    for call in graph.trace.calls:
        if call.name == "softmax" and call.outputs and _weighs(call) and _written_out(call) is None:
            skipped.setdefault(
                call.frame.name or "model", "its scores are not a product of queries and keys with steps of their own"
            )
    items = []
    for group in groups.values():
        first = group[0]
        name = first.call.frame.name or "model"
        reason = _group_problem(graph, group)
        if reason or name in skipped or first.heads is None:
            skipped.setdefault(name, reason)
            continue
        items.append((graph.position(first.call), _site(graph, name, group, first.heads)))
    taken: set[str] = set()
    for _, site in items:
        if site.name in taken:
            skipped[site.name] = "its forward computes more than one attention"
        taken.add(site.name)
    return [item for item in items if item[1].name not in skipped], skipped


def attentions(graph: Graph) -> Iterator[Attention]:
    """Every attention of a pass: fused calls, and softmax between two products."""
    for call in graph.trace.calls:
        if call.name == "scaled_dot_product_attention" and call.outputs:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
            q, k, v, mask = (given.get(name) for name in names)
            if isinstance(q, Value) and isinstance(k, Value) and isinstance(v, Value):
                mixed = [mask] if isinstance(mask, Value) else []
                yield Attention(call, q, k, v, call.outputs[0], [call], mixed)
        elif call.name == "softmax" and call.outputs and call.inputs:
            found = _written_out(call)
            if found is not None:
                yield found


def _written_out(softmax: Call) -> Attention | None:
    """softmax(q k^T + ...) v."""
    inside, mixed = [softmax], list[Value]()
    value = softmax.inputs[0]
    for _ in range(MOST_CALLS):
        call = value.call
        if call is None:
            return None
        inside.append(call)
        if call.name in _PRODUCTS:
            break
        onward = [v for v in moving(call) if v.shape == value.shape] if is_pointwise(call) else call.inputs[:1]
        if not (is_pointwise(call) or call.name in _REARRANGED or call.name == "masked_fill") or not onward:
            return None
        mixed += [v for v in call.inputs if v is not onward[0] and v.elements > 1]
        value = onward[0]
    else:
        return None
    scores = [v for v in inside[-1].inputs if v.fed][-2:]
    value = softmax.outputs[0]
    for _ in range(8):
        readers = [r for r in value.readers if r.outputs]
        product = next((r for r in readers if r.name in _PRODUCTS), None)
        if product is not None:
            others = [v for v in product.inputs if v is not value and v.fed]
            if len(others) != 1 or len(scores) != 2:
                return None
            key, turning = _upright(scores[1])
            return Attention(
                product, scores[0], key, others[0], product.outputs[0], [*inside, *turning, product], mixed
            )
        passing = [r for r in readers if r.name in UNCHANGED | DROPOUT | _REARRANGED]
        if not passing:
            return None
        inside.append(passing[0])
        value = passing[0].outputs[0]
    return None


def _weighs(softmax: Call) -> bool:
    """Whether what a softmax gives weighs something in a product, as in an attention."""
    value = softmax.outputs[0]
    for _ in range(8):
        readers = [r for r in value.readers if r.outputs]
        if any(r.name in _PRODUCTS and len([v for v in r.inputs if v.fed]) > 1 for r in readers):
            return True
        onward = next((r for r in readers if r.name in UNCHANGED | DROPOUT), None)
        if onward is None:
            return False
        value = onward.outputs[0]
    return False


def _upright(key: Value) -> tuple[Value, list[Call]]:
    """Keys before they were turned for the product, and the calls that turned them."""
    call = key.call
    if call is None or call.name not in _REARRANGED or not call.inputs:
        return key, []
    source = call.inputs[0]
    turned = len(key.shape) > 2 and source.shape == (*key.shape[:-2], key.shape[-1], key.shape[-2])
    return (source, [call]) if turned else (key, [])


def _describe(graph: Graph, attention: Attention) -> None:
    """Set the maps of an attention and what its heads are.

    Raises:
        _NotHeadsError: it is none that can be narrowed.
    """
    made = [_made_by(graph, attention, value) for value in (attention.query, attention.key, attention.value)]
    out = _read_by(graph, attention)
    attention.units = (*(unit for unit, _ in made), out)
    for unit in attention.units:
        if unit.problem:
            raise _NotHeadsError(unit.problem)
        if isinstance(unit.module, nn.modules.conv._ConvNd):
            raise _NotHeadsError(f"{graph.title(unit)} is a convolution, not a linear layer")
    (q_rows, q_heads, _), (k_rows, groups, _), (v_rows, v_heads, _) = (layout for _, layout in made)
    if groups != v_heads or q_heads % groups:
        raise _NotHeadsError(f"{q_heads} query heads share {groups} key heads and {v_heads} value heads")
    each = q_heads // groups
    for name, (_, count, order) in zip(("query", "key", "value"), (layout for _, layout in made), strict=True):
        wanted = [j * count // q_heads for j in range(q_heads)]
        if order not in (wanted, list(range(count))):
            raise _NotHeadsError(f"the {name} heads come in another order than their rows")
    biased = next((v for v in attention.mixed if len(v.shape) > 2 and v.shape[-3] > 1), None)
    if biased is not None and q_heads > 1:
        raise _NotHeadsError("something is added to the scores that differs from head to head (relative positions?)")
    maps = [graph.linear_map([unit]) for unit, _ in made]
    packed: Literal["", "blocks", "heads"] = ""
    if len({m.name for m in maps}) < 3:
        packed = "blocks" if k_rows[1] == k_rows[2] else "heads"
    if packed and len({m.name for m in maps}) == 2:
        raise _NotHeadsError("two of query, key and value are packed in one map and the third is not")
    if each > 1:
        if q_rows[1] != q_rows[2]:
            raise _NotHeadsError("query heads that share a key head lie apart")
        q_rows = (q_rows[0], q_rows[1] * each, q_rows[2] * each)
    query, key, value = maps
    attention.heads = Heads(
        attention.call.frame.name or "",
        query,
        key,
        value,
        k_rows[2],
        v_rows[2],
        each,
        packed,
        q_rows,
        k_rows,
        v_rows,
    )


def _made_by(graph: Graph, attention: Attention, value: Value) -> tuple[Unit, tuple[HeadRows, int, list[int]]]:
    """The map that makes a query, key or value, and (rows of its first head, number of heads, order of use)."""
    before: dict[Value, Value] = {}
    cone: set[Step] = set()
    maps: list[Unit] = []
    waiting, last = [value], None
    while waiting and len(cone) < MOST_CALLS:
        current = waiting.pop(0)
        step = graph.source(current)
        if step is None or step in cone:
            continue
        cone.add(step)
        if isinstance(step, Unit) and step.kind == "map":
            maps.append(step)
            last = current if last is None else last
            continue
        for source in [step.source] if isinstance(step, Unit) else step.inputs:
            if source.fed and source.elements > 1 and source not in before and source is not value:
                before[source] = current
                waiting.append(source)
        if graph.is_map(step):
            raise _NotHeadsError(f"the weights of {graph.title(step)} are used without calling their module")
    if len(maps) != 1 or last is None:
        raise _NotHeadsError(f"what the attention reads is made by {len(maps)} linear maps, not by one")
    unit = maps[0]
    inside = cone | set(attention.inside)
    for step in cone:
        for made in [step.result] if isinstance(step, Unit) else step.outputs:
            _check_readers(graph, attention, made, inside)
    path = [last]
    while path[-1] is not value:
        path.append(before[path[-1]])
    rows, count = _rows(graph, unit, value, {*before, value}, cone)
    return unit, (rows, count, _order(graph, unit, path, rows))


def _check_readers(graph: Graph, attention: Attention, value: Value, inside: set[Step]) -> None:
    """Only the attention may read what a map made for it (or another part of the same packed tensor)."""
    reach, waiting = 0, [reader for reader in graph.readers(value) if reader not in inside]
    seen: set[Step] = set()
    allowed = {attention.query, attention.key, attention.value}
    while waiting:
        step = waiting.pop()
        reach += 1
        if step in seen or not (isinstance(step, Unit) or step.outputs):
            continue
        seen.add(step)
        if (isinstance(step, Unit) and step.kind == "map") or reach > MOST_CALLS:
            raise _NotHeadsError(f"what a head is made of is also read by {graph.title(step)}")
        if isinstance(step, Call) and step in attention.inside:
            continue
        for made in [step.result] if isinstance(step, Unit) else step.outputs:
            if made not in allowed:
                waiting += graph.readers(made)


def _rows(graph: Graph, unit: Unit, target: Value, way: set[Value], cone: set[Step]) -> tuple[HeadRows, int]:
    """The rows of the heads that a query, key or value has, and how many heads.

    Numbers of the map's rows go forward through all that only rearranges them; together, those that arrive where
    something is computed are the rows.
    """
    arrived: list[tuple[Tensor, Step | None]] = []
    waiting = [(unit.result, torch.arange(unit.result.shape[-1], dtype=torch.int32).expand(unit.result.shape))]
    while waiting:
        value, numbers = waiting.pop()
        if value is target:
            arrived.append((numbers, None))
        for step in graph.readers(value):
            if step not in cone or not isinstance(step, Call):
                arrived += [(numbers, step)] if step in cone else []
            elif step.name in _REARRANGED:
                waiting += [(made, _replayed(step, value, made, numbers)) for made in step.outputs if made in way]
            elif step.name in UNCHANGED | DROPOUT or _is_scale(step, value):
                waiting.append((step.outputs[0], numbers))
            elif step.outputs:
                arrived.append((numbers, step))
    found = [_divided(graph, numbers, step, target.shape[-1]) for numbers, step in arrived]
    own = sorted(set[int]().union(*(first for _, _, first in found)))
    if len(own) != target.shape[-1]:
        met = next((f" ({graph.title(step)})" for _, step in arrived if step is not None), "")
        raise _NotHeadsError(f"its channels are not divided into several heads before something else reads them{met}")
    if len({(apart, count) for apart, count, _ in found}) != 1 or own != list(range(own[0], own[0] + len(own))):
        raise _NotHeadsError("the channels of a head do not lie side by side")
    apart, count, _ = found[0]
    return (own[0], apart, len(own)), count


def _order(graph: Graph, unit: Unit, path: Sequence[Value], rows: HeadRows) -> list[int]:
    """Which of a map's heads an attention reads in each place: numbers of heads go along one path."""
    numbers = torch.arange(unit.result.shape[-1], dtype=torch.int32).expand(unit.result.shape)
    divided = False
    for value, following in pairwise(path):
        step = graph.source(following)
        if isinstance(step, Call) and step.name in _REARRANGED:
            numbers = _replayed(step, value, following, numbers)
        elif not divided and not (
            isinstance(step, Call) and (step.name in UNCHANGED | DROPOUT or _is_scale(step, value))
        ):
            numbers, divided = (numbers - rows[0]) // max(1, rows[1]), True
        if divided and numbers.shape[:-1] == following.shape[:-1]:
            # Within a head anything may happen (rotary embeddings, norms); only the heads are followed.
            numbers = numbers[..., :1].expand(following.shape)
        if tuple(numbers.shape) != following.shape:
            raise _NotHeadsError(f"{graph.title(step) if step is not None else 'a step'} changes the shape of a head")
    numbers = numbers if divided else (numbers - rows[0]) // max(1, rows[1])
    if numbers.dim() not in (3, 4):
        raise _NotHeadsError("the attention runs over other than three or four dimensions")
    numbers = numbers if rows[1] else torch.zeros_like(numbers)
    line = numbers[..., 0, 0] if numbers.dim() == 3 else numbers[0, :, 0, 0]
    if not bool((numbers == line.reshape(-1, 1, 1)).all()):
        raise _NotHeadsError("the heads are not in the attention's third dimension from the end")
    return [int(number) for number in line]


def _is_scale(call: Call, value: Value) -> bool:
    """Whether a call multiplies or shifts by a number."""
    return is_pointwise(call) and moving(call) == [value] and call.outputs[0].shape == value.shape


def _replayed(call: Call, value: Value, following: Value, numbers: Tensor) -> Tensor:
    """What a rearranging call does to the numbers."""

    def given(item: Any) -> Any:
        if item is value:
            return numbers
        if isinstance(item, Value):
            raise _NotHeadsError(f"`{call.name}` rearranges a head by another tensor")
        return item

    if call.name == "view":  # where the tensor itself allowed it, this only saves a copy
        numbers = numbers.contiguous()
    args, kwargs = tree_map(given, (call.args, dict(call.kwargs)), is_leaf=lambda item: isinstance(item, Value))
    try:
        with torch.no_grad():
            result = call.function(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise _NotHeadsError(f"`{call.name}` cannot be followed: {error}") from error
    parts = [result] if isinstance(result, Tensor) else list(result)
    chosen: Tensor = parts[call.outputs.index(following)]
    return chosen


def _divided(graph: Graph, numbers: Tensor, step: Step | None, features: int) -> tuple[int, int, set[int]]:
    """How far heads are apart, how many there are, and the numbers in the first; they vary along two axes at most."""
    varying = [
        axis
        for axis, size in enumerate(numbers.shape)
        if size > 1 and bool((numbers.narrow(axis, 0, 1) != numbers.narrow(axis, 1, 1)).any())
    ]
    if len(varying) not in (1, 2):
        met = f" ({graph.title(step)})" if step is not None else ""
        raise _NotHeadsError(f"its channels are not divided into several heads before something else reads them{met}")
    first = numbers[(0,) * numbers.dim()]
    apart = {axis: int(numbers.select(axis, 1)[(0,) * (numbers.dim() - 1)] - first) for axis in varying}
    heads = max(varying, key=lambda axis: apart[axis])
    if len(varying) == 1 and apart[heads] < features:  # the channels of a single head
        return 0, 1, set(numbers.flatten().tolist())
    return apart[heads], numbers.shape[heads], set(numbers.select(heads, 0).flatten().tolist())


def _read_by(graph: Graph, attention: Attention) -> Unit:
    """The one linear map that reads the result, its columns head by head."""
    value = attention.result
    shape = value.shape
    if len(shape) not in (3, 4):
        raise _NotHeadsError("the attention runs over other than three or four dimensions")
    heads, features = shape[-3], shape[-1]
    numbers = torch.arange(heads * features, dtype=torch.int32).reshape(heads, 1, features).expand(shape)
    for _ in range(MOST_CALLS):
        readers = [r for r in graph.readers(value) if isinstance(r, Unit) or r.outputs]
        if value.output:
            raise _NotHeadsError("the result of its attention is an output of the model")
        if len(readers) != 1:
            raise _NotHeadsError(f"{len(readers)} steps read the result of its attention")
        (step,) = readers
        if isinstance(step, Unit):
            if step.kind == "norm":
                raise _NotHeadsError(f"the norm {graph.title(step)} stands before the output projection")
            line = numbers.reshape(-1, numbers.shape[-1])[0]
            if not torch.equal(line, torch.arange(len(line), dtype=torch.int32)):
                raise _NotHeadsError("the columns of the output projection are not ordered head by head")
            return step
        following = step.outputs[0]
        if step.name in _REARRANGED:
            numbers = _replayed(step, value, following, numbers)
        elif not (step.name in UNCHANGED | DROPOUT or _is_scale(step, value)):
            raise _NotHeadsError(f"{graph.title(step)} stands before the output projection")
        value = following
    raise _NotHeadsError("its output projection was not found")


def _group_problem(graph: Graph, group: Sequence[Attention]) -> str:
    """Why the executions of an attention together are no site."""
    if any(a.heads is None or a.heads.query_rows != group[0].heads.query_rows for a in group if group[0].heads):
        return "its heads differ from call to call"
    for i, unit in enumerate(group[0].units):
        frames = {a.units[i].frame for a in group}
        if any(frame not in frames for frame in graph.frames[unit.module]):
            return f"{graph.names[unit.module][0]} is also called outside of this attention"
    return ""


def _site(graph: Graph, name: str, group: Sequence[Attention], heads: Heads) -> Site:
    maps = [graph.linear_map([a.units[i] for a in group]) for i in range(4)]
    width = maps[3].d_in // heads.block
    products = sum(_scores(attention) for attention in group) * (heads.head_dim + heads.value_dim)
    described = replace(heads, query=maps[0], key=maps[1], value=maps[2], products=products // width)
    return Site(
        name=name,
        kind="heads",
        width=width,
        producer=None,
        consumers=(maps[3],),
        activation=None,
        calls=len(group),
        not_linear="attention heads have no activation to take away",
        heads=described,
    )


def _scores(attention: Attention) -> int:
    """How many scores of a query and a key an attention computes, over all heads and the batch."""
    softmax = next((call for call in attention.inside if call.name == "softmax"), None)
    if softmax is not None:
        return softmax.outputs[0].elements
    query, key = attention.query, attention.key
    return query.elements // query.shape[-1] * key.shape[-2]

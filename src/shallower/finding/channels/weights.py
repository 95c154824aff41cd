"""How a parameter is used as the weight of linear maps: which of its axes are rows, which columns, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from torch import nn
from torch.utils._pytree import tree_leaves

from shallower.finding.channels.einsums import einsum_terms
from shallower.recording.tracing import Call, Value

Side = Literal["", "rows", "columns"]

ROWS_FIRST = {"linear", "conv1d", "conv2d", "conv3d", "bilinear"}
"""Maps whose weight is (outputs, inputs, ...)."""

COLUMNS_FIRST = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
"""Maps whose weight is (inputs, outputs, ...)."""

PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "grouped_mm"}
"""Maps whose weight is (..., inputs, outputs), where it is the second factor."""

RECURRENT = {
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
}  # fmt: skip
"""Layers whose weights are (outputs, inputs), each behind the input and the state."""

ATTENTION = "multi_head_attention_forward"
"""A layer whose weights are (outputs, inputs), among its many arguments."""

TURNING = {"t", "get.T", "get.mT", "transpose", "swapaxes", "swapdims", "adjoint"}

MOST_STEPS = 200


@dataclass
class WeightUse:
    """The linear maps of which a parameter is the weight.

    Attributes:
        dims: axes of the parameter.
        calls: in order of execution.
        multiplied: how often each number is multiplied in all of them together.
        output: dimension of its module's output that holds the rows; 0 where the module is no plain linear layer.
        sides: what each axis is, where an einsum says it.
        turned: whether the maps read the parameter transposed.
        shared_out: whether rows are shared out among the matrices of a stack, experts, each of which reads only its
            own; `multiplied` is then that of all of them together.
    """

    dims: int
    calls: list[Call] = field(default_factory=list)
    multiplied: int = 0
    output: Literal[-1, 0, 1] = 0
    turned: bool = False
    shared_out: bool = False
    sides: tuple[Side, ...] = ()

    def side(self, axis: int) -> Side:
        """What an axis of the parameter is in these maps."""
        if not self.calls or self.dims < 2:
            return ""
        name = self.calls[0].name
        if name == "einsum":
            return self.sides[axis] if self.sides else ""
        rows, columns = 0, 1
        if name in COLUMNS_FIRST:
            rows, columns = 1, 0
        elif name in PRODUCTS:
            rows, columns = self.dims - 1, self.dims - 2
        elif name == "linear":
            rows, columns = self.dims - 2, self.dims - 1
        if self.turned and (self.dims == 2 or name in PRODUCTS or name == "linear"):
            rows, columns = columns, rows
        if axis == rows:
            return "rows"
        return "columns" if axis == columns else ""


def uses_of(weight: Value) -> WeightUse:
    """The linear maps that read a parameter, as it is or as something computed from it alone."""
    use = WeightUse(len(weight.shape))
    if len(weight.shape) < 2:
        return use
    waiting, seen = [(weight, False, 1)], {weight}
    picked: set[Value] = set()
    while waiting and len(seen) < MOST_STEPS:
        value, turned, counts = waiting.pop(0)
        for call in value.readers:
            if not call.outputs or call in use.calls:
                continue
            if _is_weight_of(value, call):
                use.calls.append(call)
                use.shared_out |= value in picked or (call.name == "grouped_mm" and len(call.inputs[0].shape) == 2)
                times = counts * _times_in(value, call) * value.elements
                if use.shared_out:
                    times *= weight.shape[0]
                use.multiplied += times // max(1, weight.elements)
                use.output = _output_dim(weight, call)
                use.turned = turned != _is_first_factor(value, call)
                if call.name == "einsum" and value is weight:
                    use.sides = tuple(_sides_in_einsum(value, call))
            elif _picks(value, call):
                picked.update(call.outputs)
                waiting += [(made, turned, counts) for made in call.outputs if made not in seen]
                seen.update(call.outputs)
            elif not call.outputs[0].fed or value in picked:
                if value in picked:
                    picked.update(call.outputs)
                if any(other.elements > value.elements for other in call.inputs):
                    counts = 0  # a scale of the weight: the products are the larger one's
                turned_now = turned != (call.name in TURNING)
                waiting += [(made, turned_now, counts) for made in call.outputs if made not in seen]
                seen.update(call.outputs)
    return use


def _is_weight_of(value: Value, call: Call) -> bool:
    if call.name in ROWS_FIRST | COLUMNS_FIRST:
        return len(call.inputs) > 1 and call.inputs[1] is value
    if call.name == ATTENTION:
        return len(value.shape) == 2 and value not in call.args[:3]
    if call.name in RECURRENT:
        return value in tree_leaves(call.args[2:])
    if call.name == "einsum":
        return isinstance(call.args[0], str) and not value.fed and any(other.fed for other in call.inputs)
    if call.name in PRODUCTS and value in call.inputs[1:] and value is not call.inputs[0]:
        return len(value.shape) > 1
    return _is_first_factor(value, call) and len(value.shape) > 2


def _is_first_factor(value: Value, call: Call) -> bool:
    """Whether a weight stands before what it is multiplied with, (outputs, inputs) like that of a linear layer."""
    return call.name in ("matmul", "bmm") and value is call.inputs[0] and call.inputs[-1].fed


def _sides_in_einsum(weight: Value, call: Call) -> Iterator[Side]:
    """Rows are what only the weight has and passes on, columns what others have, too, and is added up."""
    terms, made = einsum_terms(call)
    others: list[str] = []
    for value, letters in terms:
        if value is not weight:
            others += letters
    (own,) = [letters for value, letters in terms if value is weight][:1]
    for letter in own:
        side: Side = ""
        if letter in made and letter not in others:
            side = "rows"
        elif letter in others and letter not in made:
            side = "columns"
        yield side


def is_picked(value: Value) -> bool:
    """Whether a value is positions of a parameter, picked by numbers that depend on the inputs."""
    return value.call is not None and value.call.name == "getitem" and value.fed and not value.call.inputs[0].fed


def _picks(value: Value, call: Call) -> bool:
    """Whether a call takes matrices of a stack by numbers that depend on the inputs: those of a token's experts."""
    if call.name not in ("getitem", "index_select") or value is not call.inputs[0] or len(value.shape) < 3:
        return False
    return len(call.inputs) == 2 and call.inputs[1].fed and call.outputs[0].shape[-2:] == value.shape[-2:]


def _times_in(weight: Value, call: Call) -> int:
    """How often a call multiplies each number of its weight."""
    if call.name in COLUMNS_FIRST:
        return call.inputs[0].elements // weight.shape[0]
    if call.name == "einsum":
        sizes: dict[str, int] = {}
        for value, letters in einsum_terms(call)[0]:
            sizes |= dict(zip(letters, value.shape, strict=True))
        return prod(sizes.values()) // weight.elements
    if call.name == ATTENTION:
        return _attended(weight, call)
    if call.name in RECURRENT:
        return call.inputs[0].elements // call.inputs[0].shape[-1]
    if call.name in PRODUCTS:
        batch = 1
        for size in weight.shape[:-2]:
            batch *= size
        rows = -1
        if _is_first_factor(weight, call):
            rows = -2
        return call.outputs[0].elements // (batch * weight.shape[rows])
    return call.outputs[0].elements // weight.shape[0]


def _attended(weight: Value, call: Call) -> int:
    """How many positions a weight of attention is multiplied with; the packed one for queries, keys and values."""
    positions: list[int] = [source.elements // source.shape[-1] for source in call.args[:3]]
    if weight is call.args[5]:
        return sum(positions) // 3
    if weight is call.kwargs.get("k_proj_weight"):
        return positions[1]
    return positions[2] if weight is call.kwargs.get("v_proj_weight") else positions[0]


def attended_products(call: Call) -> int:
    """The MACs of both products of queries, keys and values in a layer of attention."""
    query, key = call.args[:2]
    keys = key.shape[0] + (call.args[7] is not None) + bool(call.args[9])
    width = call.args[11].shape[1]
    return int(2 * query.elements // query.shape[-1] * keys * width)


def _output_dim(weight: Value, call: Call) -> Literal[-1, 0, 1]:
    """Where the rows are in what the module gives whose own weight this is and that does nothing else."""
    module = call.frame.module
    if weight.name != f"{call.frame.name}.weight".lstrip(".") or call.frame.outputs != call.outputs:
        return 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1 if len(call.outputs[0].shape) == len(weight.shape) else 0
    return -1 if call.name == "linear" else 0

"""Recurrent layers: the channels of the state are those of all gates.

nn.LSTM(8, 16)(x)           # rows (4 gates, 16) of both weights, the columns of one; the next layer reads 16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import Layout, cat, close, fixed, tie, within
from shallower.finding.channels.rules.arguments import given, integer, optional, tensor, values
from shallower.recording.tracing import Call, Value

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
STEPS = "steps of a recurrent layer"
LAYERS = "layers of a recurrent network"


def _gates(call: Call) -> int:
    return GATES[call.name.split("_")[0]]


@rule("lstm gru rnn_tanh rnn_relu")
def layers(f: Following, call: Call) -> list[Axes]:
    """Several layers, in one direction or in both; (steps, batch, channels), the batch in front, or packed."""
    packed = not isinstance(given(call, 3), bool)
    axes = f.axes(tensor(call, 0))
    weights, biases, count = values(call, 2 + packed), bool(call.args[3 + packed]), integer(call, 4 + packed, "layers")
    directions = 1 + bool(call.args[7 + packed])
    each = len(weights) // (count * directions)
    if each not in (2 + 2 * biases, 3 + 2 * biases):
        raise UnknownUseError
    batch = _batch(call, axes, packed)
    groups = [weights[i : i + each] for i in range(0, len(weights), each)]
    cells: list[_Cell] = []
    features = axes[-1]
    for i in range(0, len(groups), directions):
        made = [_cell(f, call, features, own, biases) for own in groups[i : i + directions]]
        cells += made
        features = cat([cell.given for cell in made])
    _tie_states(f, given(call, 1 + packed), batch, cells)
    ends: list[Axes] = []
    for value, state in zip(call.outputs[1:], (cells[0].given, cells[0].kept), strict=False):
        ends.append([fixed(value.shape[0], LAYERS), batch, state])
    return [[*axes[:-1], features], *ends]


@dataclass(frozen=True)
class _Cell:
    """One layer in one direction.

    Attributes:
        kept: the channels of its cell, one for each gate of a kind.
        given: what it gives and reads again: the same, or a projection of them.
    """

    kept: Layout
    given: Layout


def _batch(call: Call, axes: Axes, packed: bool) -> Layout:
    """The rows of the batch; those of packed sequences are in one axis with the steps."""
    if packed:
        close(axes[0], STEPS)
        return fixed(call.outputs[1].shape[1], STEPS)
    close(axes[bool(call.args[8])], STEPS)
    return axes[not call.args[8]]


def _cell(f: Following, call: Call, features: Layout, weights: list[Value], biases: bool) -> _Cell:
    """The channels of one layer in one direction; weights of the input, of the state, biases, a projection."""
    rows, columns = f.axes(weights[0])
    state_rows, state = f.axes(weights[1])
    f.contract(call, features, columns)
    kept = state
    if len(weights) > 2 + 2 * biases:
        made, kept = f.axes(weights[-1])
        tie(state, made)
        f.contracted.append((kept, call))
    gates = within([fixed(_gates(call), "gates of a recurrent layer"), kept])
    for own in (rows, state_rows, *(f.axes(bias)[0] for bias in weights[2 : 2 + 2 * biases])):
        tie(gates, own)
    f.written.append((kept, call))
    f.contracted.append((state, call))
    return _Cell(kept, state)


def _tie_states(f: Following, given_states: Any, batch: Layout, cells: list[_Cell]) -> None:
    """All layers and directions start from one tensor, so that they have one width."""
    starts = given_states if isinstance(given_states, (tuple, list)) else [given_states]
    for i, start in enumerate(starts):
        numbers, rows, channels = f.axes(start)
        close(numbers, LAYERS)
        tie(rows, batch)
        for cell in cells:
            tie(channels, cell.kept if i else cell.given)


@rule("pack_padded_sequence")
def packing(f: Following, call: Call) -> list[Axes]:
    """(steps, batch, channels) -> (steps of all, channels), and how many of the batch are left at each step."""
    *positions, features = f.axes(tensor(call, 0))
    for axis in positions[:2]:
        close(axis, STEPS)
    return _only_last(call, features)


@rule("pad_packed_sequence")
def unpacking(f: Following, call: Call) -> list[Axes]:
    """(steps of all, channels) -> (steps, batch, channels), and how long each is."""
    steps, *_, features = f.axes(tensor(call, 0))
    close(steps, STEPS)
    return _only_last(call, features)


def _only_last(call: Call, features: Layout) -> list[Axes]:
    found: list[Axes] = []
    for value in call.outputs:
        found.append([fixed(size, STEPS) for size in value.shape])
    found[0][-1] = features
    return found


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(f: Following, call: Call) -> list[Axes]:
    """One step of one layer."""
    axes = f.axes(tensor(call, 0, "input"))
    weights = [tensor(call, 2, "w_ih"), tensor(call, 3, "w_hh")]
    for place, name in ((4, "b_ih"), (5, "b_hh")):
        bias = optional(call, place, name)
        if bias is not None:
            weights.append(bias)
    state = _cell(f, call, axes[-1], weights, biases=len(weights) > 2).kept
    given_states = given(call, 1, "hx")
    for start in given_states if isinstance(given_states, (tuple, list)) else [given_states]:
        f.broadcast([*axes[:-1], state], f.axes(start))
    return [[*axes[:-1], state] for _ in call.outputs]

"""Recurrent layers: the channels of the state are those of all gates.

nn.LSTM(8, 16)(x)           # rows (4 gates, 16) of both weights, the columns of one; the next layer reads 16
"""

from __future__ import annotations

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
    """Several layers, in one direction or in both; (steps, batch, channels) or the batch in front."""
    if isinstance(given(call, 2), Value):
        raise UnknownUseError(f"{f.title(call)} reads packed sequences, which are not followed yet")
    axes = f.axes(tensor(call, 0))
    weights, biases, count = values(call, 2), bool(call.args[3]), integer(call, 4, "num_layers")
    directions = 1 + bool(call.args[7])
    each = len(weights) // (count * directions)
    if each != 2 + 2 * biases:
        raise UnknownUseError(f"{f.title(call)} projects its state, which is not followed yet")
    close(axes[bool(call.args[8])], STEPS)
    states: list[Layout] = []
    features = axes[-1]
    for i in range(count):
        made: list[Layout] = []
        for j in range(directions):
            first = (i * directions + j) * each
            made.append(_cell(f, call, features, weights[first : first + each]))
        states += made
        features = cat(made)
    _tie_states(f, call, axes[not call.args[8]], states)
    return [[*axes[:-1], features], *(_state(value, axes, call, states) for value in call.outputs[1:])]


def _cell(f: Following, call: Call, features: Layout, weights: list[Value]) -> Layout:
    """The channels of one layer in one direction."""
    rows, columns = f.axes(weights[0])
    state_rows, state = f.axes(weights[1])
    f.contract(call, features, columns)
    gates = within([fixed(_gates(call), "gates of a recurrent layer"), state])
    for made in (rows, state_rows, *(f.axes(bias)[0] for bias in weights[2:])):
        tie(gates, made)
    f.written.append((state, call))
    f.contracted.append((state, call))
    return state


def _tie_states(f: Following, call: Call, batch: Layout, states: list[Layout]) -> None:
    """All layers and directions start from one tensor, so that they have one width."""
    given_states = given(call, 1)
    for start in given_states if isinstance(given_states, (tuple, list)) else [given_states]:
        if isinstance(start, Value):
            numbers, rows, channels = f.axes(start)
            close(numbers, LAYERS)
            tie(rows, batch)
            for state in states:
                tie(channels, state)


def _state(value: Value, axes: Axes, call: Call, states: list[Layout]) -> Axes:
    """(layers, batch, channels) at the end."""
    return [fixed(value.shape[0], LAYERS), axes[not call.args[8]], states[0]]


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def cell(f: Following, call: Call) -> list[Axes]:
    """One step of one layer."""
    axes = f.axes(tensor(call, 0, "input"))
    weights = [tensor(call, 2, "w_ih"), tensor(call, 3, "w_hh")]
    for place, name in ((4, "b_ih"), (5, "b_hh")):
        bias = optional(call, place, name)
        if bias is not None:
            weights.append(bias)
    state = _cell(f, call, axes[-1], weights)
    given_states = given(call, 1, "hx")
    for start in given_states if isinstance(given_states, (tuple, list)) else [given_states]:
        f.broadcast([*axes[:-1], state], f.axes(start))
    return [[*axes[:-1], state] for _ in call.outputs]

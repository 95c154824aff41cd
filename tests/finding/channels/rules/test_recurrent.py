"""Recurrent layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import runs
from shallower.recording.tracing import trace_forward
from tests.finding.channels.commuting import Usage


def lstm(x, i, h, b, c):
    """One layer, the batch in front, from zeros."""
    start = torch.zeros(1, x.shape[0], h.shape[1], dtype=x.dtype)
    return torch.lstm(x, (start, start), [i, h, b, c], True, 1, 0.0, False, False, True)


def gru(x, s, i, h, j, k):
    """Two layers without biases from a given state."""
    return torch.gru(x, s, [i, h, j, k], False, 2, 0.0, False, False, False)


def both_ways(x, s, i, h, j, k):
    """One layer in two directions."""
    return torch.rnn_tanh(x, s, [i, h, j, k], False, 1, 0.0, False, True, False)[0]


def step(x, s, c, i, h, b, d):
    """One step of an LSTM."""
    return torch.lstm_cell(x, (s, c), i, h, b, d)


def projected(x, s, c, i, h, p):
    """One layer whose state is projected."""
    return torch.lstm(x, (s, c), [i, h, p], False, 1, 0.0, False, False, False)


def packed(x, i, h, b, c):
    """Sequences of several lengths."""
    lengths = torch.tensor([4, 2])
    start = torch.zeros(1, 2, h.shape[1], dtype=x.dtype)
    data, sizes = torch._VF._pack_padded_sequence(x, lengths, True)
    data, _, _ = torch._VF.lstm(data, sizes, (start, start), [i, h, b, c], True, 1, 0.0, False, False)
    return torch._VF._pad_packed_sequence(data, sizes, True, 0.0, 4)[0]


USAGES = [
    Usage("lstm", lstm, "x:2,4,3 i:20,3 h:20,5 b:20 c:20", "x0|x2 i1|i0 h0 h1 b0 c0"),
    Usage("gru", gru, "x:4,2,3 s:2,2,5 i:15,3 h:15,5 j:15,5 k:15,5", "x1 s1|x2 i1|s2 i0 h0 h1 j0 j1 k0 k1"),
    Usage("both ways", both_ways, "x:4,2,3 s:2,2,5 i:5,3 h:5,5 j:5,3 k:5,5", "x1 s1|x2 i1 j1|s2 i0 h0 h1 j0 k0 k1"),
    Usage(
        "a projected state",
        projected,
        "x:4,2,3 s:1,2,2 c:1,2,5 i:20,3 h:20,2 p:2,5",
        "x1 s1 c1|x2 i1|s2 h1 p0|c2 i0 h0 p1",
    ),
    Usage("several lengths", packed, "x:2,4,3 i:20,3 h:20,5 b:20 c:20", "x2 i1|i0 h0 h1 b0 c0"),
    Usage(
        "a step of an lstm", step, "x:2,3 s:2,5 c:2,5 i:20,3 h:20,5 b:20 d:20", "x0 s0 c0|x1 i1|s1 c1 i0 h0 h1 b0 d0"
    ),
    Usage(
        "a step of a gru",
        lambda x, s, i, h: torch.gru_cell(x, s, i, h),
        "x:2,3 s:2,5 i:15,3 h:15,5",
        "x0 s0|x1 i1|s1 i0 h0 h1",
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()


class Tagger(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, rnn, width):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"num_layers": 2, "batch_first": True, "bias": False}]
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_reads_a_layer_goes_with_its_state(kind, options):
    net = Tagger(kind(3, 5, **options), 10 if options.get("bidirectional") else 5)
    f = Following(trace_forward(net, (torch.rand(4, 2, 3),)))
    columns, state = f.axes(f.trace.weights[net.head, "weight"])[1], f.axes(f.trace.weights[net.rnn, "weight_hh_l0"])[1]
    assert not state.closed
    assert set(runs(columns)) == {state}


class Packed(nn.Module):
    """Sequences of several lengths, the longest in the middle."""

    def __init__(self):
        super().__init__()
        self.stem, self.rnn, self.head = nn.Linear(3, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        x = pack_padded_sequence(self.stem(x), torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(x)[0], batch_first=True)[0])


def test_packed_sequences_pass_on_their_channels():
    net = Packed()
    f = Following(trace_forward(net, (torch.rand(3, 4, 3),)))
    state, read = f.axes(f.trace.weights[net.rnn, "weight_hh_l0"])[1], f.axes(f.trace.weights[net.head, "weight"])[1]
    assert state is read
    assert not state.closed
    made, columns = f.axes(f.trace.weights[net.stem, "weight"])[0], f.axes(f.trace.weights[net.rnn, "weight_ih_l0"])[1]
    assert made is columns
    assert not made.closed

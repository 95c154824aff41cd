"""Random functions of random operations: whatever is open can be cut, and nothing else changes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage, followed, tensors_of

UNARY = {
    "relu": F.relu,
    "turn": lambda x: x.transpose(0, 1),
    "first half": lambda x: x.chunk(2, -1)[0],
    "gated": lambda x: F.glu(x, -1),
    "shuffle": lambda x, groups=2: x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2),
    "twice": lambda x: x.repeat_interleave(2, 1),
    "turned halves": lambda x: torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1),
    "soft": lambda x: x * x.sum(1, keepdim=True).softmax(0),
    "neighbours": lambda x: torch.stack([x, 2 * x], -1).flatten(1),
    "longest": lambda x: F.normalize(x, dim=-1),
    "pad": lambda x: F.pad(x.unsqueeze(0), (1, 1), mode="replicate").squeeze(0),
    "no last": lambda x: x[:, :-1],
}
BINARY = {
    "beside": lambda x, y: torch.cat([x, y], 1),
    "below": lambda x, y: torch.cat([x, y], 0),
    "product": lambda x, y: x @ y,
    "against": lambda x, y: x @ y.T,
    "sum": lambda x, y: x + y,
    "gate": lambda x, y: x * y.sigmoid(),
    "larger": lambda x, y: torch.maximum(x, y),
}


@st.composite
def programs(draw):
    """Steps that run on two matrices of random size."""
    shapes = [draw(st.sampled_from([(4, 6), (6, 4), (6, 6), (4, 4), (6, 12), (12, 6)])) for _ in range(3)]
    tensors = [torch.rand(shape) for shape in shapes]
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        name = draw(st.sampled_from([*UNARY, *BINARY]))
        if name == "shuffle" and any(step == "shuffle" for step, _ in steps):
            continue
        places = [draw(st.integers(0, len(tensors) - 1)) for _ in range(1 + (name in BINARY))]
        if name in ("sum", "gate", "larger") and tensors[places[0]].shape != tensors[places[1]].shape:
            continue  # a number that is added to all channels is added to one that was zero, too
        try:
            tensors.append((UNARY | BINARY)[name](*(tensors[place] for place in places)))
        except (RuntimeError, IndexError):
            continue
        steps.append((name, places))
    return shapes, steps


@settings(max_examples=60, deadline=None)
@given(programs())
def test_what_is_open_can_be_cut(program):
    shapes, steps = program

    def function(x, y, z, groups=2):
        tensors = [x, y, z]
        for name, places in steps:
            options = {"groups": groups} if name == "shuffle" else {}
            tensors.append((UNARY | BINARY)[name](*(tensors[place] for place in places), **options))
        return tuple(tensors[3:])

    text = " ".join(f"{name}:{rows},{columns}" for name, (rows, columns) in zip("xyz", shapes, strict=True))
    found = followed(function, tensors_of(text))
    Usage("random", function, text, "|".join(found.open_runs().values())).check()

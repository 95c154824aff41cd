"""Reshapes, permutations and repetitions."""

import pytest
import torch

from tests.finding.channels.commuting import Usage

USAGES = [
    Usage("heads", lambda x, h=2, d=3: x.view(x.shape[0], h, d), "x:5,6", "x0|x1|x1"),
    Usage("heads, what is left", lambda x, h=2: x.view(x.shape[0], h, -1), "x:5,6", "x0|x1|x1"),
    Usage("heads and back", lambda x, h=2: x.view(x.shape[0], h, -1).transpose(0, 1).flatten(1), "x:5,6", "x0|x1|x1"),
    Usage("flat", lambda x: x.flatten(1), "x:2,6,3,3", "x0|x1|x2|x3"),
    Usage("all flat", lambda x: x.ravel(), "x:4,6", "x0|x1"),
    Usage("divided", lambda x, h=2: x.unflatten(1, (h, -1)), "x:5,6", "x0|x1|x1"),
    Usage("the shape of another", lambda x, y: x.flatten(0, 1).reshape_as(y), "x:2,3,4 y:2,3,4", "x0 y0|x1 y1|x2 y2"),
    Usage(
        "tokens to an image",
        lambda x, s=2, t=2: x.transpose(1, 2).reshape(x.shape[0], -1, s, t),
        "x:3,4,5",
        "x0|x1|x1|x2",
    ),
    Usage("an image to tokens", lambda x: x.flatten(2).transpose(1, 2), "x:3,5,2,2", "x0|x1|x2|x3"),
    Usage("mixed with each other", lambda x: x.reshape(4, 6), "x:6,4", ""),
    Usage("divided twice", lambda x, a=2, b=3: (x.view(a, -1), x.view(-1, b)), "x:12", "x0|x0|x0"),
    Usage("no position", lambda x: x.reshape(0, 3), "x:0,6", "x1"),
    Usage("axes of one position", lambda x: x.unsqueeze(0).unsqueeze(-1).squeeze(0).squeeze(), "x:3,6", "x0|x1"),
    Usage("permute", lambda x: x.permute(0, 2, 1), "x:2,3,6", "x0|x1|x2"),
    Usage("permute by a list", lambda x: torch.permute(x, [2, 0, 1]), "x:2,3,6", "x0|x1|x2"),
    Usage("permute from the end", lambda x: x.permute(0, -1, 1), "x:2,3,6", "x0|x1|x2"),
    Usage("transpose", lambda x: x.transpose(-1, 1), "x:2,3,6", "x0|x1|x2"),
    Usage("swapaxes", lambda x: torch.swapaxes(x, axis0=0, axis1=1), "x:2,3,6", "x0|x1|x2"),
    Usage("T and mT", lambda x: x.T + x.mT + x.t(), "x:2,6", "x0|x1"),
    Usage("movedim", lambda x: x.movedim(1, -1), "x:2,6,3,4", "x0|x1|x2|x3"),
    Usage("moveaxis", lambda x: torch.moveaxis(x, (0, 1), (2, 0)), "x:2,6,3,4", "x0|x1|x2|x3"),
    Usage("expand", lambda x, n=4: x.expand(n, -1, -1), "x:1,3,6", "x1|x2|out0"),
    Usage("expand_as", lambda x, y: x.expand_as(y), "x:1,6 y:3,6", "x1 y1|y0"),
    Usage("broadcast_to", lambda x, n=3: x.broadcast_to(n, *x.shape), "x:2,6", "x0|x1|out0"),
    Usage("broadcast_tensors", lambda x, y: torch.broadcast_tensors(x, y), "x:3,1 y:6", "x0|y0"),
    Usage("repeat", lambda x, n=3, m=2: x.repeat(n, 1, m), "x:1,2,6", "x1|x2|out0|out2"),
    Usage("tile", lambda x, n=2: torch.tile(x, (n,)), "x:2,6", "x0|x1|out1"),
    Usage("repeat_interleave", lambda x: x.repeat_interleave(2, dim=1), "x:3,6", "x0|x1"),
    Usage(
        "key heads for query heads", lambda k: torch.repeat_interleave(k, repeats=3, dim=1), "k:2,4,3,5", "k0|k1|k2|k3"
    ),
    Usage(
        "grouped queries by expand",
        lambda k, q, n=2: q * k[:, :, None].expand(-1, -1, n, -1).flatten(1, 2),
        "k:3,4,5 q:3,8,5",
        "k0 q0|k1 q1|k2 q2|q1",
    ),
    Usage("flip", lambda x: x.flip(1), "x:2,6,3", "x0|x2"),
    Usage("fliplr", lambda x: torch.fliplr(x), "x:2,6,3", "x0|x2"),
    Usage("roll", lambda x: torch.roll(x, 1, 2), "x:2,6,3", "x0|x1"),
    Usage("roll by keywords", lambda x: torch.roll(x, shifts=(1, 1), dims=(0, 2)), "x:2,6,3", "x1"),
    Usage("rot90", lambda x: torch.rot90(x, 1, (2, 3)), "x:2,6,3,4", "x0|x1"),
    Usage("a triangle", lambda x: torch.tril(x), "x:3,4,4", "x0"),
    Usage("places in memory", lambda x: x.as_strided((2, 2), (1, 1)), "x:2,6", ""),
    Usage(
        "channels shuffled by hand",
        lambda x, g=2: x.view(x.shape[0], g, -1, x.shape[2]).transpose(1, 2).flatten(1, 2),
        "x:2,6,3",
        "x0|x1|x1|x2",
    ),
    Usage(
        "windows",
        lambda x, a=2, b=2, c=2, d=2: (
            x.view(-1, a, b, c, d, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).flatten(0, 2).flatten(1, 2)
        ),
        "x:3,4,4,6",
        "x0|x1|x1|x2|x2|x3",
    ),
    Usage(
        "space to depth",
        lambda x, a=2, b=2, c=2, d=2: x.view(*x.shape[:2], a, b, c, d).permute(0, 3, 5, 1, 2, 4).flatten(1, 3),
        "x:2,6,4,4",
        "x0|x1|x2|x2|x3|x3",
    ),
    Usage(
        "packed q, k, v",
        lambda x, h=2: x.view(x.shape[0], 3, h, -1).permute(1, 2, 0, 3).unbind(0),
        "x:5,24",
        "x0|x1|x1",
    ),
    Usage(
        "q, k, v within each head",
        lambda x, h=2, d=4: x.view(x.shape[0], h, 3 * d).split(d, -1),
        "x:5,24",
        "x0|x1|x1",
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()

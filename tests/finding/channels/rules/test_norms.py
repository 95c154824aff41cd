"""Norms."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import runs
from shallower.recording.tracing import trace_forward
from tests.finding.channels.commuting import Usage

USAGES = [
    Usage(
        "batch norm",
        lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
        "x:2,6,3 m:6 v:6 w:6 b:6",
        "x0|x1 m0 v0 w0 b0|x2",
    ),
    Usage(
        "batch norm without numbers of its own", lambda x, m, v: F.batch_norm(x, m, v), "x:2,6 m:6 v:6", "x0|x1 m0 v0"
    ),
    Usage(
        "instance norm", lambda x, w, b: F.instance_norm(x, weight=w, bias=b), "x:2,6,3,3 w:6 b:6", "x0|x1 w0 b0|x2|x3"
    ),
    Usage("layer norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b), "x:2,3,6 w:6 b:6", "x0|x1|x2 w0 b0"),
    Usage("layer norm over two axes", lambda x, w: F.layer_norm(x, w.shape, w), "x:2,3,6 w:3,6", "x0|x1 w0|x2 w1"),
    Usage("layer norm without numbers", lambda x: F.layer_norm(x, x.shape[-1:]), "x:2,3,6", "x0|x1|x2"),
    Usage("rms norm", lambda x, w: F.rms_norm(x, w.shape, w), "x:2,3,6 w:6", "x0|x1|x2 w0"),
    Usage(
        "rms norm by hand", lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), "x:2,6 w:6", "x0|x1 w0"
    ),
    Usage("group norm", lambda x, w, b, g=3: F.group_norm(x, g, w, b), "x:2,6,4 w:6 b:6", "x0|x1 w0 b0|x2"),
    Usage("one group", lambda x, w, b: F.group_norm(x, 1, w, b), "x:2,6,4 w:6 b:6", "x0|x1 w0 b0|x2"),
    Usage("normalize", lambda x: F.normalize(x, dim=-1), "x:2,6", "x0|x1"),
    Usage("weight norm", lambda v, g: torch._weight_norm(v, g, 0), "v:4,6,3 g:4,1,1", "v0 g0|v1|v2"),
    Usage("weight norm of taps", lambda v, g: torch._weight_norm(v, g, 2), "v:4,6,3 g:1,1,3", "v0|v1|v2 g2"),
    Usage(
        "frozen batch norm",
        lambda x, w, b: x * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1),
        "x:2,6,3,3 w:6 b:6",
        "x0|x1 w0 b0|x2|x3",
    ),
    Usage(
        "standardised weights",
        lambda x, w: F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)),
        "x:2,6,4,4 w:4,6,3,3",
        "x0|x1 w1|w0",
    ),
    Usage("local response", lambda x: F.local_response_norm(x, 3), "x:2,6,3,3", ""),
    Usage(
        "spectral norm",
        lambda x, w, u, v: F.linear(x, w / torch.dot(u, torch.mv(w, v))),
        "x:2,6 w:4,6 u:4 v:6",
        "x0|x1 w1 v0|w0 u0",
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()


def test_whole_groups_of_a_layer_can_go():
    net = nn.Sequential(nn.Conv1d(2, 6, 1), nn.GroupNorm(3, 6), nn.Conv1d(6, 1, 1))
    f = Following(trace_forward(net, (torch.rand(2, 2, 5),)))
    groups, members = runs(f.axes(f.trace.weights[net[1], "weight"])[0])
    assert (groups.size, groups.closed, groups.marks) == (3, "", set())
    assert (members.size, members.marks) == (2, {"averaged"})


def test_groups_whose_number_does_not_follow_stay():
    net = nn.Sequential(nn.Conv1d(2, 6, 1), nn.GroupNorm(3, 6, affine=False), nn.Conv1d(6, 1, 1))
    f = Following(trace_forward(net, (torch.rand(2, 2, 5),)))
    groups, _ = runs(f.axes(f.trace.weights[net[0], "weight"])[0])
    assert groups.closed == "`group_norm` in 1 has a number of groups that does not follow"

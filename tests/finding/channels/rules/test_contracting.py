"""Linear maps."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage


def experts(x, w):
    """Five rows for each of two experts, the others for a third, in whole numbers, which bfloat16 keeps."""
    ends = torch.tensor([5, 10, x.shape[0]], dtype=torch.int32)
    whole, weights = ((4 * t).round().bfloat16() for t in (x, w))
    return torch._grouped_mm(whole, weights, offs=ends).double()


def experts_by_hand(x, w):
    """The same of any width, which the kernel does not take."""
    whole, weights = ((4 * t).round() for t in (x, w))
    return torch.cat([whole[:5] @ weights[0], whole[5:10] @ weights[1], whole[10:] @ weights[2]])


USAGES = [
    Usage("linear", lambda x, w, b: F.linear(x, w, b), "x:2,6 w:4,6 b:4", "x0|x1 w1|w0 b0"),
    Usage("linear without bias, of images", lambda x, w: F.linear(x, w), "x:2,3,6 w:4,6", "x0|x1|x2 w1|w0"),
    Usage(
        "linear of keywords", lambda x, w, b: F.linear(bias=b, weight=w, input=x), "x:2,6 w:4,6 b:4", "x0|x1 w1|w0 b0"
    ),
    Usage("linear with one row", lambda x, w: F.linear(x, w), "x:2,6 w:6", "x0|x1 w0"),
    Usage("linear of an expert", lambda x, w: F.linear(x, w[1]), "x:2,6 w:3,4,6", "x0|x1 w2|w1"),
    Usage(
        "two linear maps", lambda x, a, b: F.linear(F.relu(F.linear(x, a)), b), "x:2,3 a:6,3 b:4,6", "x0|x1 a1|a0 b1|b0"
    ),
    Usage("tied weights", lambda x, w: F.linear(F.linear(x, w), w.T), "x:2,3 w:6,3", "x0|x1 w1|w0"),
    Usage("conv1d", lambda x, w, b: F.conv1d(x, w, b), "x:2,6,5 w:4,6,3 b:4", "x0|x1 w1|w0 b0"),
    Usage("conv2d", lambda x, w, b: F.conv2d(x, w, b, 2, 1), "x:2,6,5,5 w:4,6,3,3 b:4", "x0|x1 w1|w0 b0"),
    Usage("a kernel over steps", lambda x, w: F.conv2d(x, w, None, 1, (1, 0)), "x:2,6,5,4 w:4,6,3,1", "x0|x1 w1|x3|w0"),
    Usage("a single tap", lambda x, w: F.conv2d(x, w, padding="same"), "x:2,6,3,4 w:4,6,1,1", "x0|x1 w1|x2|x3|w0"),
    Usage("a single tap at every second place", lambda x, w: F.conv1d(x, w, None, 2), "x:2,6,4 w:4,6,1", "x0|x1 w1|w0"),
    Usage("conv2d of one image", lambda x, w: F.conv2d(x, w), "x:6,5,5 w:4,6,3,3", "x0 w1|w0"),
    Usage("conv3d", lambda x, w: F.conv3d(x, w), "x:1,6,3,3,3 w:4,6,2,2,2", "x1 w1|w0"),
    Usage("depthwise", lambda x, w, b, g=6: F.conv2d(x, w, b, groups=g), "x:2,6,5,5 w:6,1,3,3 b:6", "x0|x1 w0 b0"),
    Usage(
        "depthwise, twice as many",
        lambda x, w, b, g=3: F.conv1d(x, w, b, groups=g),
        "x:2,3,5 w:6,1,3 b:6",
        "x0|x1 w0 b0|w0 b0",
    ),
    Usage(
        "groups", lambda x, w, b, g=2: F.conv2d(x, w, b, groups=g), "x:2,6,5,5 w:4,3,3,3 b:4", "x0|x1 w0 b0|x1 w1|w0 b0"
    ),
    Usage("transposed", lambda x, w, b: F.conv_transpose2d(x, w, b, 2), "x:2,6,4,4 w:6,4,2,2 b:4", "x0|x1 w0|w1 b0"),
    Usage(
        "transposed groups",
        lambda x, w, b, g=2: F.conv_transpose1d(x, w, b, groups=g),
        "x:2,6,4 w:6,4,2 b:8",
        "x0|x1 w0 b0|x1 w0|w1 b0",
    ),
    Usage("matrices", lambda x, y: x @ y, "x:2,6 y:6,4", "x0|x1 y0|y1"),
    Usage("batches of matrices", lambda x, y: torch.bmm(x, y), "x:3,2,6 y:3,6,4", "x0 y0|x1|x2 y1|y2"),
    Usage("heads that share keys", lambda q, k: q @ k.mT, "q:2,4,3,6 k:2,1,5,6", "q0 k0|q1|q2|q3 k3|k2"),
    Usage("a matrix and a vector", lambda x, y: torch.mv(x, y), "x:2,6 y:6", "x0|x1 y0"),
    Usage("a vector and a matrix", lambda x, y: x @ y, "x:6 y:6,4", "x0 y0|y1"),
    Usage("two vectors", lambda x, y: torch.dot(x, y), "x:6 y:6", "x0 y0"),
    Usage("many by a vector", lambda x, y: torch.matmul(x, y), "x:3,2,6 y:6", "x0|x1|x2 y0"),
    Usage("a product and a bias", lambda b, x, w: torch.addmm(b, x, w), "b:4 x:2,6 w:6,4", "b0 w1|x0|x1 w0"),
    Usage(
        "batches and biases",
        lambda b, x, w: torch.baddbmm(b, x, w, alpha=2),
        "b:3,1,5 x:3,2,6 w:3,6,5",
        "b0 x0 w0|b2 w2|x1|x2 w1",
    ),
    Usage("inverses", lambda x: torch.linalg.inv(x + torch.eye(4)), "x:3,4,4", "x0"),
    Usage("systems", lambda x, y: torch.linalg.solve_triangular(x, y, upper=True), "x:3,4,4 y:3,4,2", "x0 y0"),
    Usage("decompositions", lambda x: torch.linalg.qr(x), "x:3,4,4", "x0"),
    Usage("each by each", lambda x, y: torch.outer(x, y), "x:3 y:4", "x0|y0"),
    Usage(
        "einsum", lambda x, y: torch.einsum("bhid,bhjd->bhij", x, y), "x:2,3,4,6 y:2,3,5,6", "x0 y0|x1 y1|x2|x3 y3|y2"
    ),
    Usage(
        "einsum that shares",
        lambda x, y: torch.einsum("bhid,bjd->bhij", x, y),
        "x:2,3,4,6 y:2,5,6",
        "x0 y0|x1|x2|x3 y2|y1",
    ),
    Usage("einsum with dots", lambda x, y: torch.einsum("...c,dc->...d", x, y), "x:2,3,6 y:4,6", "x0|x1|x2 y1|y0"),
    Usage(
        "einsum with dots in both",
        lambda x, y: torch.einsum("...ic,...jc->...ij", x, y),
        "x:2,3,6 y:1,4,6",
        "x0|x1|x2 y2|y1",
    ),
    Usage("einsum without a right side", lambda x, y: torch.einsum("ij,jk", x, y), "x:2,6 y:6,4", "x0|x1 y0|y1"),
    Usage("einsum of one", lambda x: torch.einsum("bchw->bhwc", x), "x:2,6,3,4", "x0|x1|x2|x3"),
    Usage("einsum of a list", lambda x, y: torch.einsum("ij,kj->ik", [x, y]), "x:2,6 y:4,6", "x0|x1 y1|y0"),
    Usage(
        "einsum of three",
        lambda x, y, z: torch.einsum("bi,oij,bj->bo", x, y, z),
        "x:2,3 y:5,3,4 z:2,4",
        "x0 z0|x1 y1|y0|y2 z1",
    ),
    Usage("einsum of a diagonal", lambda x: torch.einsum("ii->i", x), "x:4,4", "x0 x1"),
    Usage("einsum by experts", lambda x, w: torch.einsum("td,edf->tef", x, w), "x:5,6 w:3,6,4", "x0|x1 w1|w0|w2"),
    Usage("tensordot", lambda x, y: torch.tensordot(x, y, 1), "x:2,6 y:6,4", "x0|x1 y0|y1"),
    Usage("tensordot by axes", lambda x, y: torch.tensordot(x, y, ([0, 2], [1, 0])), "x:2,3,6 y:6,2", "x0 y1|x1|x2 y0"),
    Usage("bilinear", lambda x, y, w, b: F.bilinear(x, y, w, b), "x:2,3 y:2,4 w:5,3,4 b:5", "x0 y0|x1 w1|y1 w2|w0 b0"),
    Usage("embedding", lambda i, w: F.embedding(i, w), "i:int5:2,3 w:5,6", "i0|i1|w1"),
    Usage("bags", lambda i, o, w: F.embedding_bag(i, w, o * 0), "i:int5:4 o:int1:1 w:5,6", "w1"),
    Usage("experts by stretches", experts, "x:16,8 w:3,8,16", "x1 w1|w2", again=experts_by_hand),
    Usage("distances", lambda x, y: torch.cdist(x, y), "x:3,2,6 y:3,4,6", "x0 y0|x1|x2 y2|y1"),
    Usage("cosine similarity", lambda x, y: F.cosine_similarity(x, y, dim=-1), "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage("pairwise distance", lambda x, y: F.pairwise_distance(x, y, eps=0.0), "x:2,6 y:2,6", "x0 y0|x1 y1"),
    Usage(
        "low-rank adapters",
        lambda x, w, a, b: F.linear(x, w + b @ a),
        "x:2,6 w:4,6 a:3,6 b:4,3",
        "x0|x1 w1 a1|w0 b0|a0 b1",
    ),
    Usage("factored", lambda x, w, s: F.linear(x, w * s[:, None]), "x:2,6 w:4,6 s:4", "x0|x1 w1|w0 s0"),
    Usage(
        "a kernel with an axis less", lambda x, w, g=6: F.conv1d(x, w[:, None], groups=g), "x:2,6,5 w:6,3", "x0|x1 w0"
    ),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()

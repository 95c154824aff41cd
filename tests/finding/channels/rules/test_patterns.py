"""What layers are made of, as people write them: positions, gates, experts, joined and divided images."""

import pytest
import torch
from torch.nn import functional as F

from tests.finding.channels.commuting import Usage


def rotated_halves(x, cos, sin):
    """Rotary positions: the first half of a head with the second."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotated_pairs(x, cos, sin):
    """Rotary positions: neighbours with each other, by a stack."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)


def rotated_complex(x, angles):
    """Rotary positions as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).type_as(x)


def rotated_parts(x, cos, sin):
    """Rotary positions of a part of each head."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((rotated_halves(turned, cos, sin), rest), -1)


def experts_by_loop(x, router, up, down):
    """Each expert on its own rows, added up."""
    chosen = F.linear(x, router).argmax(-1)
    result = torch.zeros_like(x)
    for i in range(up.shape[0]):
        rows = torch.where(chosen == i)[0]
        result.index_add_(0, rows, F.linear(F.gelu(F.linear(x[rows], up[i])), down[i]))
    return result


def experts_by_einsum(x, router, up, down):
    """All experts on all rows, weighted."""
    weights = F.linear(x, router).softmax(-1)
    hidden = F.relu(torch.einsum("td,edf->tef", x, up))
    return torch.einsum("tef,efd,te->td", hidden, down, weights)


def experts_by_batches(x, up, down, n=3):
    """All experts on all rows by bmm."""
    hidden = torch.bmm(x.expand(n, *x.shape), up)
    gate, value = hidden.chunk(2, -1)
    return torch.bmm(F.silu(gate) * value, down).sum(0)


def excited(x, down, up):
    """Squeeze and excitation."""
    weights = F.conv2d(F.relu(F.conv2d(F.adaptive_avg_pool2d(x, 1), down)), up)
    return x * weights.sigmoid()


def ghost(x, primary, cheap, g=4):
    """Cheap maps beside those of a convolution."""
    made = F.conv2d(x, primary)
    return torch.cat([made, F.conv2d(made, cheap, padding=1, groups=g)], 1)


def c2f(x, into, inner, out):
    """Two halves, one of which goes through more layers; all joined."""
    parts = list(F.conv2d(x, into).chunk(2, 1))
    parts.append(F.conv2d(parts[-1], inner))
    return F.conv2d(torch.cat(parts, 1), out)


def unet(x, down, middle, up):
    """A skip around a lower resolution."""
    skip = F.relu(F.conv2d(x, down))
    low = F.relu(F.conv2d(F.max_pool2d(skip, 2), middle))
    return F.conv2d(torch.cat([skip, F.interpolate(low, scale_factor=2)], 1), up)


def selected(x, a, b, reduce, expand):
    """Selective kernels: a softmax over two branches for each channel."""
    branches = torch.stack([F.conv2d(x, a), F.conv2d(x, b)], 1)
    scores = F.linear(F.relu(F.linear(branches.sum(1).mean((2, 3)), reduce)), expand)
    weights = scores.view(x.shape[0], 2, -1).softmax(1)
    return (branches * weights[..., None, None]).sum(1)


def response(x, gamma, beta):
    """Global response normalisation of ConvNeXt V2, channels last."""
    size = x.norm(p=2, dim=(1, 2), keepdim=True)
    return x + gamma * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + beta


def focal(x, into, out, w, n=6, m=6):
    """Focal modulation: queries, a context and gates from one map."""
    q, context, gates = F.linear(x, into).permute(0, 3, 1, 2).split((n, m, 1), 1)
    context = F.gelu(F.conv2d(context, w, padding=1, groups=m)) * gates
    return q * F.conv2d(context, out)


def image_between(x, up, w, down, n=6, h=2):
    """A feed-forward with a depthwise convolution of the tokens as an image."""
    hidden = F.linear(x, up)
    image = F.conv2d(hidden.transpose(1, 2).reshape(x.shape[0], -1, h, 2), w, padding=1, groups=n)
    return F.linear(F.gelu(image.flatten(2).transpose(1, 2)), down)


def normed_tokens(x, w, m, v, g, b):
    """A linear map with a batch norm of the tokens."""
    y = F.linear(x, w)
    return F.batch_norm(y.flatten(0, 1), m, v, g, b).reshape_as(y)


def latent(x, into, norm, out, h=2, k=3, v=3):
    """Keys and values from a small latent tensor, with d features each."""
    made = F.linear(F.rms_norm(F.linear(x, into), norm.shape, norm), out)
    return made.view(*x.shape[:-1], h, k + v).split([k, v], -1)


def alibi(q, k, slopes):
    """Slopes for each head on the distances."""
    distance = torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]
    return (q @ k.mT + slopes[:, None, None] * distance).softmax(-1)


USAGES = [
    Usage("rotated halves", rotated_halves, "x:2,3,5,8 cos:5,8 sin:5,8", "x0|x1|x2 cos0 sin0|x3 cos1 sin1"),
    Usage("rotated pairs", rotated_pairs, "x:2,3,5,8 cos:5,4 sin:5,4", "x0|x1|x2 cos0 sin0|x3 cos1 sin1"),
    Usage("rotated complex numbers", rotated_complex, "x:2,3,5,8 angles:5,4", "x0|x1|x2 angles0|x3 angles1"),
    Usage("rotated parts", rotated_parts, "x:2,3,5,8 cos:5,4 sin:5,4", "x0|x1|x2 cos0 sin0|x3 cos1 sin1|x3"),
    Usage(
        "experts by a loop", experts_by_loop, "x:9,5 router:3,5 up:3,4,5 down:3,5,4", "x1 router1 up2 down1|up1 down2"
    ),
    Usage(
        "experts by einsum",
        experts_by_einsum,
        "x:9,5 router:3,5 up:3,5,4 down:3,4,5",
        "x0|x1 router1 up1|up2 down1|down2",
    ),
    Usage("experts by batches", experts_by_batches, "x:9,5 up:3,5,8 down:3,4,5", "x0|x1 up1|up0 down0|up2 down1|down2"),
    Usage("squeeze and excitation", excited, "x:2,6,4,4 down:3,6,1,1 up:6,3,1,1", "x0|x1 down1 up0|down0 up1"),
    Usage("ghost", ghost, "x:2,3,4,4 primary:4,3,1,1 cheap:4,1,3,3", "x0|x1 primary1|primary0 cheap0"),
    Usage(
        "c2f",
        c2f,
        "x:2,3,4,4 into:8,3,1,1 inner:4,4,1,1 out:5,12,1,1",
        "x0|x1 into1|x2|x3|into0 inner1 out1|inner0 out1|out0",
    ),
    Usage(
        "unet",
        unet,
        "x:2,3,4,4 down:4,3,1,1 middle:6,4,1,1 up:5,10,1,1",
        "x0|x1 down1|down0 middle1 up1|middle0 up1|up0",
    ),
    Usage(
        "selective kernels",
        selected,
        "x:2,3,4,4 a:6,3,1,1 b:6,3,1,1 reduce:4,6 expand:12,4",
        "x0|x1 a1 b1|x2|x3|a0 b0 reduce1 expand0|reduce0 expand1",
    ),
    Usage("global response", response, "x:2,4,4,6 gamma:6 beta:6", "x0|x1|x2|x3 gamma0 beta0"),
    Usage(
        "focal modulation", focal, "x:2,4,4,5 into:13,5 out:6,6,1,1 w:6,1,3,3", "x0|x3 into1|into0 out0|into0 out1 w0"
    ),
    Usage(
        "tokens as an image between", image_between, "x:2,4,3 up:6,3 w:6,1,3,3 down:3,6", "x0|x2 up1|up0 w0 down1|down0"
    ),
    Usage("tokens with a batch norm", normed_tokens, "x:2,4,3 w:6,3 m:6 v:6 g:6 b:6", "x0|x1|x2 w1|w0 m0 v0 g0 b0"),
    Usage(
        "latent keys and values",
        latent,
        "x:2,4,5 into:3,5 norm:3 out:12,3",
        "x0|x1|x2 into1|into0 norm0 out1|out0|out0|out0",
    ),
    Usage("slopes by heads", alibi, "q:2,3,4,6 k:2,3,5,6 slopes:3", "q0 k0|q1 k1 slopes0|q3 k3"),
]


@pytest.mark.parametrize("usage", USAGES, ids=lambda usage: usage.name)
def test_cutting_commutes(usage: Usage):
    usage.check()

"""The modules without weights that Shallower puts into models.

`SlopeActivation` stands in a model while it is trained towards a collapse, `PartialActivation`, `Twice` and `Operand`
in a model after surgery: where some channels lost their activation and others kept it, or where a sum is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import MethodError, PlanError

Family = Literal["blend", "prelu"]
Target = Literal["identity", "one"]

PRELU_INIT = 0.01
"""Initial slope of the PReLU family (LayerCollapse, arXiv 2311.17943)."""


def dim_of_channels(channels_first: bool) -> int:
    """The dimension of the channels: 1 of images, -1 of rows and sequences."""
    if channels_first:
        return 1
    return -1


class PartialActivation(nn.Module):
    """An activation on the first channels only; what became linear passes beside it.

        PartialActivation(nn.GELU(), kept=3, linear=2)      # five channels in, five out, GELU on three

    Args:
        f: the activation, applied channel by channel.
        kept: channels that f acts on; they come first.
        linear: channels of the linear path.
        gate: "" - x has kept + linear channels, f acts on the first `kept`, the last `linear` pass unchanged.
            "packed" - x is the gate of a gated site and has kept + linear channels: f acts on the first `kept`, the
            others are ignored and become ones.
            "separate" - x has `kept` channels, f acts on all, `linear` ones are appended; with kept == 0 the result is
            ones of shape (..., 1), which broadcast.
        channels_first: the channels are dimension 1, not the last.
    """

    def __init__(
        self,
        f: nn.Module,
        kept: int,
        linear: int,
        *,
        gate: Literal["", "separate", "packed"] = "",
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        self.f = f
        self.kept = kept
        self.linear = linear
        self.gate = gate
        self.channels_first = channels_first

    def forward(self, input: Tensor) -> Tensor:
        """x with f applied to the kept channels."""
        x = input
        dim = dim_of_channels(self.channels_first)
        if self.gate == "separate":
            if self.kept == 0:
                return torch.ones_like(x.narrow(dim, 0, 1))
            shape = list(x.shape)
            shape[dim] = self.linear
            return torch.cat([self.f(x), x.new_ones(shape)], dim)
        # narrow, not split: an in-place f must be able to write into this view
        kept, rest = x.narrow(dim, 0, self.kept), x.narrow(dim, self.kept, self.linear)
        if self.gate == "packed":
            rest = torch.ones_like(rest)
        if self.kept == 0:
            return rest
        return torch.cat([self.f(kept), rest], dim)

    def extra_repr(self) -> str:
        gate = f", gate={self.gate!r}" * bool(self.gate)
        return f"kept={self.kept}, linear={self.linear}{gate}{', channels_first=True' * self.channels_first}"


class Twice(nn.Module):
    """[x, x] along the channels: stands for the packed producer of a fully collapsed gated site."""

    def __init__(self, channels_first: bool = False) -> None:
        super().__init__()
        self.channels_first = channels_first

    def forward(self, input: Tensor) -> Tensor:
        """x of n channels gives 2 n channels."""
        x = input
        return torch.cat([x, x], dim_of_channels(self.channels_first))


class Operand(nn.Module):
    """One of several tensors: stands for a sum whose other operand was folded into the layer that gives this one.

    Args:
        index: which argument is returned, from 0.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, *operands: Tensor) -> Tensor:
        """The operand at `index`, as it is."""
        return operands[self.index]

    def extra_repr(self) -> str:
        return f"index={self.index}"


class SlopeActivation(nn.Module):
    """An activation f on its way to becoming linear: a x + (1 - a) f(x), with a learnable slope a.

        layer.activation = SlopeActivation(nn.GELU())       # a = 0: still exactly GELU
        layer.activation.slope                              # Parameter containing: tensor([0.])

    For the activations in `KERNELS` forward and backward are written by hand, work in place and save nothing but x; any
    other f goes through plain autograd. The slope is float32, also where the model computes in half precision, and its
    gradient is summed in float32 or wider.

    Args:
        f: the activation, applied channel by channel; it is never called in place.
        width: channels, for one slope per channel; None for one slope.
        family: "blend" starts as f (a = 0). "prelu" is max(x, 0) + a min(x, 0) whatever f was, as in the paper, and
            starts at a = 0.01.
        target: what a = 1 stands for. "identity": x. "one", for the gate of a gated site: the constant 1, that is
            a + (1 - a) f(x).
        channels_first: the channels are dimension 1, not the last.

    Attributes:
        slope: Parameter of shape (1,) or (width,).

    Raises:
        MethodError: family "prelu" with target "one".

    Reference: LayerCollapse, arXiv 2311.17943.
    """

    slope: nn.Parameter

    def __init__(
        self,
        f: nn.Module,
        *,
        width: int | None = None,
        family: Family = "blend",
        target: Target = "identity",
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        if family == "prelu" and target == "one":
            raise MethodError("the gate of a gated site has no PReLU form; use family='blend'")
        self.f = f
        self.family = family
        self.target = target
        self.channels_first = channels_first
        start, self.kernel = 0.0, recognise(f)
        if family == "prelu":
            start, self.kernel = PRELU_INIT, "relu"
        self.slope = nn.Parameter(torch.full((width or 1,), start))
        self.writes_input = _writes_input(f)

    def forward(self, input: Tensor) -> Tensor:
        """x of any shape that has its channels where `channels_first` says; the result has the same shape and dtype."""
        x = input
        slope = self.slope
        # Without gradients, and for compilers, plain operations: a trace then shows what is computed.
        if self.kernel and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Slope.apply(x, slope, self.kernel, self.target, self.channels_first)  # type: ignore[no-any-return,no-untyped-call]
        # f itself, and not the kernel that it was recognised as: a constant may have fewer digits there.
        if self.family == "prelu":
            y = F.relu(x)
        elif self.writes_input:
            y = self.f(x.clone())
        else:
            y = self.f(x)
        return _mix(x, y, _aligned(slope, x, self.channels_first), self.target)

    def extra_repr(self) -> str:
        text = f"family={self.family!r}"
        if self.slope.numel() > 1:
            text += f", width={self.slope.numel()}"
        if self.target == "one":
            text += ", target='one'"
        return text + ", channels_first=True" * self.channels_first


@dataclass(frozen=True)
class Kernel:
    """An activation with hand-written forward and backward.

    Attributes:
        plain: f(x), differentiable.
        forward: (x, out) writes f(x) to out.
        backward: (g, x, out) writes g f'(x) to out; with `from_output` it is given f(x) in the place of x.
        from_output: whether the derivative is computed from f(x).
    """

    plain: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor, Tensor], object]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    from_output: bool = False


_aten = torch.ops.aten
_QUICK = 1.702


def _quick_gelu_forward(x: Tensor, out: Tensor) -> None:
    torch.mul(x, _QUICK, out=out)
    _aten.silu.out(out, out=out)
    out.div_(_QUICK)


def _quick_gelu_backward(g: Tensor, x: Tensor, out: Tensor) -> None:
    _aten.silu_backward.grad_input(g, x * _QUICK, grad_input=out)


KERNELS: Mapping[str, Kernel] = {
    "relu": Kernel(
        F.relu,
        lambda x, out: torch.clamp_min(x, 0, out=out),
        lambda g, x, out: _aten.threshold_backward.grad_input(g, x, 0, grad_input=out),
    ),
    "relu6": Kernel(
        F.relu6,
        lambda x, out: torch.clamp(x, 0, 6, out=out),
        lambda g, x, out: _aten.hardtanh_backward.grad_input(g, x, 0, 6, grad_input=out),
    ),
    "gelu": Kernel(
        F.gelu,
        lambda x, out: _aten.gelu.out(x, out=out),
        lambda g, x, out: _aten.gelu_backward.grad_input(g, x, grad_input=out),
    ),
    "gelu-tanh": Kernel(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x, out: _aten.gelu.out(x, approximate="tanh", out=out),
        lambda g, x, out: _aten.gelu_backward.grad_input(g, x, approximate="tanh", grad_input=out),
    ),
    "quick-gelu": Kernel(
        lambda x: x * torch.sigmoid(_QUICK * x),
        _quick_gelu_forward,
        _quick_gelu_backward,
    ),
    "silu": Kernel(
        F.silu,
        lambda x, out: _aten.silu.out(x, out=out),
        lambda g, x, out: _aten.silu_backward.grad_input(g, x, grad_input=out),
    ),
    "tanh": Kernel(
        torch.tanh,
        lambda x, out: torch.tanh(x, out=out),
        lambda g, y, out: _aten.tanh_backward.grad_input(g, y, grad_input=out),
        from_output=True,
    ),
    "sigmoid": Kernel(
        torch.sigmoid,
        lambda x, out: torch.sigmoid(x, out=out),
        lambda g, y, out: _aten.sigmoid_backward.grad_input(g, y, grad_input=out),
        from_output=True,
    ),
}
"""The activations whose slope form is fused, by name."""


def recognise(f: nn.Module) -> str:
    """The name in `KERNELS` of the function that f computes, "" if it is none of them.

    Judged by values, not by type, so that the same GELU is recognised in every library's spelling. A module with
    parameters or buffers is never recognised.
    """
    if next(f.parameters(), None) is not None or next(f.buffers(), None) is not None:
        return ""
    values = _probe(f)
    if values is None:
        return ""
    points = _probe_points()
    for name, kernel in KERNELS.items():
        if torch.allclose(values, kernel.plain(points), rtol=1e-9, atol=1e-12):
            return name
    return ""


def _probe_points() -> Tensor:
    inner = torch.linspace(-12, 12, 481, dtype=torch.float64)
    outer = torch.logspace(1, 3, 15, dtype=torch.float64)
    return torch.cat([-outer, inner, outer])


@torch.no_grad()
def _probe(f: nn.Module) -> Tensor | None:
    points = _probe_points()
    try:
        values = f(points)
    except Exception:  # f is anybody's code, and may need other shapes than the probe's
        return None
    if isinstance(values, Tensor) and values.shape == points.shape:
        return values
    return None


@torch.no_grad()
def _writes_input(f: nn.Module) -> bool:
    if getattr(f, "inplace", False):
        return True
    points = _probe_points()
    try:
        f(points)
    except Exception:
        return True
    return not torch.equal(points, _probe_points())


def _aligned(slope: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """The slope in the dtype of x, shaped to broadcast over it."""
    slope = slope.to(x.dtype)
    if channels_first and slope.numel() > 1:
        return slope.view(-1, *[1] * (x.dim() - 2))
    return slope


def _mix(x: Tensor, y: Tensor, slope: Tensor, target: Target) -> Tensor:
    if target == "one":
        return slope + (1 - slope) * y
    return torch.lerp(y.to(x.dtype), x, slope)


class _Slope(torch.autograd.Function):
    """a x + (1 - a) f(x), or a + (1 - a) f(x), saving only x."""

    @staticmethod
    def forward(x: Tensor, slope: Tensor, kernel: str, target: Target, channels_first: bool) -> Tensor:
        a = _aligned(slope, x, channels_first)
        y = torch.empty_like(x)
        KERNELS[kernel].forward(x, y)
        if target == "one":
            return y.mul_(1 - a).add_(a)
        return y.lerp_(x, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str, Target, bool], output: Tensor) -> None:  # noqa: ARG004
        x, slope, ctx.kernel, ctx.target, ctx.channels_first = inputs
        ctx.save_for_backward(x, slope)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, slope = ctx.saved_tensors
        needs_x, needs_slope = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, x, slope, g), None, None, None
        kernel = KERNELS[ctx.kernel]
        a = _aligned(slope, x, ctx.channels_first)
        grad_slope = None
        grad_x = torch.empty_like(x)
        # grad_x is scratch space until the end: f(x) first, then the distance to the target
        y, known = grad_x, x
        if kernel.from_output:
            y = known = torch.empty_like(x)
        if needs_slope or kernel.from_output:
            kernel.forward(x, y)
        if needs_slope:
            aim = torch.ones_like(a) if ctx.target == "one" else x
            distance = torch.sub(aim, y, out=grad_x)
            grad_slope = _inner(g, distance, dim_of_channels(ctx.channels_first), slope)
        if not needs_x:
            return None, grad_slope, None, None, None
        # d/dx [a t + (1 - a) f(x)] = a t' + (1 - a) f'(x), with t' = 1, or 0 where the target is the constant one
        kernel.backward(g, known, grad_x)
        if ctx.target == "one":
            grad_x.mul_(1 - a)
        else:
            grad_x.lerp_(g, a)
        return grad_x, grad_slope, None, None, None


def _inner(g: Tensor, d: Tensor, channels: int, slope: Tensor) -> Tensor:
    """Sum of g d over everything, or over everything but the channels, like `slope`; d is overwritten."""
    wide = torch.promote_types(g.dtype, torch.float32)
    if slope.numel() == 1:
        if g.dtype == wide and g.is_contiguous() and d.is_contiguous():
            return torch.dot(g.view(-1), d.view(-1)).view(1).to(slope.dtype)
        product = d.mul_(g)
        if product.dtype == torch.bfloat16:
            # a sum within bfloat16 is wide inside, cannot overflow, and is four times as fast as one into float32
            product = product.sum(-1)
        return product.sum(dtype=wide).view(1).to(slope.dtype)
    product = d.mul_(g)
    if g.dim() > 1:
        product = product.movedim(channels, -1).flatten(0, -2).sum(0, dtype=wide)
    return product.to(slope.dtype)


def _differentiable_backward(ctx: Any, x: Tensor, slope: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The same gradients as differentiable functions of x, slope and g, for gradients of gradients."""
    needs_x, needs_slope = ctx.needs_input_grad[:2]
    y = _mix(x, KERNELS[ctx.kernel].plain(x), _aligned(slope, x, ctx.channels_first), ctx.target)
    grads: dict[str, Tensor | None] = {"x": None, "slope": None}
    wanted = {"x": x} if needs_x else {}
    if needs_slope:
        wanted["slope"] = slope
    grads.update(zip(wanted, torch.autograd.grad(y, list(wanted.values()), g, create_graph=True), strict=True))
    return grads["x"], grads["slope"]


def narrowed_activation(f: nn.Module, channels: int) -> nn.Module:
    """An activation with one parameter per channel, for fewer channels; the parameters are unset.

    Raises:
        PlanError: it is not known how its channels are counted.
    """
    if isinstance(f, nn.PReLU):
        narrowed = nn.PReLU(channels)
        narrowed.weight = nn.Parameter(f.weight.new_empty(channels), requires_grad=f.weight.requires_grad)
        return narrowed
    if isinstance(f, SlopeActivation):
        narrower = SlopeActivation(
            f.f, width=channels, family=f.family, target=f.target, channels_first=f.channels_first
        )
        narrower.slope = nn.Parameter(f.slope.new_empty(channels), requires_grad=f.slope.requires_grad)
        return narrower
    raise PlanError(f"it is not known how the channels of a {type(f).__name__} are counted")

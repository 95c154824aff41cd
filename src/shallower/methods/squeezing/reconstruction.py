"""A narrowed site fitted as a whole: its producers too, so that the channels that stay can become others.

    layers = Layers.of(model, site, kept)
    found = reconstruct(layers, rows, held, root, ridge=1e-3)
    fit = found.fit

For fixed producers least squares gives the consumers; the producers follow by damped Gauss-Newton steps towards the
same outputs, with conjugate gradients, so that only products with the Jacobian are needed. No labels and no gradient
through the rest of the network.

References: Levenberg, A method for the solution of certain non-linear problems in least squares, 1944; Hestenes and
Stiefel, Methods of conjugate gradients for solving linear systems, 1952; Golub and Pereyra, The differentiation of
pseudo-inverses and nonlinear least squares problems whose variables separate, 1973, for solving for the consumers
within each step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shallower.calibrating.grams import Centred, Gram
from shallower.calibrating.patches import flat, patches, thinned, unusual_padding
from shallower.calibrating.site_grams import Rows
from shallower.core.algebra import norm_as_affine
from shallower.errors import FitError
from shallower.modules import attachment
from shallower.modules.layers import bias_of, weight_of
from shallower.planning.fits import Fit
from shallower.sites import LinearMap, Place, Site

STEPS = 4
"""Gauss-Newton steps at most."""

ITERATIONS = 8
"""Conjugate gradient iterations in each step."""

_DAMPING = 1e-2
_LEAST_DAMPING = 1e-4
_INPUT_RIDGE = 1e-3
_WORTHWHILE = 0.98
"""A step that leaves more of the held-out error than this is the last."""

_TINY = 1e-12

Deltas = dict[str, Tensor]
"""By name ("producer", "gate"): (kept, columns [+ 1]), changes of a map's rows, and of its bias in the last column."""


@dataclass(frozen=True)
class Producer:
    """A map into the hidden tensor, its kept rows only: h = scale * (weight x) + shift.

    Attributes:
        map: its geometry.
        weight: (kept, d_in) or (kept, d_in, kh, kw).
        scale: (kept,) of a BatchNorm behind it; None for 1.
        shift: (kept,) of the BatchNorm or the bias; None for 0.
        held: (kept,) that bias, or the BatchNorm's shift; None where there is none.
    """

    map: LinearMap
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    held: Tensor | None

    @property
    def free(self) -> bool:
        """Whether the shift may change: there is something to hold it."""
        return self.held is not None

    def __call__(self, x: Tensor) -> Tensor:
        """The hidden tensor before the activation."""
        return _affine(_linear(x, self.weight, self.map), self.scale, self.shift)

    def change(self, x: Tensor, delta: Tensor) -> Tensor:
        """By how much that changes to first order."""
        weight, shift = self.unpacked(delta)
        return _affine(_linear(x, weight, self.map), self.scale, shift)

    def unpacked(self, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and shift in a (kept, columns [+ 1]) matrix."""
        if not self.free:
            return delta.reshape(self.weight.shape), None
        return delta[:, :-1].reshape(self.weight.shape), delta[:, -1]

    def moved(self, delta: Tensor) -> Producer:
        """This producer with a change added."""
        weight, shift = self.unpacked(delta)
        if shift is None or self.shift is None or self.held is None:
            return replace(self, weight=self.weight + weight)
        return replace(self, weight=self.weight + weight, shift=self.shift + shift, held=self.held + shift)


@dataclass(frozen=True)
class Behind:
    """What a hidden tensor goes through on its way to the consumers: f, a BatchNorm, and so on.

    Attributes:
        depthwise: the convolution in front, with its kept filters; None for the first stretch.
        scale, shift: of the BatchNorm between that and f.
        f: the activation, in float32; None where there is none.
        after_scale, after_shift: of a BatchNorm behind f.
    """

    depthwise: tuple[LinearMap, Tensor] | None
    scale: Tensor | None
    shift: Tensor | None
    f: Callable[[Tensor], Tensor] | None
    after_scale: Tensor | None
    after_shift: Tensor | None


@dataclass(frozen=True)
class Layers:
    """The layers of a site, of the channels that stay.

    Attributes:
        producers: by name: "producer", and "gate" in a gated site; "path" for a linear path beside the channels.
        behind: stretches up to the consumers; the first is right behind the producers.
        consumer: the geometry of the consumers, which is the same for all.
    """

    producers: Mapping[str, Producer]
    behind: tuple[Behind, ...]
    consumer: LinearMap

    @property
    def width(self) -> int:
        """Channels that the consumers read: those that stay, and those of the linear path."""
        return sum(len(p.weight) for name, p in self.producers.items() if name != "gate")

    @classmethod
    def of(cls, model: nn.Module, site: Site, kept: Tensor, down: Tensor | None = None) -> Layers | None:
        """The layers as they are in a model that still has all channels; None where they are not of this kind.

        With `down` (rank, d_in), there is a linear path beside them.
        """
        producer = site.producer
        if producer is None or producer.groups > 1 or any(c.groups > 1 for c in site.consumers):
            return None
        if len({m.kind == "conv2d" for m in site.maps}) > 1 or len({c.kernel for c in site.consumers}) > 1:
            return None
        rows = kept + site.width if site.packed == "gate-first" else kept
        if site.gated and site.norm_before:
            return None
        if any(unusual_padding(model.get_submodule(m.name)) is not None for m in site.maps):
            return None
        producers = {"producer": _producer(model, producer, rows, site.norm_before, kept)}
        if site.gate is not None:
            producers["gate"] = _producer(model, site.gate, kept, "", kept)
        elif site.packed:
            other = kept + site.width if site.packed == "up-first" else kept
            producers["gate"] = _producer(model, producer, other, "", kept)
        if down is not None:
            weight = down.to(producers["producer"].weight).reshape(
                len(down), -1, *[1] * 2 * (producer.kind == "conv2d")
            )
            producers["path"] = Producer(producer, weight, None, None, None)
        n = site.width
        after = _norm(model, site.norm_after, kept)
        behind = [Behind(None, None, None, _function(model, site.activation, kept, n, site.activation_params), *after)]
        for between in site.between:
            weight = weight_of(model.get_submodule(between.map.name))[kept].float()
            before = _norm(model, between.norm_before, kept)
            bias = bias_of(model.get_submodule(between.map.name))
            if bias is not None:
                shift = bias[kept].float() * (1.0 if before[0] is None else before[0])
                before = (before[0], shift if before[1] is None else shift + before[1])
            f = _function(model, between.activation, kept, n, between.activation_params)
            after = _norm(model, between.norm_after, kept)
            behind.append(Behind((between.map, weight), *before, f, *after))
        return cls(producers, tuple(behind), site.consumers[0])

    def moved(self, deltas: Deltas) -> Layers:
        """These layers with changed producers."""
        return Layers({n: p.moved(deltas[n]) for n, p in self.producers.items()}, self.behind, self.consumer)

    def hidden(self, x: Tensor) -> Tensor:
        """What the consumers read."""
        return self._run(x)[0]

    def linearised(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
        """What the consumers read; the slope at each producer's hidden tensor; the slopes of the later activations."""
        return self._run(x, slopes=True)

    def _run(self, x: Tensor, slopes: bool = False) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
        first, later = self.behind[0], self.behind[1:]
        found: dict[str, Tensor] = {}
        if "gate" in self.producers:
            up = self.producers["producer"](x)
            f, slope = _sloped(first.f, self.producers["gate"](x), slopes)
            z = f * up
            if slope is not None:
                found = {"producer": f, "gate": slope * up}
        else:
            z, slope = _sloped(first.f, self.producers["producer"](x), slopes)
            if slope is not None:
                found = {"producer": slope}
        z = _affine(z, first.after_scale, first.after_shift)
        others = []
        for stretch in later:
            assert stretch.depthwise is not None
            h = _affine(_depthwise(z, *stretch.depthwise), stretch.scale, stretch.shift)
            z, slope = _sloped(stretch.f, h, slopes)
            z = _affine(z, stretch.after_scale, stretch.after_shift)
            others.append(slope)
        if "path" in self.producers:
            linear = self.producers["path"](x)
            z = torch.cat([z, linear], 1)
            if slopes:
                found["path"] = torch.ones_like(linear)
        return z, found, others

    def change(self, x: Tensor, slopes: Mapping[str, Tensor], others: list[Tensor | None], deltas: Deltas) -> Tensor:
        """By how much what the consumers read changes to first order."""
        first, later = self.behind[0], self.behind[1:]
        parts = [slopes[name] * p.change(x, deltas[name]) for name, p in self.producers.items() if name != "path"]
        z = _affine(sum(parts[1:], parts[0]), first.after_scale, None)
        for stretch, slope in zip(later, others, strict=True):
            assert stretch.depthwise is not None
            z = _affine(_depthwise(z, *stretch.depthwise), stretch.scale, None)
            z = _affine(z if slope is None else slope * z, stretch.after_scale, None)
        return (
            z if "path" not in self.producers else torch.cat([z, self.producers["path"].change(x, deltas["path"])], 1)
        )


@dataclass(frozen=True)
class Reconstruction:
    """What was found.

    Attributes:
        layers: with the producers found.
        weight: (d, kept * taps [+ rank]), the consumers one above the other; their columns for the path come last.
        bias: (d,).
        before, after: error on held-out rows, in units of the metric, with the producers as they were and as found.
    """

    layers: Layers
    weight: Tensor
    bias: Tensor
    before: float
    after: float

    def added_to(self, fit: Fit) -> Fit:
        """A fit of consumers with these producers' rows and biases, and this path."""
        found: dict[str, Tensor | None] = {}
        for name, p in self.layers.producers.items():
            found[name] = p.weight.cpu()
            found[f"{name}_bias"] = None if p.held is None else p.held.cpu()
        return replace(
            fit,
            producer=found["producer"],
            producer_bias=found["producer_bias"],
            gate=found.get("gate"),
            gate_bias=found.get("gate_bias"),
            down=found.get("path", fit.down),
        )


def reconstruct(
    layers: Layers,
    rows: Sequence[Rows],
    held: Sequence[Rows],
    root: Tensor,
    *,
    ridge: float,
    intercept: bool,
    steps: int = STEPS,
    iterations: int = ITERATIONS,
) -> Reconstruction:
    """Producers and consumers with which a site gives most nearly what it should.

    Args:
        layers: to begin with.
        rows: to fit.
        held: to choose by: the step at which their error is least is taken.
        root: (d, d), R with R R^T the weight of errors.
        ridge: of the consumers' least squares.
        intercept: whether the consumers have one.
        steps, iterations: at most.

    Raises:
        FitError: the rows are too few or not finite.
    """
    root = root.float()
    weight, bias = _solved(layers, rows, ridge, intercept)
    error, first = _error(layers, rows, weight, bias, root), _error(layers, held, weight, bias, root)
    best, least, damping = layers, first, _DAMPING
    for _ in range(steps):
        trial = layers.moved(_step(layers, rows, weight, bias, root, damping, iterations))
        w, b = _solved(trial, rows, ridge, intercept)
        found = _error(trial, rows, w, b, root)
        if not found < error:
            damping *= 5
            continue
        layers, weight, bias, error, damping = trial, w, b, found, max(damping / 3, _LEAST_DAMPING)
        outside = _error(layers, held, weight, bias, root)
        enough = outside > _WORTHWHILE * least
        if outside < least:
            best, least = layers, outside
        if enough:
            break
    weight, bias = _solved(best, [*rows, *held], ridge, intercept)
    return Reconstruction(best, weight, bias, first, least)


def _solved(layers: Layers, rows: Sequence[Rows], ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """The consumers' weight (d, columns) and bias (d,) by ridge least squares, float32."""
    consumer, width = layers.consumer, layers.width
    total: Gram | None = None
    step = thinned(sum(r.positions for r in rows), width, consumer.taps)
    for each in rows:
        for part in each.chunks(width * consumer.taps):
            z, y = patches(layers.hidden(part.x), consumer), flat(part.y, consumer.kind == "conv2d")
            seen = Gram.of(z[::step], y[::step], quick=True)
            total = seen if total is None else total + seen
    if total is None:
        total = Gram(width * consumer.taps, 1)
    moments = total.over_processes().centred(intercept)
    weight = _ridge_fit(moments, ridge)
    return weight.float(), (moments.mean_y - weight @ moments.mean_z).float()


def _ridge_fit(moments: Centred, ridge: float) -> Tensor:
    """The fit with a larger ridge where these moments, of thinned float32 rows, need one."""
    for factor in (1.0, 10.0, 100.0):
        try:
            return moments.fit(factor * ridge)
        except FitError:
            continue
    return moments.fit(max(1e-2, 1000.0 * ridge))


def _error(layers: Layers, rows: Sequence[Rows], weight: Tensor, bias: Tensor, root: Tensor) -> float:
    """The mean over positions of the squared weighted error."""
    sums = torch.zeros(2, dtype=torch.float64, device=root.device)
    for part in _parts(layers, rows):
        sums[0] += _residual(layers, part, weight, bias, root, layers.hidden(part.x)).square().sum().double()
        sums[1] += part.positions
    total, count = over_processes(sums).tolist()
    return float(total / max(1.0, count))


def _residual(layers: Layers, part: Rows, weight: Tensor, bias: Tensor, root: Tensor, z: Tensor) -> Tensor:
    missing = part.y - _affine(_linear(z, _kernel(weight, layers.consumer), layers.consumer), None, bias)
    return _weighted(missing, root)


def _step(
    layers: Layers,
    rows: Sequence[Rows],
    weight: Tensor,
    bias: Tensor,
    root: Tensor,
    damping: float,
    iterations: int,
) -> Deltas:
    """One damped Gauss-Newton step for the producers."""
    consumer = _kernel(root.T @ weight, layers.consumer)
    seen = []
    slopes = dict.fromkeys(layers.producers, torch.zeros(()))
    inputs: Tensor | float = 0.0
    positions = 0
    for part in _parts(layers, rows):
        z, found, others = layers.linearised(part.x)
        seen.append((part.x, found, others, _residual(layers, part, weight, bias, root, z)))
        for name, slope in found.items():
            slopes[name] = slopes[name] + _flat(slope).square().sum(0)
        inputs = inputs + _input_moments(layers, part.x)
        positions += part.positions
    count = float(over_processes(torch.tensor([float(positions)]))[0])
    moments = over_processes(torch.as_tensor(inputs)) / count
    moments += _INPUT_RIDGE * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments.double())).to(moments)
    size = consumer.transpose(0, 1).flatten(1).square().sum(1)
    sizes = {}
    for name, producer in layers.producers.items():
        scale = 1.0 if producer.scale is None else producer.scale.square()
        own = size[-len(producer.weight) :] if name == "path" else size[: len(producer.weight)]
        sizes[name] = over_processes(slopes[name]) / count * own * scale + _TINY

    def fold(of: Callable[[Tensor, Tensor], Tensor], deltas: Deltas) -> Deltas:
        """The gradient, by the deltas, of a sum over positions of `of(change of the outputs, residual)`."""
        given = {name: d.detach().requires_grad_() for name, d in deltas.items()}
        total = {name: torch.zeros_like(d) for name, d in deltas.items()}
        for x, found, others, residual in seen:
            with torch.enable_grad():
                change = _linear(layers.change(x, found, others, given), consumer, layers.consumer)
                gradients = torch.autograd.grad(of(change, residual).sum(), list(given.values()))
            for name, gradient in zip(given, gradients, strict=True):
                total[name] += gradient
        return {name: over_processes(t) / count for name, t in total.items()}

    def curvature(deltas: Deltas) -> Deltas:
        products = fold(lambda change, _: change.square() / 2, deltas)
        return {n: t + damping * sizes[n][:, None] * (deltas[n] @ moments[n_cut(n)]) for n, t in products.items()}

    def n_cut(name: str) -> tuple[slice, slice]:
        columns = slice(None) if layers.producers[name].free else slice(0, _columns(layers, name))
        return columns, columns

    def conditioned(deltas: Deltas) -> Deltas:
        return {n: (t / sizes[n][:, None]) @ inverse[n_cut(n)] for n, t in deltas.items()}

    zeros = {
        name: p.weight.new_zeros(len(p.weight), _columns(layers, name) + p.free) for name, p in layers.producers.items()
    }
    gradient = fold(lambda change, residual: change * residual, zeros)
    return _conjugate_gradients(curvature, conditioned, gradient, iterations)


def _conjugate_gradients(
    times: Callable[[Deltas], Deltas], conditioned: Callable[[Deltas], Deltas], right: Deltas, iterations: int
) -> Deltas:
    """An approximate solution of `times(x) = right`, with a preconditioner."""
    found = {name: torch.zeros_like(t) for name, t in right.items()}
    left = right
    turned = conditioned(left)
    direction, size = turned, _dot(left, turned)
    for _ in range(iterations):
        product = times(direction)
        curved = _dot(direction, product)
        if not curved > 0:
            break
        length = size / curved
        found = {name: t + length * direction[name] for name, t in found.items()}
        left = {name: t - length * product[name] for name, t in left.items()}
        turned = conditioned(left)
        new = _dot(left, turned)
        direction = {name: t + new / size * direction[name] for name, t in turned.items()}
        size = new
    return found


def _dot(a: Deltas, b: Deltas) -> float:
    return sum(float((t.double() * b[name].double()).sum()) for name, t in a.items())


def _parts(layers: Layers, rows: Sequence[Rows]) -> Iterator[Rows]:
    width = layers.width
    for each in rows:
        yield from each.chunks(width)


def _columns(layers: Layers, name: str) -> int:
    return layers.producers[name].weight[0].numel()


def _input_moments(layers: Layers, x: Tensor) -> Tensor:
    """(columns + 1, columns + 1) sums of products of what a producer reads at a position, and of 1."""
    m = layers.producers["producer"].map
    read = patches(x, m)
    step = thinned(len(read), m.d_in, m.taps)
    read = F.pad(read[::step], (0, 1), value=1.0)
    return step * (read.T @ read)


def _producer(model: nn.Module, m: LinearMap, rows: Tensor, norm: str, kept: Tensor) -> Producer:
    module = model.get_submodule(m.name)
    bias = bias_of(module)
    scale, shift = _norm(model, norm, kept)
    holder = module if not norm else model.get_submodule(norm)
    held = cast("Tensor | None", getattr(holder, "bias", None))
    if bias is not None:
        own = bias[rows].float()
        own = own if scale is None else own * scale
        shift = own if shift is None else shift + own
    weight = weight_of(module)[rows].float()
    return Producer(m, weight, scale, shift, None if held is None else held.detach()[kept if norm else rows].float())


def _norm(model: nn.Module, name: str, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a BatchNorm at the kept channels, float32; None for both where there is no norm."""
    if not name:
        return None, None
    norm = model.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = None if norm.weight is None else norm.weight.detach()
    bias = None if norm.bias is None else norm.bias.detach()
    scale, shift = norm_as_affine(norm.running_mean, norm.running_var, weight, bias, norm.eps)
    return scale[kept].float(), shift[kept].float()


def _function(
    model: nn.Module, place: Place | None, kept: Tensor, n: int, own: int
) -> Callable[[Tensor], Tensor] | None:
    """The activation for the kept channels alone; one that has parameters sees all channels, the others zero."""
    if place is None:
        return None
    with attachment.exposed(model, [place]) as modules:
        f = copy.deepcopy(modules[place]).float().eval()
    for parameter in f.parameters():
        parameter.requires_grad_(False)
    if own <= 1:
        return lambda h: f(h.clone())

    def on_kept(h: Tensor) -> Tensor:
        full = h.new_zeros(h.shape[0], n, *h.shape[2:]).index_copy(1, kept, h)
        seen: Tensor = f(full)
        return seen.index_select(1, kept)

    return on_kept


def _sloped(f: Callable[[Tensor], Tensor] | None, h: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """f(h) and, where asked for, f'(h)."""
    if f is None:
        return h, None
    if not slopes:
        return f(h), None
    with torch.enable_grad():
        given = h.detach().requires_grad_()
        z = f(given)
        (slope,) = torch.autograd.grad(z.sum(), given)
    return z.detach(), slope


def _linear(x: Tensor, weight: Tensor, m: LinearMap) -> Tensor:
    if m.kind == "conv2d":
        return F.conv2d(x, weight, None, m.stride, m.padding, m.dilation)
    return F.linear(x, weight)


def _depthwise(x: Tensor, m: LinearMap, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, m.stride, m.padding, m.dilation, groups=x.shape[1])


def _kernel(weight: Tensor, m: LinearMap) -> Tensor:
    """A (d, columns) matrix as the weight of a map."""
    return weight.reshape(len(weight), -1, *m.kernel) if m.kind == "conv2d" else weight


def _weighted(y: Tensor, root: Tensor) -> Tensor:
    weighted: Tensor = torch.einsum("n d ..., d e -> n e ...", y, root)
    return weighted


def _affine(t: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        t = t * _vector(scale, t)
    return t if shift is None else t + _vector(shift, t)


def _vector(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 2))


def _flat(t: Tensor) -> Tensor:
    """(positions, channels) of a tensor whose channels are in dimension 1."""
    return flat(t, t.dim() > 2)


def over_processes(sums: Tensor) -> Tensor:
    """The sum over all processes of `torch.distributed`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums

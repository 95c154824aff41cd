"""A narrowed site fitted as a whole: its producers too, so that the channels that stay can become others.

    layers = SiteLayers.of(model, site, kept)
    found = reconstruct(layers, rows, held, root, ridge=1e-3, intercept=True)
    fit = found.added_to(fit)

For fixed producers ridge least squares gives the consumers (variable projection); the producers follow by damped
Gauss-Newton steps towards the same outputs,

    (J^T J + a D) delta = J^T r,

with J the derivative of the weighted outputs by the producers' rows, r what is missing of them, and D a diagonal of
slopes times the moments of the inputs. The steps are found by conjugate gradients, so that only products with J are
needed, and D is the preconditioner. No labels and no gradient through the rest of the network.

The rows are those of all processes: each adds up its own, and one without rows takes part in every sum.

References: Levenberg, A method for the solution of certain non-linear problems in least squares, 1944; Hestenes and
Stiefel, Methods of conjugate gradients for solving linear systems, 1952; Golub and Pereyra, The differentiation of
pseudo-inverses and nonlinear least squares problems whose variables separate, 1973, for solving for the consumers
within each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from shallower.calibrating.grams import Centred, Gram
from shallower.calibrating.patches import flat, patches, thinned
from shallower.calibrating.site_grams import SiteRows
from shallower.core.processes import summed, summed_over_processes
from shallower.errors import FitError
from shallower.methods.squeezing.site_layers import Deltas, SiteLayers, linear, vector
from shallower.planning.fits import Fit
from shallower.sites import LinearMap

STEPS = 4
"""Gauss-Newton steps at most."""

ITERATIONS = 8
"""Conjugate gradient iterations in each step."""

_DAMPING = 1e-2
_LEAST_DAMPING = 1e-4
_INPUT_RIDGE = 1e-3
_WORTHWHILE = 0.98
"""A step that leaves more of the held-out error than this is the last."""

_LEAST_NORM = 1e-12


@dataclass(frozen=True)
class Reconstruction:
    """What was found.

    Attributes:
        layers: with the producers found.
        weight: (d, kept * taps [+ rank]), the consumers one above the other; their columns for the path come last.
        bias: (d,).
        before, after: error on held-out rows, in units of the metric, with the producers as they were and as found.
    """

    layers: SiteLayers
    weight: Tensor
    bias: Tensor
    before: float
    after: float

    def added_to(self, fit: Fit) -> Fit:
        """A fit of consumers with these producers' rows and biases, and this path."""
        found: dict[str, Tensor | None] = {}
        for name, producer in self.layers.producers.items():
            found[name] = producer.weight.cpu()
            found[f"{name}_bias"] = None
            if producer.held is not None:
                found[f"{name}_bias"] = producer.held.cpu()
        return replace(
            fit,
            producer=found["producer"],
            producer_bias=found["producer_bias"],
            gate=found.get("gate"),
            gate_bias=found.get("gate_bias"),
            down=found.get("path", fit.down),
        )


def reconstruct(
    layers: SiteLayers,
    rows: Sequence[SiteRows],
    held: Sequence[SiteRows],
    root: Tensor,
    *,
    ridge: float,
    intercept: bool,
    steps: int = STEPS,
    iterations: int = ITERATIONS,
) -> Reconstruction:
    """Producers and consumers with which a site's outputs are most nearly what they should be.

    Args:
        layers: to begin with.
        rows: to fit; those of this process.
        held: to choose by: the step at which their error is least is taken.
        root: (d, d), R with R R^T the weight of errors.
        ridge: of the consumers' least squares.
        intercept: whether the consumers have one.
        steps, iterations: at most.

    Raises:
        FitError: the rows are too few or not finite.
    """
    root = root.float()
    fitted = _consumers(layers, rows, ridge, intercept, len(root))
    error, first = _error(layers, rows, fitted, root), _error(layers, held, fitted, root)
    best, least, damping = layers, first, _DAMPING
    for _ in range(steps):
        problem = _Linearised(layers, rows, fitted, root, damping)
        trial = layers.moved(problem.unpacked(_conjugate_gradients(problem, iterations)))
        refitted = _consumers(trial, rows, ridge, intercept, len(root))
        found = _error(trial, rows, refitted, root)
        if not found < error:
            damping *= 5
            continue
        layers, fitted, error = trial, refitted, found
        damping = max(damping / 3, _LEAST_DAMPING)
        outside = _error(layers, held, fitted, root)
        enough = outside > _WORTHWHILE * least
        if outside < least:
            best, least = layers, outside
        if enough:
            break
    weight, bias = _consumers(best, [*rows, *held], ridge, intercept, len(root))
    return Reconstruction(best, weight, bias, first, least)


_Fitted = tuple[Tensor, Tensor]
"""The consumers' weight (d, columns) and bias (d,), float32."""


def _consumers(layers: SiteLayers, rows: Sequence[SiteRows], ridge: float, intercept: bool, d: int) -> _Fitted:
    """The consumers by ridge least squares, W = C_yz (C_zz + ridge)^-1."""
    consumer, columns = layers.consumer, layers.width * layers.consumer.taps
    device = layers.producers["producer"].weight.device
    total = Gram(columns, d, quick=True, device=device)
    seen = sum(each.positions for each in rows)
    step = thinned(int(summed_over_processes(seen)[0]), layers.width, consumer.taps)
    for each in rows:
        for part in each.chunks(columns):
            z, y = patches(layers.hidden(part.x), consumer), flat(part.y, consumer.kind == "conv2d")
            total = total.seen(z[::step], y[::step])
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


def _error(layers: SiteLayers, rows: Sequence[SiteRows], fitted: _Fitted, root: Tensor) -> float:
    """The mean over positions of the squared weighted error."""
    total = positions = 0.0
    for part in _row_parts(layers, rows):
        residual = _missing_output(layers, part, fitted, root, layers.hidden(part.x))
        total += float(residual.square().sum().double())
        positions += part.positions
    total, positions = summed_over_processes(total, positions)
    return total / max(1.0, positions)


def _missing_output(layers: SiteLayers, part: SiteRows, fitted: _Fitted, root: Tensor, z: Tensor) -> Tensor:
    """What is missing of the outputs, in units in which all errors count alike: R^T (y - W z - b)."""
    weight, bias = fitted
    given = linear(z, _kernel(weight, layers.consumer), layers.consumer)
    missing = part.y - given - vector(bias, given)
    weighted: Tensor = torch.einsum("n d ..., d e -> n e ...", missing, root)
    return weighted


class _Linearised:
    """The squared error around the present producers, to first order in a change of their rows.

    A change is one flat vector, see `unpacked`.

    Attributes:
        layers: around which it is.
        damping: a, see the module.
    """

    def __init__(
        self, layers: SiteLayers, rows: Sequence[SiteRows], fitted: _Fitted, root: Tensor, damping: float
    ) -> None:
        self.layers = layers
        self.damping = damping
        self._consumer = _kernel(root.T @ fitted[0], layers.consumer)
        self._seen: list[tuple[Tensor, dict[str, Tensor], list[Tensor], Tensor]] = []
        producer = layers.producers["producer"]
        moments = producer.weight.new_zeros(producer.columns + 1, producer.columns + 1)
        slopes: dict[str, Tensor] = {}
        for name, made in layers.producers.items():
            slopes[name] = made.weight.new_zeros(len(made.weight))
        positions = 0
        for part in _row_parts(layers, rows):
            z, found, later = layers.linearised(part.x)
            self._seen.append((part.x, found, later, _missing_output(layers, part, fitted, root, z)))
            for name, slope in found.items():
                slopes[name] += flat(slope, slope.dim() > 2).square().sum(0)
            moments += _input_moments(part.x, producer.map)
            positions += part.positions
        self._count = summed_over_processes(positions)[0]
        self._moments = summed(moments).to(moments) / self._count
        self._moments.diagonal().add_(_INPUT_RIDGE * self._moments.diagonal().mean())
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(self._moments.double())).to(moments)
        self._sizes = self._diagonal(slopes)

    def _diagonal(self, slopes: Deltas) -> Deltas:
        """The weight of a channel's hidden tensor in the error: mean f'^2, times its consumers' columns, squared."""
        weights = self._consumer.transpose(0, 1).flatten(1).square().sum(1)
        sizes: dict[str, Tensor] = {}
        for name, producer in self.layers.producers.items():
            kept = len(producer.weight)
            own = weights[:kept]
            if name == "path":  # the consumers read it behind the channels
                own = weights[-kept:]
            if producer.scale is not None:
                own = own * producer.scale.square()
            sizes[name] = summed(slopes[name]).to(own) / self._count * own + _LEAST_NORM
        return sizes

    def unpacked(self, change: Tensor) -> Deltas:
        """The changes of the producers in one vector of all."""
        deltas: dict[str, Tensor] = {}
        start = 0
        for name, producer in self.layers.producers.items():
            rows, columns = producer.unknowns
            deltas[name] = change[start : start + rows * columns].view(rows, columns)
            start += rows * columns
        return deltas

    def _packed(self, deltas: Deltas) -> Tensor:
        return torch.cat([delta.flatten() for delta in deltas.values()])

    @property
    def gradient(self) -> Tensor:
        """J^T r."""
        unknowns = sum(math.prod(p.unknowns) for p in self.layers.producers.values())
        return self._folded(lambda change, residual: change * residual, self._consumer.new_zeros(unknowns))

    def times(self, change: Tensor) -> Tensor:
        """(J^T J + a D) times a change."""
        product = self._folded(lambda outputs, _: outputs.square() / 2, change)
        damped: dict[str, Tensor] = {}
        for name, delta in self.unpacked(change).items():
            columns = delta.shape[1]
            damped[name] = self._sizes[name][:, None] * (delta @ self._moments[:columns, :columns])
        return product + self.damping * self._packed(damped)

    def conditioned(self, change: Tensor) -> Tensor:
        """D^-1 times a change."""
        divided: dict[str, Tensor] = {}
        for name, delta in self.unpacked(change).items():
            columns = delta.shape[1]
            divided[name] = (delta / self._sizes[name][:, None]) @ self._inverse[:columns, :columns]
        return self._packed(divided)

    def _folded(self, of: Callable[[Tensor, Tensor], Tensor], change: Tensor) -> Tensor:
        """The gradient, by a change, of the mean over positions of `of(change of the outputs, residual)`."""
        total = torch.zeros_like(change)
        given = change.detach().requires_grad_()
        for x, slopes, later, residual in self._seen:
            with torch.enable_grad():
                hidden = self.layers.change(x, slopes, later, self.unpacked(given))
                outputs = linear(hidden, self._consumer, self.layers.consumer)
                (gradient,) = torch.autograd.grad(of(outputs, residual).sum(), given)
            total += gradient
        return summed(total).to(total) / self._count


def _conjugate_gradients(problem: _Linearised, iterations: int) -> Tensor:
    """An approximate solution of problem.times(x) = problem.gradient, preconditioned by `problem.conditioned`."""
    left = problem.gradient
    found = torch.zeros_like(left)
    turned = problem.conditioned(left)
    direction, size = turned, _dot(left, turned)
    for _ in range(iterations):
        product = problem.times(direction)
        curved = _dot(direction, product)
        if not curved > 0:
            break
        length = size / curved
        found = found + length * direction
        left = left - length * product
        turned = problem.conditioned(left)
        after = _dot(left, turned)
        direction = turned + after / size * direction
        size = after
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _row_parts(layers: SiteLayers, rows: Sequence[SiteRows]) -> Iterator[SiteRows]:
    width = layers.width
    for each in rows:
        yield from each.chunks(width)


def _input_moments(x: Tensor, m: LinearMap) -> Tensor:
    """(columns + 1, columns + 1) sums of products of what a producer reads at a position, and of 1."""
    read = patches(x, m)
    step = thinned(len(read), m.d_in, m.taps)
    read = F.pad(read[::step], (0, 1), value=1.0)
    return step * (read.T @ read)


def _kernel(weight: Tensor, m: LinearMap) -> Tensor:
    """A (d, columns) matrix as the weight of a map."""
    if m.kind == "conv2d":
        return weight.reshape(len(weight), -1, *m.kernel)
    return weight

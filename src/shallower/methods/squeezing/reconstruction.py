"""A narrowed site fitted as a whole: its producers too, so that the channels that stay can become others.

    layers = SiteLayers.of(model, site, kept)
    found = reconstruct(layers, rows, held, root, ridge=1e-3, intercept=True)
    fit = found.added_to(fit)

For fixed producers ridge least squares gives the consumers (variable projection); the producers follow by damped
Gauss-Newton steps towards the same outputs,

    (J^T J + a D) delta = J^T r,

with J the derivative of the weighted outputs by the producers' rows, and r what is missing of them. Were the slopes
independent of the inputs, J^T J would be G x A: A are the moments of the inputs, and G, between the producers' rows,
those of the slopes times the products of the consumers' columns. So D is diag(G) x A, and the steps are found by
conjugate gradients, which need only products with J, preconditioned by (G + a diag(G)) x A. No labels and no gradient
through the rest of the network.

The rows are those of all processes: each adds up its own, and one without rows takes part in every sum.

References: Levenberg, A method for the solution of certain non-linear problems in least squares, 1944; Hestenes and
Stiefel, Methods of conjugate gradients for solving linear systems, 1952; Golub and Pereyra, The differentiation of
pseudo-inverses and nonlinear least squares problems whose variables separate, 1973, for solving for the consumers
within each step; Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015,
for G x A; Byrd, Chin, Neveitt and Nocedal, On the use of stochastic Hessian information, 2011, for curvature from some
of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

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

_CURVATURE = 64
_THINNEST = 4
"""Outputs for each number to be fitted that tell the curvature, of at least one row in so many."""

_Slopes = tuple[Tensor, dict[str, Tensor], list[Tensor]]
"""What producers read; the slopes at their hidden tensors; those of the later activations."""


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

    A change is one flat vector, see `unpacked`. The gradient is of all rows, the curvature of some, which are enough
    for the direction of a step.

    Attributes:
        layers: around which it is.
        damping: a, see the module.
        gradient: J^T r.
    """

    def __init__(
        self, layers: SiteLayers, rows: Sequence[SiteRows], fitted: _Fitted, root: Tensor, damping: float
    ) -> None:
        self.layers = layers
        self.damping = damping
        self._consumer = _kernel(root.T @ fitted[0], layers.consumer)
        self._seen: list[_Slopes] = []
        producer = layers.producers["producer"]
        weight = producer.weight
        gradient = weight.new_zeros(sum(math.prod(p.unknowns) for p in layers.producers.values()))
        made = weight.new_zeros(self._rows, self._rows)
        read = weight.new_zeros(producer.columns + 1, producer.columns + 1)
        (positions,) = summed_over_processes(sum(each.positions for each in rows))
        thin = min(_THINNEST, max(1, int(positions * len(root) / (_CURVATURE * len(gradient)))))
        chosen = 0
        for part in _row_parts(layers, rows):
            z, found, later = layers.linearised(part.x)
            missing = _missing_output(layers, part, fitted, root, z)
            seen = part.x, found, later
            gradient += self._pulled_back(seen, gradient, partial(torch.mul, missing))
            sloped = torch.cat([flat(slope, slope.dim() > 2) for slope in found.values()], 1)
            made += sloped.T @ sloped
            read += _input_moments(part.x, producer.map)
            self._seen.append(_thinned(seen, thin))
            chosen += SiteRows(part.x[::thin], part.y[::thin]).positions
        (self._count,) = summed_over_processes(chosen)
        self.gradient = summed(gradient).to(gradient) / positions
        self._read = summed(read).to(read) / positions
        self._read.diagonal().add_(_INPUT_RIDGE * self._read.diagonal().mean())
        self._read_inverse = _inverted(self._read)
        coupled = summed(made).to(made) / positions * self._coupling()
        self._sizes = coupled.diagonal() + _LEAST_NORM
        coupled.diagonal().add_(damping * self._sizes + _INPUT_RIDGE * self._sizes.mean())
        self._made_inverse = _inverted(coupled)

    @property
    def _rows(self) -> int:
        return sum(len(producer.weight) for producer in self.layers.producers.values())

    def _coupling(self) -> Tensor:
        """(rows, rows) of all producers: products of the columns with which the consumers read them."""
        columns = self._consumer.transpose(0, 1).flatten(1)
        found: list[Tensor] = []
        for name, producer in self.layers.producers.items():
            kept = len(producer.weight)
            own = columns[:kept]
            if name == "path":  # the consumers read it behind the channels
                own = columns[-kept:]
            if producer.scale is not None:
                own = own * producer.scale[:, None]
            found.append(own)
        every = torch.cat(found)
        return every @ every.T

    def unpacked(self, change: Tensor) -> Deltas:
        """The changes of the producers in one vector of all."""
        deltas: dict[str, Tensor] = {}
        start = 0
        for name, producer in self.layers.producers.items():
            rows, columns = producer.unknowns
            deltas[name] = change[start : start + rows * columns].view(rows, columns)
            start += rows * columns
        return deltas

    def times(self, change: Tensor) -> Tensor:
        """(J^T J + a D) times a change."""
        total = torch.zeros_like(change)
        for seen in self._seen:
            total += self._pulled_back(seen, change, lambda outputs: outputs.square() / 2)
        damped = self._sizes[:, None] * (self._stacked(change) @ self._read)
        return summed(total).to(total) / self._count + self.damping * self._packed(damped)

    def conditioned(self, change: Tensor) -> Tensor:
        """(G + a diag(G))^-1 times a change times A^-1."""
        return self._packed(self._made_inverse @ self._stacked(change) @ self._read_inverse)

    def _stacked(self, change: Tensor) -> Tensor:
        """The rows of all producers one above the other, a column for the shift behind; 0 where there is none."""
        columns = len(self._read)
        return torch.cat([F.pad(delta, (0, columns - delta.shape[1])) for delta in self.unpacked(change).values()])

    def _packed(self, stacked: Tensor) -> Tensor:
        found: list[Tensor] = []
        start = 0
        for producer in self.layers.producers.values():
            rows, columns = producer.unknowns
            found.append(stacked[start : start + rows, :columns].flatten())
            start += rows
        return torch.cat(found)

    def _pulled_back(self, seen: _Slopes, change: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient, by a change, of the sum over positions of `of(change of the outputs)`."""
        given = change.detach().requires_grad_()
        with torch.enable_grad():
            hidden = self.layers.change(*seen, self.unpacked(given))
            outputs = linear(hidden, self._consumer, self.layers.consumer)
            (gradient,) = torch.autograd.grad(of(outputs).sum(), given)
        found: Tensor = gradient
        return found


def _thinned(seen: _Slopes, thin: int) -> _Slopes:
    """One row in so many."""
    x, slopes, later = seen
    some = {name: slope[::thin].clone() for name, slope in slopes.items()}
    return x[::thin].clone(), some, [slope[::thin].clone() for slope in later]


def _inverted(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix, computed in float64."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix.double())).to(matrix)


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

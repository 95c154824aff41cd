"""Linear maps: one run of channels is added up, another begins.

F.linear(x, weight, bias)   # the last axis of x goes with the columns of the weight; the rows are new channels
torch.einsum("bhid,bhjd->bhij", q, k)
"""

from __future__ import annotations

from shallower.finding.channels.einsums import einsum_terms
from shallower.finding.channels.following import Axes, Following, UnknownUseError, rule
from shallower.finding.channels.layout import ONE, Layout, close, divide, fixed, tie, within
from shallower.finding.channels.rules.arguments import given, integer, of_axis, optional, tensor
from shallower.finding.channels.rules.images import close_pixels, pixels
from shallower.recording.tracing import Call


@rule("linear")
def linear(f: Following, call: Call) -> Axes:
    """y = x W^T + b."""
    *batch, features = f.axes(tensor(call, 0, "input"))
    *rows, columns = f.axes(tensor(call, 1, "weight"))
    f.contract(call, features, columns)
    if rows:
        f.write(call, rows[0], optional(call, 2, "bias"))
    return [*batch, *rows]


@rule("conv1d conv2d conv3d")
def convolution(f: Following, call: Call) -> Axes:
    """Rows (out, in / groups, taps ...); an unbatched image has no axis in front of its channels."""
    axes = f.axes(tensor(call, 0, "input"))
    rows, columns, *taps = f.axes(tensor(call, 1, "weight"))
    _close_taps(taps)
    channels = axes[-1 - len(taps)]
    _grouped(f, call, channels, columns, rows, integer(call, 6, "groups", 1))
    f.write(call, rows, optional(call, 2, "bias"))
    return [*axes[: -1 - len(taps)], rows, *_slid_over(f, call, axes[-len(taps) :], taps)]


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def transposed_convolution(f: Following, call: Call) -> Axes:
    """Rows (in, out / groups, taps ...)."""
    axes = f.axes(tensor(call, 0, "input"))
    columns, made, *taps = f.axes(tensor(call, 1, "weight"))
    groups = integer(call, 6, "groups", 1)
    _close_taps(taps)
    f.contract(call, axes[-1 - len(taps)], columns)
    if groups > 1:
        outer, _ = divide(columns, groups, columns.size // groups)
        made = within([outer, made])
    f.write(call, made, optional(call, 2, "bias"))
    return [*axes[: -1 - len(taps)], made, *_slid_over(f, call, axes[-len(taps) :], taps)]


def _close_taps(taps: Axes) -> None:
    for axis in taps:
        close(axis, "taps of a kernel")


def _slid_over(f: Following, call: Call, read: Axes, taps: Axes) -> Axes:
    """The positions over which a kernel slides; they pass where it is a single tap that goes from each to the next."""
    found: Axes = []
    for i, (axis, own) in enumerate(zip(read, taps, strict=True)):
        size = call.outputs[0].shape[i - len(read)]
        stride, padding = of_axis(given(call, 3, "stride"), i, 1), of_axis(given(call, 4, "padding"), i, 0)
        if (own.size, stride, padding, size) == (1, 1, 0, axis.size):
            found.append(axis)
        else:
            close_pixels(f, call, [axis])
            found += pixels(f, call, (size,))
    return found


def _grouped(f: Following, call: Call, channels: Layout, columns: Layout, rows: Layout, groups: int) -> None:
    """Group i of the rows reads group i of the channels: groups go whole, or all lose the same channel."""
    if groups == 1:
        f.contract(call, channels, columns)
        return
    outer, each = divide(channels, groups, channels.size // groups)
    made, _ = divide(rows, groups, rows.size // groups)
    tie(outer, made)
    if each.size > 1:
        f.contract(call, each, columns)


@rule("matmul bmm mm mv dot inner vdot")
def product(f: Following, call: Call) -> Axes:
    """Matrices, broadcast over the axes in front."""
    left, right = f.axes(tensor(call, 0, "input", "self")), f.axes(tensor(call, 1, "other", "mat2", "vec", "tensor"))
    if getattr(call.function, "__name__", "") == "__rmatmul__":
        left, right = right, left
    if call.name == "inner" and len(right) > 1:
        raise UnknownUseError
    return _multiplied(f, call, left, right)


def _multiplied(f: Following, call: Call, left: Axes, right: Axes) -> Axes:
    f.contract(call, left[-1], right[max(len(right) - 2, 0)])
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else []
    batch = f.broadcast(left[:-2], right[:-2])
    for layout in (*rows, *columns):
        f.written.append((layout, call))
    return [*batch, *rows, *columns]


@rule("addmm baddbmm addmv")
def added_product(f: Following, call: Call) -> Axes:
    """b + x W."""
    if len(call.inputs) != 3:
        raise UnknownUseError
    input, first, second = call.inputs
    made = _multiplied(f, call, f.axes(first), f.axes(second))
    return f.broadcast(made, f.axes(input))


@rule(
    """
    inv inverse pinverse solve cholesky cholesky_solve solve_triangular svd eigh eig qr det slogdet logdet matrix_exp
    linalg_inv linalg_pinv linalg_solve linalg_cholesky linalg_solve_triangular linalg_svd linalg_eigh linalg_eig
    linalg_qr linalg_det linalg_slogdet linalg_matrix_exp matrix_power linalg_matrix_power
    """
)
def decomposed(f: Following, call: Call) -> list[Axes]:
    """Matrices (..., n, m), each as a whole."""
    batch: Axes = []
    reason = f"{f.title(call)} mixes all channels of a matrix"
    for value in call.inputs:
        *own, rows, columns = f.axes(value)
        close(rows, reason)
        close(columns, reason)
        batch = f.broadcast(batch, own)
    return [[*batch, *(fixed(size, reason) for size in value.shape[len(batch) :])] for value in call.outputs]


@rule("outer ger")
def outer_product(f: Following, call: Call) -> Axes:
    """Every number by every other."""
    return [*f.axes(tensor(call, 0, "input", "self")), *f.axes(tensor(call, 1, "vec2", "other"))]


@rule("einsum")
def einsum(f: Following, call: Call) -> Axes:
    """Letters on both sides pass, the others are added up."""
    if not isinstance(call.args[0], str):
        raise UnknownUseError
    terms, made = einsum_terms(call)
    letters: dict[str, Layout] = {}
    seen: list[str] = []
    for value, term in terms:
        for letter, axis in zip(term, f.axes(value), strict=True):
            seen.append(letter)
            (letters[letter],) = f.broadcast([axis], [letters.get(letter, axis)])
    for letter, axis in letters.items():
        if letter not in made:
            f.add_up(call, axis)
        elif seen.count(letter) == 1:
            f.written.append((axis, call))
    return [letters[letter] for letter in made]


@rule("tensordot")
def tensordot(f: Following, call: Call) -> Axes:
    """Some axes of both are added up, the others stand side by side."""
    left, right = f.axes(tensor(call, 0, "a")), f.axes(tensor(call, 1, "b"))
    dims = given(call, 2, "dims")
    if isinstance(dims, int):
        dims = list(range(len(left) - dims, len(left))), list(range(dims))
    if not isinstance(dims, (tuple, list)) or len(dims) != 2:
        raise UnknownUseError
    first, second = [[dims[0]], [dims[1]]] if isinstance(dims[0], int) else dims
    first, second = [i % len(left) for i in first], [i % len(right) for i in second]
    for i, j in zip(first, second, strict=True):
        f.contract(call, left[i], right[j])
    made = [axis for i, axis in enumerate(left) if i not in first]
    return made + [axis for j, axis in enumerate(right) if j not in second]


@rule("bilinear")
def bilinear(f: Following, call: Call) -> Axes:
    """y_o = x1^T W_o x2 + b_o."""
    first, second = f.axes(tensor(call, 0, "input1")), f.axes(tensor(call, 1, "input2"))
    rows, left, right = f.axes(tensor(call, 2, "weight"))
    f.contract(call, first[-1], left)
    f.contract(call, second[-1], right)
    batch = f.broadcast(first[:-1], second[:-1])
    f.write(call, rows, optional(call, 3, "bias"))
    return [*batch, rows]


@rule("embedding")
def embedding(f: Following, call: Call) -> Axes:
    """A row for each number."""
    rows, features = f.axes(tensor(call, 1, "weight"))
    close(rows, f"{f.title(call)} picks its rows by number")
    f.written.append((features, call))
    return [*f.axes(tensor(call, 0, "input")), features]


@rule("embedding_bag")
def bag(f: Following, call: Call) -> list[Axes]:
    """Rows of a table, added up."""
    rows, features = f.axes(tensor(call, 1, "weight"))
    close(rows, f"{f.title(call)} picks its rows by number")
    f.written.append((features, call))
    f.close_axes(tensor(call, 0, "input"), "its numbers are gathered in bags")
    found: list[Axes] = []
    for value in call.outputs:
        axes: Axes = [fixed(size, "bags") for size in value.shape]
        if value is call.outputs[0]:
            axes[-1] = features
        found.append(axes)
    return found


@rule("grouped_mm")
def grouped_product(f: Following, call: Call) -> Axes:
    """x (rows, in) by one of W (experts, in, out) for each stretch of rows, or each expert's rows by its matrix."""
    rows, columns = f.axes(tensor(call, 0, "input", "self")), f.axes(tensor(call, 1, "mat2", "weight"))
    if len(rows) == len(columns) == 3:
        return _multiplied(f, call, rows, columns)
    if len(rows) != 2 or len(columns) != 3:
        raise UnknownUseError
    close(rows[0], f"{f.title(call)} divides it among experts")
    ends = optional(call, 2, "offs")
    if ends is None:
        raise UnknownUseError
    tie(columns[0], f.axes(ends)[0])
    f.contract(call, rows[1], columns[1])
    f.write(call, columns[2], optional(call, 3, "bias"))
    return [rows[0], columns[2]]


@rule("cdist")
def distances(f: Following, call: Call) -> Axes:
    """(..., n, c), (..., m, c) -> (..., n, m)."""
    left, right = f.axes(tensor(call, 0, "x1")), f.axes(tensor(call, 1, "x2"))
    f.contract(call, left[-1], right[-1])
    return [*f.broadcast(left[:-2], right[:-2]), left[-2], right[-2]]


@rule("cosine_similarity pairwise_distance")
def likeness(f: Following, call: Call) -> Axes:
    """Two tensors of one shape, one axis added up."""
    axes = f.broadcast(f.axes(tensor(call, 0, "x1")), f.axes(tensor(call, 1, "x2")))
    dim = integer(call, 2, "dim", 1) if call.name == "cosine_similarity" else -1
    axis = axes[dim]
    f.add_up(call, axis)
    if len(call.outputs[0].shape) == len(axes):
        axes[dim] = fixed(1, ONE)
    else:
        del axes[dim]
    return axes

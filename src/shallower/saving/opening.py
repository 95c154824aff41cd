"""Which dimensions of a model's inputs stay open in an exported file, and inputs of other sizes to try them with.

A dimension is written "input, number"; inputs without names have their position as text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from shallower.core.inputs import Inputs
from shallower.errors import ExportError

T = TypeVar("T")

Dynamic = Literal["auto"] | Mapping[str, Mapping[int, str]] | Sequence[Mapping[int, str]] | None
"""Which dimensions stay open: for each input, by name or in order, {dimension: its name}."""

Dimensions = Mapping[str, Mapping[int, str]]
"""For each input {dimension: a name or a symbol}."""


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return tuple(inputs), {}


def tensors_by_name(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by name.

    Raises:
        ExportError: one is no tensor, or there are none.
    """
    args, kwargs = arguments_of(inputs)
    found = {**_by_position(args), **kwargs}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"input {name} is a {type(value).__name__}: only tensors can be exported as inputs")
    if not found:
        raise ExportError("a model is exported with its example inputs, and there are none")
    return found


def _by_position(values: Iterable[T]) -> dict[str, T]:
    """Inputs without names, or what belongs to each of them, by what they are called."""
    return {str(i): value for i, value in enumerate(values)}


def wanted(inputs: Inputs, dynamic: Dynamic) -> dict[str, dict[int, str]] | None:
    """The dimensions to open and their names; None where all sizes are fixed.

    Raises:
        ExportError: `dynamic` names an input or a dimension that is not there.
    """
    if dynamic is None:
        return None
    known = tensors_by_name(inputs)
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise ExportError(f"dynamic={dynamic!r}: give 'auto', None, or the dimensions of each input")
        return {name: _usual(value) for name, value in known.items()}
    given = dynamic
    if not isinstance(given, Mapping):
        given = _by_position(given)
    for name, dims in given.items():
        if name not in known:
            raise ExportError(f"dynamic names the input {name!r}; the inputs are {', '.join(known)}")
        for dim in dims:
            if not 0 <= dim < known[name].dim():
                raise ExportError(f"dynamic: input {name} has no dimension {dim}; its shape is {shape_of(known[name])}")
    return {name: dict(given.get(name, {})) for name in known}


def _usual(value: Tensor) -> dict[int, str]:
    if _is_tokens(value):
        return {0: "batch", 1: "length"}
    if value.dim() == 0:
        return {}
    return {0: "batch"}


def _is_tokens(value: Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


def symbol_names(
    symbols: Dimensions, names: Dimensions, titles: Mapping[str, str], apart: Collection[str] = ()
) -> dict[str, str]:
    """A name for every symbol that a tracer gave to open dimensions.

    Dimensions of one symbol have one size and one name. Equal names mean equal sizes to a runtime, so symbols whose
    sizes may differ have names of their own.

        both = {"0": {1: "length"}, "1": {1: "length"}}
        symbol_names({"0": {1: "s1"}, "1": {1: "s2"}}, both, {"0": "query", "1": "document"}, ["length"])
        # {"s1": "query_length", "s2": "document_length"}

    Args:
        symbols: of the open dimensions of each input.
        names: that were asked for.
        titles: what the model calls its inputs.
        apart: the names that get the input's title in front where several symbols would have them. All inputs have
            one batch size, even where nothing in the model says so.
    """
    first: dict[str, tuple[str, str]] = {}
    for owner, dims in symbols.items():
        for dim, symbol in dims.items():
            first.setdefault(symbol, (titles[owner], names[owner][dim]))
    plain = [name for _, name in first.values()]
    found = {}
    for symbol, (title, name) in first.items():
        if name in apart and plain.count(name) > 1:
            name = f"{title}_{name}"
        found[symbol] = name
    return found


def enlarged(inputs: Inputs) -> Inputs:
    """Leading dimensions, and the lengths of matrices of integers, at least 2: a tracer takes 1 for fixed."""
    twice: dict[str, dict[int, int]] = {}
    for name, value in tensors_by_name(inputs).items():
        twice[name] = {dim: 2 for dim in _usual(value) if value.shape[dim] == 1}
    return _of_sizes(inputs, twice)


def sizes_to_check(inputs: Inputs, opened: Dimensions) -> Iterator[Inputs]:
    """The inputs, and where dimensions are open the same with other sizes, a size of its own for every name."""
    yield inputs
    if not opened:
        return
    known = tensors_by_name(inputs)
    sizes: dict[str, int] = {}
    others: dict[str, dict[int, int]] = {}
    for owner, dims in opened.items():
        others[owner] = {}
        for dim, name in dims.items():
            sizes.setdefault(name, _other(dim, known[owner].shape[dim], len(sizes)))
            others[owner][dim] = sizes[name]
    yield _of_sizes(inputs, others)


def _other(dim: int, size: int, count: int) -> int:
    """Another size: a row more; a few columns fewer or more, by how many open dimensions came before."""
    if dim == 0:
        return size + 1
    if size > 4 + count:
        return size - 2 - count
    return size + 2 + count


def _of_sizes(inputs: Inputs, sizes: Mapping[str, Mapping[int, int]]) -> Inputs:
    """The inputs with some dimensions of another size, filled by going round."""

    def one(name: str, value: Tensor) -> Tensor:
        for dim, size in sizes.get(name, {}).items():
            value = value.index_select(dim, torch.arange(size) % value.shape[dim])
        return value

    if isinstance(inputs, Tensor):
        return one("0", inputs)
    if isinstance(inputs, Mapping):
        return {name: one(name, value) for name, value in inputs.items()}
    return tuple(one(str(i), value) for i, value in enumerate(inputs))


def check_opened(names: Dimensions | None, opened: Dimensions, dynamic: Dynamic) -> None:
    """Check that the model leaves open what `dynamic` names.

    Raises:
        ExportError: it fixes one.
    """
    if names is None or isinstance(dynamic, str):
        return
    for owner, dims in names.items():
        for dim, name in dims.items():
            if dim not in opened.get(owner, {}):
                raise ExportError(
                    f"input {owner}: the model fixes dimension {dim} ({name}) to the size it has in the example "
                    "inputs. Leave it out of dynamic, or use dynamic='auto'"
                )


def shape_of(value: Tensor) -> str:
    """A shape for people: "2 x 12"."""
    return " x ".join(map(str, value.shape))


def shapes_of(inputs: Inputs) -> str:
    """The shapes of inputs for people, each once: "2 x 12 and 2 x 7"."""
    return " and ".join(dict.fromkeys(map(shape_of, tensors_by_name(inputs).values())))

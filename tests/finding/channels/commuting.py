"""Cutting commutes with an operation: what is cut from what it reads is what is missing from its result.

    Usage("a sum of two", lambda x, y: x + y, "x:2,6 y:6", "x0|x1 y0").check()

Every tensor that the function reads is a parameter, so that all of its axes are open at first. It is followed, and then
each open run is cut: the function of the cut tensors must be the result for tensors that are zero there, without those
positions. Whole numbers with a default (`heads=2`) stand for what a layer keeps as an attribute: they may follow.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shallower.finding.channels import rules  # noqa: F401
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import Layout, Run, runs, spans
from shallower.recording.tracing import trace_forward


class Holder(nn.Module):
    """A function of parameters and buffers as a module."""

    def __init__(self, function: Callable[..., Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.function, self.names = function, list(tensors)
        self.anchor = nn.Parameter(torch.zeros(1))
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, _: Tensor) -> Any:
        return self.function(**{name: getattr(self, name) for name in self.names})


@dataclass
class Followed:
    """What following a function gives: the layouts of what it reads and of what it returns."""

    inputs: dict[str, list[Layout]]
    outputs: list[list[Layout]]
    reasons: dict[str, str] = field(default_factory=dict)

    def open_runs(self) -> dict[Run, str]:
        """Each open run with the axes that it stands in, as text; not those among which is chosen (test_routing)."""
        found: dict[Run, list[str]] = {}
        for name, axes in self.inputs.items():
            for i, axis in enumerate(axes):
                for run in dict.fromkeys(runs(axis)):
                    if not run.closed and "chosen" not in run.marks:
                        found.setdefault(run, []).append(f"{name}{i}")
        for i, axis in enumerate(itertools.chain(*self.outputs)):
            for run in dict.fromkeys(runs(axis)):
                if not run.closed and "chosen" not in run.marks and run not in found:
                    found[run] = [f"out{i}"]
        return {run: " ".join(places) for run, places in found.items()}


def followed(function: Callable[..., Any], tensors: dict[str, Tensor]) -> Followed:
    """A function, followed; its result does not close anything."""
    net = Holder(function, tensors)
    f = Following(trace_forward(net, (torch.zeros(1),)), returned="")
    trace = f.trace
    held = {name: value for (_, name), value in trace.weights.items()}
    held |= {value.name: value for call in trace.calls for value in call.inputs if value.origin == "buffer"}
    inputs = {name: f.axes(held[name]) for name in tensors if name in held}
    reasons = {}
    for name, axes in inputs.items():
        for i, axis in enumerate(axes):
            reasons[f"{name}{i}"] = next((run.closed for run in runs(axis) if run.closed), "")
    return Followed(inputs, [f.axes(value) for value in trace.root.outputs], reasons)


def positions(layout: Layout, run: Run, channels: list[int]) -> set[int]:
    """Where some channels of a run stand in a layout."""
    found: set[int] = set()
    for span in spans(layout, run):
        for i, c, j in itertools.product(range(span.repeats), channels, range(span.block)):
            found.add(span.start + i * span.stride + c * span.block + j)
    return found


def cut(tensor: Tensor, axes: list[Layout], run: Run, channels: list[int]) -> Tensor:
    """A tensor without some channels of a run."""
    for dim, axis in enumerate(axes):
        gone = positions(axis, run, channels)
        kept = [i for i in range(tensor.shape[dim]) if i not in gone]
        tensor = tensor.index_select(dim, torch.tensor(kept, dtype=torch.long))
    return tensor


def zeroed(tensor: Tensor, axes: list[Layout], run: Run, channels: list[int]) -> Tensor:
    """A tensor of numbers with zeros at some channels of a run."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor
    tensor = tensor.clone()
    for dim, axis in enumerate(axes):
        gone = sorted(positions(axis, run, channels))
        tensor.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0.0)
    return tensor


def tensors_of(text: str) -> dict[str, Tensor]:
    """ "x:2,6 i:int4:3 m:bool:2,6": random numbers, whole numbers below 4, and a mask."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for item in text.split():
        name, *kind, sizes = item.split(":")
        shape = [int(size) for size in sizes.split(",") if size]
        if not kind:
            found[name] = torch.rand(shape, dtype=torch.float64) + 0.1
        elif kind[0] == "bool":
            found[name] = torch.rand(shape) < 0.5
        else:
            found[name] = torch.randint(int(kind[0][3:]), shape)
    return found


def results(value: Any) -> list[Tensor]:
    """The tensors of a result."""
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)]


@dataclass
class Usage:
    """One use of an operation.

    Attributes:
        name: for people.
        function: of tensors; whole numbers with a default may follow a cut.
        tensors: what it reads, as text.
        open: the axes that stand in each open run: "x0 y0|x1" are two.
        again: what runs on cut tensors, where the function itself holds sizes that no argument gives.
    """

    name: str
    function: Callable[..., Any]
    tensors: str
    open: str
    again: Callable[..., Any] | None = None

    def check(self) -> Followed:
        """Follow it and cut every open run."""
        tensors = tensors_of(self.tensors)
        found = followed(self.function, tensors)
        assert "|".join(found.open_runs().values()) == self.open
        for run, places in found.open_runs().items():
            for channels in ([0], [run.size - 1], list(range(1, run.size, 2))):
                self._commutes(found, tensors, run, channels, places)
        return found

    def _commutes(
        self, found: Followed, tensors: dict[str, Tensor], run: Run, channels: list[int], places: str
    ) -> None:
        axes = {name: found.inputs.get(name, []) for name in tensors}
        blank = {name: zeroed(tensor, axes[name], run, channels) for name, tensor in tensors.items()}
        small = {name: cut(tensor, axes[name], run, channels) for name, tensor in tensors.items()}
        full = results(self.function(**blank))
        wanted = [cut(result, own, run, channels) for result, own in zip(full, found.outputs, strict=True)]
        errors = []
        for numbers in self._numbers(run.size, len(channels)):
            try:
                got = results((self.again or self.function)(**small, **numbers))
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                errors.append(str(error))
                continue
            if _agree(got, wanted, only_shapes="averaged" in run.marks):
                return
            errors.append(f"{[tuple(t.shape) for t in got]}, not {[tuple(t.shape) for t in wanted]}")
        raise AssertionError(f"{self.name}: cutting {channels} of {run.size} at {places}: {errors}")

    def _numbers(self, size: int, gone: int) -> Iterator[dict[str, int]]:
        """The whole numbers of the function, as they are and as they may be after a cut."""
        given = {}
        for name, parameter in inspect.signature(self.again or self.function).parameters.items():
            if isinstance(parameter.default, int):
                value = parameter.default
                given[name] = sorted({value, value - gone, value * (size - gone) // size}, reverse=True)
        for choice in itertools.product(*given.values()):
            yield dict(zip(given, choice, strict=True))


def _agree(got: list[Tensor], wanted: list[Tensor], only_shapes: bool) -> bool:
    for first, second in zip(got, wanted, strict=True):
        if first.shape != second.shape:
            return False
        if not only_shapes and not torch.allclose(first, second, equal_nan=True):
            return False
    return True

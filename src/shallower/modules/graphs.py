"""A module's own forward as graphs of torch.fx, in which its children are leaves.

forwards = forwards_of(layer)               # or a Refusal
tensor_steps(forwards.graphs[1])            # [("linear", node), ("relu", node), ...]
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from shallower.core.trees import cloned
from shallower.errors import Refusal
from shallower.modules.written import base_forward
from shallower.recording.names import canonical, is_metadata
from shallower.recording.tracing import EXTERNALISED, Call, Frame


@dataclass
class Forwards:
    """A module's original forward as torch.fx sees it.

    Attributes:
        graphs: in train and in eval mode.
        held: parameters of the forward that have their default value in the graphs.
    """

    graphs: tuple[fx.Graph, fx.Graph]
    held: tuple[Held, ...]

    def problem_of(self, frame: Frame) -> str:
        """Why these graphs are not what ran in `frame`, "" if they are."""
        if self.steps_in(frame.module) != steps_of(frame):
            return f"torch.fx does not see what runs in the forward of {type(frame.module).__name__}"
        for held in self.held:
            if not held.holds(frame.args, frame.kwargs):
                return f"the forward of {type(frame.module).__name__} branches on its argument {held.name}"
        return ""

    def steps_in(self, owner: nn.Module) -> list[str]:
        """What the forward of `owner` calls in eval mode, in order, where places of it have become children already."""
        counts: Counter[str] = Counter()
        children: dict[tuple[str, int], str] = {}
        hidden: set[tuple[str, int]] = set()
        for calls, change in vars(owner).get(EXTERNALISED, {}).items():
            if change.hides:
                hidden.update(calls)
                children[calls[-1]] = change.child
        names: list[str] = []
        for name, _ in tensor_steps(self.graphs[1]):
            call = (name, counts[name])
            counts[name] += 1
            if call in children:
                names.append(f"self.{children[call]}")
            elif call not in hidden:
                names.append(name)
        return names


def steps_of(frame: Frame) -> list[str]:
    """The names of what a frame's own forward called, in order: functions of tensors, and children."""
    names: list[str] = []
    for step in frame.steps:
        if isinstance(step, Call):
            if step.inputs and step.outputs and step.name != "getitem":
                names.append(step.name)
        else:
            path = next((n for n, child in frame.module.named_modules() if child is step.module), "?")
            names.append("self." + path)
    return names


@dataclass(frozen=True)
class Held:
    """A parameter of a forward that the graphs hold at its default: nothing, for *args and **kwargs."""

    name: str
    position: int
    kind: Any
    default: Any
    known: frozenset[str]

    def holds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments leaves it at its default."""
        if self.kind is inspect.Parameter.VAR_POSITIONAL:
            return len(args) <= self.position
        if self.kind is inspect.Parameter.VAR_KEYWORD:
            return self.known.issuperset(kwargs)
        given = args[self.position] if self.position < len(args) else kwargs.get(self.name, self.default)
        return given is self.default or (isinstance(given, (bool, int, float, str)) and bool(given == self.default))


class _Written(fx.Proxy):
    """A buffer that the forward writes into, which the graph does too, instead of the trace."""

    def __iadd__(self, other: Any) -> _Written:
        self.add_(other)
        return self

    def __isub__(self, other: Any) -> _Written:
        self.sub_(other)
        return self

    def __imul__(self, other: Any) -> _Written:
        self.mul_(other)
        return self

    def __itruediv__(self, other: Any) -> _Written:
        self.div_(other)
        return self


class _Tracer(fx.Tracer):
    """Traces one module's own forward, all optional arguments held at their defaults but the `free` ones.

    Attributes:
        held: parameters that have their default value.
        buffers: those of the module that stand in the graph by their names, as far as the forward has read them;
            what is made of others alone is constant.
    """

    def __init__(self, free: frozenset[str], written: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.free = free
        self.written = written
        self.held: list[Held] = []
        self.buffers: dict[str, _Written] = {}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if attr in self.written and isinstance(attr_val, Tensor) and self.root._buffers.get(attr) is attr_val:
            if attr not in self.buffers:
                self.buffers[attr] = _Written(self.create_node("get_attr", attr, (), {}), self)
            return self.buffers[attr]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, *_: Any) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A module made in the forward has no name by which it could be called: it is looked into.
        if self.submodule_paths is not None and m not in self.submodule_paths:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], *_: Any, **__: Any
    ) -> tuple[Callable[..., Any], list[Any]]:
        arguments: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        loaded = names_loaded(inspect.unwrap(root_fn))
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        known = frozenset(parameter.name for parameter in parameters)
        for position, parameter in enumerate(parameters):
            held = Held(parameter.name, position, parameter.kind, parameter.default, known)
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if parameter.name in loaded:
                    self.held.append(held)
                continue
            optional = parameter.default is not parameter.empty
            argument: Any = self.create_proxy(
                "placeholder", parameter.name, (parameter.default,) if optional else (), {}
            )
            if optional and parameter.name not in self.free:
                self.held.append(held)
                argument = parameter.default
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = argument
            else:
                arguments.append(argument)
        return functools.partial(root_fn, **keywords), arguments

    def create_arg(self, a: Any) -> Any:
        # Transformers' outputs are dicts of their own kind, and stay it.
        if isinstance(a, dict) and type(a) is not dict:
            return self.create_proxy("call_function", type(a), (), dict(a)).node
        return super().create_arg(a)


def names_loaded(function: Callable[..., Any]) -> list[str]:
    """The names and constants that a function's code loads, once for each time."""
    names: list[str] = []
    for instruction in dis.get_instructions(function):
        if "LOAD_" in instruction.opname:
            loaded = instruction.argval
            # from Python 3.13 on one instruction may load two
            if not isinstance(loaded, tuple):
                loaded = (loaded,)
            names += map(str, loaded)
    return names


def forwards_of(owner: nn.Module) -> Forwards | Refusal:
    """The original forward of `owner` as graphs, or why there are none."""
    graphs = []
    held: dict[str, Held] = {}
    for training in (True, False):
        traced = _graph(owner, training, frozenset())
        if isinstance(traced, Refusal):
            return traced
        # An optional argument on which nothing in the forward branches stays an argument.
        free: frozenset[str] = frozenset()
        for optional in traced[1]:
            if optional.default is inspect.Parameter.empty:
                continue
            other = _graph(owner, training, free | {optional.name})
            if not isinstance(other, Refusal) and _operations(other[0]) == _operations(traced[0]):
                free, traced = free | {optional.name}, other
        graphs.append(traced[0])
        held |= {h.name: h for h in traced[1]}
    return Forwards((graphs[0], graphs[1]), tuple(held.values()))


def _graph(owner: nn.Module, training: bool, free: frozenset[str]) -> tuple[fx.Graph, list[Held]] | Refusal:
    """The graph of a forward in one mode, and the parameters that are held in it; or why there is none."""
    written: frozenset[str] = frozenset()
    while True:
        found = _trace(owner, training, _Tracer(free, written))
        if not isinstance(found, frozenset) or found <= written:
            break
        written |= found
    if isinstance(found, frozenset):
        return _sets_attributes(owner, min(found))
    return found


def _trace(owner: nn.Module, training: bool, tracer: _Tracer) -> tuple[fx.Graph, list[Held]] | frozenset[str] | Refusal:
    """The same, by one trace; or the names of the buffers that it has written into, which the graph does not."""
    # Tracing runs the forward, which may change what the module holds, and the mode is to be chosen: done on a copy.
    root = copy.copy(owner)
    buffers = cloned(owner._buffers)
    vars(root).update(training=training, _buffers=dict(buffers))
    before = dict(vars(root))
    kind = type(owner).__name__
    base = base_forward(owner)
    if base is not None:  # torch.fx traces the forward of a class
        root.__class__ = type(kind, (type(owner),), {"forward": base})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(root)
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        return Refusal(f"the forward of {kind} cannot be traced ({type(error).__name__}: {message})")
    changed = [key for key, value in vars(root).items() if before.get(key, before) is not value]
    changed += root._buffers.keys() - buffers.keys()
    if changed:
        return _sets_attributes(owner, changed[0])
    written = set()
    for name, clone in buffers.items():
        now: Any = root._buffers.get(name)
        if (now is not clone and now is not tracer.buffers.get(name)) or (clone is not None and clone._version > 0):
            written.add(name)
    return frozenset(written) or (graph, tracer.held)


def _sets_attributes(owner: nn.Module, name: str) -> Refusal:
    return Refusal(f"the forward of {type(owner).__name__} sets attributes or makes tensors of its own ({name})")


def _operations(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.nodes if node.op != "placeholder"]


_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real", "imag"}


def tensor_steps(graph: fx.Graph) -> list[tuple[str, fx.Node]]:
    """The nodes that compute tensors from tensors, with their canonical names; getting an item does not count."""
    plain: set[fx.Node] = set()
    steps: list[tuple[str, fx.Node]] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        read = [other for other in node.all_input_nodes if other not in plain]
        if node.op == "call_module":
            steps.append(("self." + str(node.target), node))
            continue
        name = canonical(node.target)
        if isinstance(node.target, type):
            continue
        if node.target is getattr:
            name = "get." + str(node.args[1])
            if node.args[1] not in _TENSOR_ATTRIBUTES:
                plain.add(node)
                continue
        if not read or (is_metadata(name) and node.target is not getattr):
            plain.add(node)
            continue
        if name != "getitem":
            steps.append((name, node))
    return steps

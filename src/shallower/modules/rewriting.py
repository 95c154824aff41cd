"""Make any pointwise operation of a model a module of its own, so that it can be exchanged by its name.

A functional call, or one of several calls of a module, has no name. The `forward` of the module that makes it is
traced with torch.fx, children being leaves, and the call becomes a call of a new child. The new forward is bound to
the instance: its class, its parameters and their names stay.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from shallower.errors import SiteError
from shallower.recording.tracing import EXTERNALISED, Call, Frame, canonical, is_metadata
from shallower.sites import Place

_RECORD = EXTERNALISED


def externalise(model: nn.Module, place: Place) -> str:
    """Make the operation at `place` a module, and return that module's dotted name.

    A place without calls is a module already: its own name is returned. Otherwise the calls become one new child of
    the enclosing module, named after the first of them ("relu_0"), with the same values as before in train and in eval
    mode. Doing it again changes nothing; several places of one module add up, and ordinals always count in the
    original forward.

    Raises:
        SiteError: there is no such place, or the enclosing module's forward cannot be rewritten.
    """
    if not place.calls:
        return place.module
    owner = _owner(model, place)
    record = _record(owner)
    if place.calls not in record:
        change = _change(owner, place)
        if isinstance(change, str):
            raise SiteError(f"{place}: cannot be made a module of its own: {change}")
        vars(owner).setdefault(_RECORD, {})[place.calls] = change.install(owner)
        _rebind(owner)
    return f"{place.module}.{record_name(owner, place)}" if place.module else record_name(owner, place)


def name_at(model: nn.Module, place: Place) -> str:
    """The dotted name that `externalise` gives the operation at `place`. The model is not changed.

    Raises:
        SiteError: there is no such place.
    """
    if not place.calls:
        return place.module
    owner = _owner(model, place)
    attribute = _attribute(owner, place)
    if place.calls in _record(owner):
        child = record_name(owner, place)
    elif attribute is not None:
        child = attribute.child
    else:
        child = _child_name(owner, place)
    return f"{place.module}.{child}".strip(".")


def record_name(owner: nn.Module, place: Place) -> str:
    """The name, below `owner`, of the child that the operation at `place` has become."""
    return _record(owner)[place.calls].child


def internalise(model: nn.Module, place: Place) -> None:
    """Undo `externalise`; nothing happens where it was not done.

    Raises:
        SiteError: there is no such place.
    """
    if not place.calls:
        return
    owner = _owner(model, place)
    change = _record(owner).pop(place.calls, None)
    if change is None:
        return
    change.remove(owner)
    if not _record(owner):
        vars(owner).pop(_RECORD, None)
    _rebind(owner)


Forwards = dict[nn.Module, "_Forwards | str"]
"""Forwards that were traced already, by their module."""


def reason_not_rewritable(
    model: nn.Module, place: Place, frame: Frame | None = None, known: Forwards | None = None
) -> str:
    """Why the operation at `place` cannot be made a module of its own, "" if it can. The model is not changed.

    Args:
        model: that `place` is relative to.
        place: where.
        frame: a recorded invocation of the enclosing module; the forward as torch.fx sees it must then make the very
            same calls.
        known: what was traced already; added to.
    """
    if not place.calls:
        return ""
    try:
        owner = _owner(model, place)
    except SiteError as error:
        return str(error)
    if place.calls in _record(owner):
        return ""
    change = _change(owner, place, frame, known)
    return change if isinstance(change, str) else ""


# ---------------------------------------------------------------------- what externalising does to the owner


@dataclass
class _NewChild:
    """The calls become a call of a new child, by a new forward."""

    hides = True  # the calls themselves are seen no more

    child: str
    module: nn.Module | None

    def install(self, owner: nn.Module) -> _NewChild:
        if self.module is not None:
            owner.add_module(self.child, self.module.train(owner.training))
        return _NewChild(self.child, None)

    def remove(self, owner: nn.Module) -> None:
        delattr(owner, self.child)


@dataclass
class _Attribute:
    """The enclosing module keeps the function, or the module, in an attribute: the attribute is exchanged.

    `state` is what stood there, and in other attributes that have to change with it.
    """

    hides = False

    child: str
    module: nn.Module | None
    state: dict[str, Any] = field(default_factory=dict)

    def install(self, owner: nn.Module) -> _Attribute:
        if self.module is not None:
            state = {self.child: vars(owner)[self.child]}
            setattr(owner, self.child, self.module.train(owner.training))
        else:
            state = {}
        # PyTorch's fused path reads the weights itself and would not see what stands at the activation's place.
        if isinstance(owner, nn.TransformerEncoderLayer):
            state["activation_relu_or_gelu"] = owner.activation_relu_or_gelu
            owner.activation_relu_or_gelu = 0
        return _Attribute(self.child, None, state)

    def remove(self, owner: nn.Module) -> None:
        for name, value in self.state.items():
            owner._modules.pop(name, None)
            setattr(owner, name, value)


_Change = _NewChild | _Attribute


def _record(owner: nn.Module) -> dict[tuple[tuple[str, int], ...], _Change]:
    record: dict[tuple[tuple[str, int], ...], _Change] = vars(owner).get(_RECORD, {})
    return record


def _owner(model: nn.Module, place: Place) -> nn.Module:
    try:
        return model.get_submodule(place.module)
    except AttributeError:
        raise SiteError(
            f"{place}: the model has no module {place.module!r}; were the sites found in this model?"
        ) from None


def _change(owner: nn.Module, place: Place, frame: Frame | None = None, known: Forwards | None = None) -> _Change | str:
    """What would have to be done for `place`, or the reason why it cannot be."""
    attribute = _attribute(owner, place)
    if attribute is not None:
        return attribute
    if "forward" in vars(owner) and not any(isinstance(change, _NewChild) for change in _record(owner).values()):
        return f"the forward of {place.module or 'the model'} has been replaced on the instance"
    taken = {call for calls in _record(owner) for call in calls}
    if taken & set(place.calls):
        return "a part of it has been made a module already"
    known = {} if known is None else known
    if owner not in known:
        known[owner] = _forwards(owner)
    forwards = known[owner]
    if isinstance(forwards, str):
        return forwards
    if frame is not None and (problem := forwards.problem_of(frame)):
        return problem
    regions = [_region(graph, place) for graph in forwards.graphs]
    for region in regions:
        if isinstance(region, str):
            return region
    module = _module_of(owner, [region for region in regions if not isinstance(region, str)])
    return module if isinstance(module, str) else _NewChild(_child_name(owner, place), module)


def _attribute(owner: nn.Module, place: Place) -> _Attribute | None:
    """The attribute through which the one call at `place` is certainly made, if there is one."""
    if len(place.calls) != 1:
        return None
    ((name, ordinal),) = place.calls
    if isinstance(owner, nn.TransformerEncoderLayer) and name == "self.activation" and ordinal == 0:
        return _Attribute("activation", None)
    holders = [
        key
        for key, value in vars(owner).items()
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)) and canonical(value) == name
    ]
    if len(holders) != 1 or ordinal != 0:
        return None
    stock = STOCK.get(name)
    if stock is None or _mentions(type(owner), holders[0]) != 1 or _mentions(type(owner), name):
        return None
    return _Attribute(holders[0], stock())


def _mentions(kind: type[nn.Module], name: str) -> int:
    """In how many places of its own methods a class uses a name (constructors and pickling apart)."""
    count = 0
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for key, method in vars(base).items():
            if isinstance(method, types.FunctionType) and not (key.startswith("__") and key.endswith("__")):
                count += sum(1 for line in _instructions(method) if line == name)
    return count


def _instructions(function: types.FunctionType) -> list[str]:
    return [str(i.argval) for i in dis.get_instructions(function) if i.opname.startswith("LOAD_") and i.argval]


def _child_name(owner: nn.Module, place: Place) -> str:
    name, ordinal = place.calls[0]
    base = f"{name.removeprefix('self.').replace('.', '_')}_{'call_' if name.startswith('self.') else ''}{ordinal}"
    while hasattr(owner, base):
        base += "_"
    return base


# ---------------------------------------------------------------------- the forward as graphs


@dataclass
class _Forwards:
    """A module's original forward as torch.fx sees it.

    Attributes:
        graphs: in train and in eval mode.
        held: parameters of the forward that have their default value in the graphs.
    """

    graphs: tuple[fx.Graph, fx.Graph]
    held: tuple[_Held, ...]

    def problem_of(self, frame: Frame) -> str:
        """Why these graphs are not what ran in `frame`, "" if they are."""
        if _steps_now(self.graphs[1], frame.module) != steps_of(frame):
            return f"torch.fx does not see what runs in the forward of {type(frame.module).__name__}"
        for held in self.held:
            if not held.holds(frame.args, frame.kwargs):
                return f"the forward of {type(frame.module).__name__} branches on its argument {held.name}"
        return ""


def _steps_now(graph: fx.Graph, owner: nn.Module) -> list[str]:
    """What the forward calls, in order, where places of it have become children already."""
    counts: Counter[str] = Counter()
    children = {place[-1]: (place, change.child) for place, change in _record(owner).items() if change.hides}
    hidden = {call for place, _ in children.values() for call in place}
    names: list[str] = []
    for name, _ in _steps(graph):
        call = (name, counts[name])
        counts[name] += 1
        if call in children:
            names.append(f"self.{children[call][1]}")
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
class _Held:
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


class _Tracer(fx.Tracer):
    """Traces one module's own forward, all optional arguments held at their defaults but the `free` ones."""

    def __init__(self, free: frozenset[str]) -> None:
        super().__init__()
        self.free = free
        self.held: list[_Held] = []

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
        loaded = [i.argval for i in dis.get_instructions(inspect.unwrap(root_fn)) if i.opname.startswith("LOAD_")]
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        known = frozenset(parameter.name for parameter in parameters)
        for position, parameter in enumerate(parameters):
            held = _Held(parameter.name, position, parameter.kind, parameter.default, known)
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


def _forwards(owner: nn.Module) -> _Forwards | str:
    """The original forward of `owner` as graphs, or why there are none."""
    graphs = []
    held: dict[str, _Held] = {}
    for training in (True, False):
        traced = _graph(owner, training, frozenset())
        if isinstance(traced, str):
            return traced
        # An optional argument on which nothing in the forward branches stays an argument.
        free: frozenset[str] = frozenset()
        for optional in [h for h in traced[1] if h.default is not inspect.Parameter.empty]:
            other = _graph(owner, training, free | {optional.name})
            if not isinstance(other, str) and _shape(other[0]) == _shape(traced[0]):
                free, traced = free | {optional.name}, other
        graphs.append(traced[0])
        held |= {h.name: h for h in traced[1]}
    return _Forwards((graphs[0], graphs[1]), tuple(held.values()))


def _graph(owner: nn.Module, training: bool, free: frozenset[str]) -> tuple[fx.Graph, list[_Held]] | str:
    # Tracing may set attributes of the traced module, and the mode is to be chosen: done on a shallow copy.
    root = copy.copy(owner)
    vars(root)["training"] = training
    before = dict(vars(root))
    tracer = _Tracer(free)
    kind = type(owner).__name__
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(root)
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        return f"the forward of {kind} cannot be traced ({type(error).__name__}: {message})"
    changed = [key for key, value in vars(root).items() if before.get(key, _RECORD) is not value]
    if changed:
        return f"the forward of {kind} sets attributes or makes tensors of its own ({changed[0]})"
    return graph, tracer.held


def _shape(graph: fx.Graph) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.nodes if node.op != "placeholder"]


_TENSOR_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real", "imag"}


def _steps(graph: fx.Graph) -> list[tuple[str, fx.Node]]:
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


# ---------------------------------------------------------------------- the calls as a module


@dataclass
class _Region:
    """The nodes of a place in one graph, and the nodes they read from outside: one, or the two of a sum."""

    nodes: list[fx.Node]
    sources: list[fx.Node]


def _region(graph: fx.Graph, place: Place) -> _Region | str:
    counts: Counter[str] = Counter()
    wanted = set(place.calls)
    nodes: list[fx.Node] = []
    for name, node in _steps(graph):
        if (name, counts[name]) in wanted:
            nodes.append(node)
        counts[name] += 1
    if len(nodes) != len(wanted):
        return "its forward does not make these calls"
    inside = set(nodes)
    sources = list(dict.fromkeys(other for node in nodes for other in node.all_input_nodes if other not in inside))
    if len(sources) != 1 and not _is_sum(nodes, sources):
        return "the operation reads more than one tensor of the forward"
    if any(user not in inside for node in nodes[:-1] for user in node.users):
        return "a tensor inside the operation is read elsewhere in the forward"
    if any(source.op == "get_attr" for source in sources):
        return "the operation reads a parameter"
    return _Region(nodes, sources)


def _is_sum(nodes: Sequence[fx.Node], sources: Sequence[fx.Node]) -> bool:
    """Whether the nodes are one addition of two tensors."""
    return len(nodes) == 1 and canonical(nodes[0].target) == "add" and list(nodes[0].args) == list(sources)


class Sum(nn.Module):
    """a + b: what an addition of the forward becomes as a module."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The sum of two tensors."""
        return a + b


def _module_of(owner: nn.Module, regions: Sequence[_Region]) -> nn.Module | str:
    """A module that does what the nodes do, in train and in eval mode."""
    train, evaluation = regions
    first = train.nodes[0]
    if len(train.nodes) == 1:
        if first.op == "call_module":
            return copy.deepcopy(owner.get_submodule(str(first.target)))
        if len(train.sources) == 2:
            return Sum()
        name = canonical(first.target)
        if name == "dropout":
            given = {**dict(zip(("input", "p", "training", "inplace"), first.args, strict=False)), **first.kwargs}
            rate = given.get("p", 0.5)
            if given.get("training", True) is True and isinstance(rate, (int, float)):
                return nn.Dropout(float(rate))
            return "its dropout does not follow the mode of the module"
        plain = len(first.args) == 1 and not {k: v for k, v in first.kwargs.items() if k != "inplace"}
        if plain and name in STOCK:
            return STOCK[name]()
    if _listing(train) != _listing(evaluation):
        return "the operation differs between training and inference"
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {train.sources[0]: graph.placeholder("x")}
    children: dict[str, Any] = {}
    for node in train.nodes:
        if node.op == "call_module":
            children[str(node.target)] = copy.deepcopy(owner.get_submodule(str(node.target)))
        copies[node] = graph.node_copy(node, lambda other: copies[other])
    graph.output(copies[train.nodes[-1]])
    return fx.GraphModule(children, graph, "Pointwise")


def _listing(region: _Region) -> list[Any]:
    """What a region computes, without the names of its nodes."""
    index = {node: i for i, node in enumerate(region.nodes)}

    def plain(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: index.get(node, -1))

    return [(node.op, node.target, plain(node.args), plain(node.kwargs)) for node in region.nodes]


STOCK: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
}
"""The modules that are these functions, called without further arguments."""


# ---------------------------------------------------------------------- the new forward


def _rebind(owner: nn.Module) -> None:
    """Give `owner` the forward in which every externalised place is a call of its child."""
    changes = {calls: change for calls, change in _record(owner).items() if isinstance(change, _NewChild)}
    vars(owner).pop("forward", None)
    if not changes:
        return
    forwards = _forwards(owner)
    if isinstance(forwards, str):
        raise SiteError(forwards)
    functions = []
    for graph in forwards.graphs:
        regions = {calls: _region(graph, Place("", calls)) for calls in changes}
        became: dict[fx.Node, fx.Node] = {}
        for calls, region in regions.items():
            if isinstance(region, str):
                raise SiteError(region)
            last = region.nodes[-1]
            with graph.inserting_before(last):
                read = tuple(became.get(source, source) for source in region.sources)
                node = graph.call_module(changes[calls].child, read)
            last.replace_all_uses_with(node)
            became[last] = node
            for old in reversed(region.nodes):
                graph.erase_node(old)
        functions.append((graph.python_code("self").src, type(fx.GraphModule(owner, graph)).forward))
    (train_code, train), (eval_code, evaluation) = functions
    forward = evaluation
    if train_code != eval_code or forwards.held or _takes_more(type(owner).forward):
        forward = _by_mode(type(owner).forward, train, evaluation, forwards.held)
    vars(owner)["forward"] = types.MethodType(forward, owner)


def _takes_more(function: Callable[..., Any]) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    return bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


def _by_mode(
    original: Callable[..., Any], train: Callable[..., Any], evaluation: Callable[..., Any], held: Sequence[_Held]
) -> Callable[..., Any]:
    """A forward with the signature of the original one that is `train` or `evaluation`, by the module's mode."""
    named = [p for p in inspect.signature(original).parameters.values() if p.kind is not p.VAR_KEYWORD]
    positional = len([p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD or p.kind is p.POSITIONAL_ONLY]) - 1
    known = {parameter.name for parameter in named}
    more = _takes_more(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for one in held:
            if not one.holds(args, kwargs):
                raise SiteError(
                    f"{type(self).__name__}: its rewritten forward holds for the default of {one.name} only"
                )
        if more:
            args = args[:positional]
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        return train(self, *args, **kwargs) if self.training else evaluation(self, *args, **kwargs)

    return forward

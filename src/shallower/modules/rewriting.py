"""Make any pointwise operation of a model a module of its own, so that it can be exchanged by its name.

A functional call, or one of several calls of a module, has no name. The `forward` of the module that makes it is
traced with torch.fx, children being leaves, and the call becomes a call of a new child. The new forward is bound to
the instance: its class, its parameters and their names stay.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import fx, nn

from shallower.errors import Refusal, SiteError
from shallower.modules.forwards import Forward, has_foreign_forward
from shallower.modules.graphs import Forwards, Held, forwards_of, names_loaded
from shallower.modules.regions import STOCK, module_of, region_of
from shallower.modules.written import base_forward, give_number, numbers_written
from shallower.recording.names import canonical
from shallower.recording.tracing import EXTERNALISED, Frame
from shallower.sites import Place, Written

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
    record = _rewritten_places(owner)
    if place.calls not in record:
        change = _change(owner, place)
        if isinstance(change, Refusal):
            raise SiteError(f"{place}: cannot be made a module of its own: {change}")
        vars(owner).setdefault(_RECORD, {})[place.calls] = change.install(owner)
        _rebind(owner)
        _choose_paths(model)
    return f"{place.module}.{record_name(owner, place)}".strip(".")


def name_at(model: nn.Module, place: Place) -> str:
    """The dotted name that `externalise` gives the operation at `place`. The model is not changed.

    Raises:
        SiteError: there is no such place.
    """
    if not place.calls:
        return place.module
    owner = _owner(model, place)
    attribute = _attribute(owner, place)
    if place.calls in _rewritten_places(owner):
        child = record_name(owner, place)
    elif attribute is not None:
        child = attribute.child
    else:
        child = _child_name(owner, place)
    return f"{place.module}.{child}".strip(".")


def record_name(owner: nn.Module, place: Place) -> str:
    """The name, below `owner`, of the child that the operation at `place` has become."""
    return _rewritten_places(owner)[place.calls].child


def internalise(model: nn.Module, place: Place) -> None:
    """Undo `externalise`; nothing happens where it was not done.

    Raises:
        SiteError: there is no such place.
    """
    if not place.calls:
        return
    owner = _owner(model, place)
    change = _rewritten_places(owner).pop(place.calls, None)
    if change is None:
        return
    change.remove(owner)
    if not _rewritten_places(owner):
        vars(owner).pop(_RECORD, None)
    _rebind(owner)
    _choose_paths(model)


def write_number(owner: nn.Module, written: Written, value: float) -> None:
    """Let a call in the forward of a module be given another number, in place. Doing it again changes the number.

    Raises:
        SiteError: there is no such call, or the forward cannot be written anew.
    """
    if has_foreign_forward(owner):
        raise SiteError(f"the forward of {type(owner).__name__} has been replaced on the instance")
    give_number(owner, written.path, written.place, value)
    _rebind(owner)


_NESTED = "_shallower_nested"


def _choose_paths(model: nn.Module) -> None:
    """Let PyTorch's encoders pack padded batches into nested tensors only where their layers are as it knows them.

    Packing, an encoder reads weights that a layer may have no more, and hands on tensors that few modules can read.
    """
    for encoder in model.modules():
        if not isinstance(encoder, nn.TransformerEncoder):
            continue
        if any(_RECORD in vars(layer) for layer in encoder.layers):
            vars(encoder).setdefault(_NESTED, encoder.use_nested_tensor)
            encoder.use_nested_tensor = False
        elif _NESTED in vars(encoder):
            encoder.use_nested_tensor = vars(encoder).pop(_NESTED)


Known = dict[nn.Module, "Forwards | Refusal"]
"""Forwards that were traced already, by their module."""


def reason_not_rewritable(
    model: nn.Module, place: Place, frame: Frame | None = None, known: Known | None = None
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
    if place.calls in _rewritten_places(owner):
        return ""
    change = _change(owner, place, frame, known)
    return change.reason if isinstance(change, Refusal) else ""


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


def _rewritten_places(owner: nn.Module) -> dict[tuple[tuple[str, int], ...], _Change]:
    record: dict[tuple[tuple[str, int], ...], _Change] = vars(owner).get(_RECORD, {})
    return record


def _new_children(owner: nn.Module) -> dict[tuple[tuple[str, int], ...], _NewChild]:
    """The places for which the forward was written anew."""
    return {calls: change for calls, change in _rewritten_places(owner).items() if isinstance(change, _NewChild)}


def _owner(model: nn.Module, place: Place) -> nn.Module:
    try:
        return model.get_submodule(place.module)
    except AttributeError:
        raise SiteError(
            f"{place}: the model has no module {place.module!r}; were the sites found in this model?"
        ) from None


def _change(
    owner: nn.Module, place: Place, frame: Frame | None = None, known: Known | None = None
) -> _Change | Refusal:
    """What would have to be done for `place`, or the reason why it cannot be."""
    attribute = _attribute(owner, place)
    if attribute is not None:
        return attribute
    if has_foreign_forward(owner):
        return Refusal(f"the forward of {place.module or 'the model'} has been replaced on the instance")
    if not set(place.calls).isdisjoint(chain.from_iterable(_rewritten_places(owner))):
        return Refusal("a part of it has been made a module already")
    if known is None:
        known = {}
    if owner not in known:
        known[owner] = forwards_of(owner)
    forwards = known[owner]
    if isinstance(forwards, Refusal):
        return forwards
    if frame is not None and (problem := forwards.problem_of(frame)):
        return Refusal(problem)
    regions = []
    for graph in forwards.graphs:
        region = region_of(graph, place.calls)
        if isinstance(region, Refusal):
            return region
        regions.append(region)
    module = module_of(owner, regions)
    return module if isinstance(module, Refusal) else _NewChild(_child_name(owner, place), module)


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
                count += names_loaded(method).count(name)
    return count


def _child_name(owner: nn.Module, place: Place) -> str:
    name, ordinal = place.calls[0]
    base = f"{name.removeprefix('self.').replace('.', '_')}_{'call_' if name.startswith('self.') else ''}{ordinal}"
    while hasattr(owner, base):
        base += "_"
    return base


# ---------------------------------------------------------------------- the new forward


def _rebind(owner: nn.Module) -> None:
    """Give `owner` the forward in which every externalised place is a call of its child, and numbers are its own."""
    vars(owner).pop("forward", None)
    if _new_children(owner) or numbers_written(owner):
        vars(owner)["forward"] = Forward(owner, forward_of, forward_of(owner))


def forward_of(owner: nn.Module) -> Callable[..., Any]:
    """The function that a module's forward is with what was changed in it.

    Raises:
        SiteError: it cannot be written anew.
    """
    changes = _new_children(owner)
    base = base_forward(owner)
    if not changes:
        return base or type(owner).forward
    forwards = forwards_of(owner)
    if isinstance(forwards, Refusal):
        raise SiteError(str(forwards))
    functions = []
    for graph in forwards.graphs:
        became: dict[fx.Node, fx.Node] = {}
        # all regions first: they are counted in the graph as it was
        regions = [region_of(graph, calls) for calls in changes]
        for change, region in zip(changes.values(), regions, strict=True):
            if isinstance(region, Refusal):
                raise SiteError(str(region))
            last = region.nodes[-1]
            with graph.inserting_before(last):
                read = tuple(became.get(source, source) for source in region.sources)
                node = graph.call_module(change.child, read)
            last.replace_all_uses_with(node)
            became[last] = node
            for old in reversed(region.nodes):
                graph.erase_node(old)
        functions.append((graph.python_code("self").src, type(fx.GraphModule(owner, graph)).forward))
    (train_code, train), (eval_code, evaluation) = functions
    forward = evaluation
    if train_code != eval_code or forwards.held or _takes_more(type(owner).forward):
        forward = _by_mode(type(owner).forward, train, evaluation, forwards.held)
    return forward


def _takes_more(function: Callable[..., Any]) -> bool:
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(parameter.kind in many for parameter in inspect.signature(function).parameters.values())


def _by_mode(
    original: Callable[..., Any], train: Callable[..., Any], evaluation: Callable[..., Any], held: Sequence[Held]
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

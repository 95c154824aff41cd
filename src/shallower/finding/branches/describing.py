"""Branches and layers of a recorded pass, as sites.

    found, reasons = branches_of(trace)

A branch is F of x + F(x): what runs only for one summand of a sum whose other summand is computed of the same x. It is
dropped by zeros in the place of the module that gives F(x); the others give what they read. A layer is a module of a
list with such a sum in it, whose output has the form of its input: it leaves the list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from shallower.errors import Refusal
from shallower.finding.branches.regions import Region, Regions, origin
from shallower.finding.pointwise import DROPOUT, NONLINEAR, UNCHANGED, is_pointwise
from shallower.modules.prepared.lists import is_uniform
from shallower.recording.tracing import Call, Frame, Trace, Value
from shallower.sites import Branch, Emptied, Site

Found = dict[str, Site]
Reasons = dict[str, str]

_MOVES = frozenset(
    """
    view reshape permute transpose flatten unflatten squeeze unsqueeze movedim swapaxes roll getitem expand get.T get.mT
    narrow pad
    """.split()  # noqa: SIM905
)
"""Calls that move numbers, and put at most zeros beside them."""

_KEEP_ZEROS = _MOVES | UNCHANGED | DROPOUT | {"mul", "div", "neg"}
"""Calls that give zeros where what they read is zero."""


def branches_of(trace: Trace) -> tuple[Found, Reasons]:
    """The branches and layers of a pass, by name, and why others cannot be dropped."""
    describer = _Describer(trace)
    return describer.found, describer.reasons


class _Describer:
    """The branches of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.regions = Regions(trace)
        self.runs = Counter(frame.module for frame in trace.frames)
        self.held = Counter(module for _, module in trace.model.named_modules(remove_duplicate=False))
        self.users: dict[int, set[nn.Module]] = {}
        for module in trace.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.users.setdefault(id(parameter), set()).add(module)
        self.found: Found = {}
        self.reasons: Reasons = {}
        for frame in trace.frames:
            self._take(f"{frame.name}:layer", self._layer(frame))
        for call in trace.calls:
            for region, value in self._summands(call):
                name = f"{_common_name(region.frames)}:branch"
                self._take(name, self._branch(region, value))

    def _take(self, name: str, made: Branch | Refusal | None) -> None:
        """Keep a branch as a site, or the reason why it is none."""
        if isinstance(made, Refusal):
            self.reasons.setdefault(name, str(made))
        elif made is not None and name not in self.found:
            self.reasons.pop(name, None)
            self.found[name] = Site(name, "branch", 1, None, (), None, cached_each=self._cached(made), branch=made)

    # ---------------------------------------------------------------------------------------------------------- layers

    def _layer(self, frame: Frame) -> Branch | Refusal | None:
        """A module of a list whose output has the form of its input; None where it is no such layer."""
        entries = self._list_of(frame)
        came, given = _given_to(frame), _first_value(frame.returned)
        if entries is None or came is None or given is None or came.shape != given.shape or not came.fed:
            return None
        calls = list(frame.calls())
        macs = sum(call.macs for call in calls)
        if macs == 0 or not any(_adds_to(call, came) for call in calls):
            return None
        if self.runs[frame.module] > 1 or self.held[frame.module] > 1:
            return Refusal("it is called several times, or stands at several places")
        returns = _returns(frame, ())
        if isinstance(returns, Refusal):
            if not is_uniform(entries):  # it stays, and passes on what it reads
                return returns
            returns = 0
        inside = set(calls)
        for call in calls:
            for output in call.outputs:
                elsewhere = any(reader not in inside for reader in self.regions.readers.get(output, ()))
                if output is not given and (elsewhere or (output.output and output not in self.regions.cached)):
                    return Refusal(f"what `{call.name}` gives in it is read elsewhere, too")
        return self._costed((Emptied(str(frame.name), returns, _as_filled(frame)),), [frame], macs)

    def _list_of(self, frame: Frame) -> nn.Module | None:
        """The list of modules in which the module of an invocation stands."""
        parent = self.trace.model.get_submodule((frame.name or "").rpartition(".")[0])
        is_list = type(frame.module).forward is nn.Sequential.forward
        if frame.name and isinstance(parent, (nn.ModuleList, nn.Sequential)) and not is_list:
            return parent
        return None

    # -------------------------------------------------------------------------------------------------------- branches

    def _summands(self, call: Call) -> Iterator[tuple[Region, Value]]:
        """What runs for one summand only, where both are computed of one value, with that summand."""
        fed = [origin(value) for value in call.inputs if value.fed]
        if call.name != "add" or len(fed) != 2 or len(fed[0].shape) != len(fed[1].shape):
            return
        for value, other in (fed, fed[::-1]):
            region = self.regions.behind(value, call)
            products = sum(c.macs > 0 for c in region.calls)
            # one linear map alone is a projection of the skip
            if products < 1 + (not any(c.name in NONLINEAR or "attention" in c.name for c in region.calls)):
                continue
            if region.frames and _meet(region, value, other):
                yield region, value

    def _branch(self, region: Region, value: Value) -> Branch | Refusal:
        """What goes with one summand."""
        frames, calls = [], list(region.loose)
        for frame in region.frames:
            alone = self.runs[frame.module] == 1 and self.held[frame.module] == 1
            own = list(frame.calls())
            if alone and frame.name:
                frames.append(frame)
            elif all(map(is_pointwise, own)) and next(frame.module.parameters(), None) is None:
                calls += own
            else:
                return Refusal(f"`{frame.name}` is called several times, or stands at several places")
        emptied: list[Emptied] = []
        given: dict[Value, Frame] = {}
        for frame in frames:
            returns = _returns(frame, calls)
            if isinstance(returns, Refusal):
                return returns
            emptied.append(Emptied(str(frame.name), returns, _as_filled(frame)))
            given[_first_value(frame.returned)] = frame  # type: ignore[index]
        closing = _closing(value, given, set(calls))
        if isinstance(closing, Refusal):
            return closing
        read = self._shape_read(closing, frames, calls)
        if isinstance(read, Refusal):
            return read
        sizes = _sizes(read, _first_value(closing.returned).shape)  # type: ignore[union-attr]
        if sizes is None:
            return Refusal(f"what `{closing.name}` gives has not the sizes of what the branch reads")
        made = self._costed(emptied, frames, sum(c.macs for frame in frames for c in frame.calls()))
        return replace(made, closing=str(closing.name), channels=sizes[0], stride=sizes[1])

    def _shape_read(self, closing: Frame, frames: Iterable[Frame], calls: Iterable[Call]) -> tuple[int, ...] | Refusal:
        """The shape that the closing module reads where each module of a branch gives what has the shape of its input.

        Calls between modules must take that shape.
        """
        starts = [(self.regions.position[next(iter(frame.calls()))], frame) for frame in frames]
        items: list[tuple[int, Frame | Call]] = [*starts, *((self.regions.position[call], call) for call in calls)]
        shapes: dict[Value, tuple[int, ...]] = {}
        for _, item in sorted(items, key=lambda pair: pair[0]):
            if isinstance(item, Frame):
                came, value = _given_to(item), _first_value(item.returned)
                if came is None or value is None:
                    return Refusal(f"`{item.name}` is given no tensor")
                shape = shapes.get(came, came.shape)
                if item is closing:
                    return shape
                if shape != value.shape:
                    shapes[value] = shape
                continue
            if not any(value in shapes for value in item.inputs):
                continue
            other = _broadcast([shapes.get(value, value.shape) for value in item.inputs])
            if not is_pointwise(item) or other is None:
                return Refusal(f"`{item.name}` in {item.frame.name or 'the model'} needs what the branch computes")
            shapes.update(dict.fromkeys(item.outputs, other))
        return Refusal("nothing closes it")

    def _cached(self, branch: Branch) -> int:
        """Numbers for each token that the KV cache holds of a branch."""
        gone = tuple(f"{emptied.module}." for emptied in branch.emptied)
        total = 0
        for value in self.trace.cached:
            if value.call is not None and f"{value.call.frame.name}.".startswith(gone):
                total += value.shape[1] * value.shape[3]
        around = self.trace.model.get_submodule(branch.layer.rpartition(".")[0])
        if not total or (branch.layer and is_uniform(around)):
            return total
        return total - sum(emptied.cache >= 0 for emptied in branch.emptied)  # one number stays, to count the tokens

    def _costed(self, emptied: Iterable[Emptied], frames: Iterable[Frame], macs: int) -> Branch:
        """The branch of these modules, with what it costs."""
        modules: set[nn.Module] = set()
        for frame in frames:
            modules.update(frame.module.modules())
        params = {
            id(p): p.numel() for module in modules for p in module._parameters.values()
            if p is not None and self.users[id(p)] <= modules
        }  # fmt: skip
        return Branch(tuple(emptied), params=sum(params.values()), macs=macs)


def _given_to(frame: Frame) -> Value | None:
    """The first tensor that a module is given, as it is before the module writes into it."""
    value = _first_value((*frame.args, *frame.kwargs.values()))
    inside = set(frame.calls())
    while value is not None and value.call in inside and value.call.inplace:
        value = origin(value.call.inputs[0])
    return value


def _first_value(tree: object) -> Value | None:
    """The first tensor in what a module is given or returns."""
    if isinstance(tree, Value):
        return origin(tree)
    if isinstance(tree, (tuple, list)):
        for item in tree:
            found = _first_value(item)
            if found is not None:
                return found
    return None


def _as_filled(frame: Frame) -> int:
    """The number of the layer of a KV cache that a module is given and fills; -1 where it fills none."""
    made = {value.tensor for call in frame.calls() for value in call.outputs}
    for item in (*frame.args, *frame.kwargs.values()):
        cache = getattr(item, "self_attention_cache", item)
        for i, layer in enumerate(getattr(cache, "layers", ())):
            keys = getattr(layer, "keys", None)
            if getattr(keys, "tensor", id(keys)) in made:  # a recorded value, or the tensor itself
                return i
    return -1


def _adds_to(call: Call, stream: Value) -> bool:
    """Whether a call adds something to a stream."""
    if call.name != "add" or sum(value.fed for value in call.inputs) < 2:
        return False
    for value in call.inputs:
        value = origin(value)
        while value.call is not None and value.call.name in UNCHANGED and value is not stream:
            value = origin(value.call.inputs[0])
        if value is stream:
            return True
    return False


def _meet(region: Region, value: Value, other: Value) -> bool:
    """Whether what a region reads went into the other summand, too."""
    entering: set[Value] = set()
    for call in region.calls:
        for read in map(origin, call.inputs):
            outside = read.fed and read.call not in region.calls
            if outside and len(read.shape) == len(value.shape):
                entering.add(read)
    waiting, seen = [other], {other}
    while waiting:
        made = waiting.pop()
        if made in entering:
            return True
        if made.call is not None and made.call not in region.calls:
            fresh = [read for read in map(origin, made.call.inputs) if read.fed and read not in seen]
            seen.update(fresh)
            waiting += fresh
    return False


def _returns(frame: Frame, calls: Iterable[Call]) -> int | Refusal:
    """How many values a module returns in a tuple, 0 for a bare tensor; or why others need more of them."""
    returned = frame.returned
    if isinstance(returned, Value):
        return 0
    if not isinstance(returned, tuple) or not returned or not isinstance(returned[0], Value):
        return Refusal(f"`{frame.name}` returns neither a tensor nor a tuple that begins with one")
    made = {value for call in frame.calls() for value in call.outputs}
    needed = {value for call in calls for value in call.inputs}
    for item in returned[1:]:
        if item is not None and (not isinstance(item, Value) or item not in made or item in needed):
            return Refusal(f"`{frame.name}` returns more than one value that others need")
    return len(returned)


def _closing(value: Value, given: Mapping[Value, Frame], calls: set[Call]) -> Frame | Refusal:
    """The module whose zeros are zeros in the sum: of a product, any factor's."""
    if value in given:
        return given[value]
    call = value.call
    factors = [] if call is None else [read for read in map(origin, call.inputs) if read.fed]
    own = [read for read in factors if read in given or read.call in calls]
    if call is None or call not in calls or call.name not in _KEEP_ZEROS or (len(own) != 1 and call.name != "mul"):
        name = "the model" if call is None else f"`{call.name}` in {call.frame.name or 'the model'}"
        return Refusal(f"{name} adds more to the sum than what one module gives")
    found = [_closing(read, given, calls) for read in own]
    return next((each for each in found if isinstance(each, Frame)), found[0])


def _broadcast(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of what is computed of these element by element; None where they do not fit."""
    made = torch.empty((), device="meta")
    try:
        for shape in shapes:
            made = made + torch.empty(shape, device="meta")
    except RuntimeError:
        return None
    return tuple(made.shape)


def _sizes(read: tuple[int, ...], given: tuple[int, ...]) -> tuple[int, int] | None:
    """Channels and stride of an image that is made of another; (0, 1) for the same sizes, None where there are none."""
    if read == given:
        return 0, 1
    if len(read) != 4 or len(given) != 4 or read[0] != given[0]:
        return None
    stride = -(-read[2] // given[2])
    if any(-(-size // stride) != left for size, left in zip(read[2:], given[2:], strict=True)):
        return None
    return given[1], stride


def _common_name(frames: Iterable[Frame]) -> str:
    """What the names of modules begin with, all of them; the whole name of one."""
    names = [str(frame.name).split(".") for frame in frames if any(call.macs for call in frame.calls())]
    common = names[0]
    for name in names[1:]:
        common = [a for a, b in zip(common, name, strict=False) if a == b and common.index(a) == name.index(b)]
    return ".".join(common)

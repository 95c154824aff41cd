"""Numbers in the configs of Transformers models that follow surgery, so that a stock class can be built from them.

    follow(small, example_inputs)

Which numbers these are is found by trying, see `solving`. They change only where the class then has the very tensors
and settings of the model, and answers as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shallower.core.failures import failing
from shallower.core.inputs import Inputs
from shallower.core.tensors import has_no_numbers
from shallower.core.text import listing
from shallower.core.trees import mapped
from shallower.errors import ForwardError, ModelError, OutOfMemoryError, ShallowerError, SurgeryError
from shallower.modules.attachment import detached_copy
from shallower.modules.edits import edits, replay
from shallower.modules.offloading import is_mapped, weightless
from shallower.modules.prepared.lists import Settings
from shallower.saving.implementations import configs_in
from shallower.saving.skeletons import build_skeleton, sketch
from shallower.saving.slots import slots_of
from shallower.saving.sources import import_transformers, source_of
from shallower.saving.stock.recorded import record, without_record
from shallower.saving.stock.solving import Leaf, Numbers, NumberSearch, Structure, all_but, with_numbers
from shallower.saving.stock.statement import NOTE, RAN
from shallower.surgery.observing import ALLOWED, Observed, Pass, observed
from shallower.surgery.whole import LOOSE, distance

_NONE = object()


@dataclass(frozen=True)
class StockPart:
    """A stock model, the outermost of its config."""

    name: str
    model: nn.Module
    config: Any
    source: str

    @cached_property
    def plain(self) -> dict[str, Any]:
        """The config as it was."""
        found: dict[str, Any] = self.config.to_dict()
        return without_record(found)

    def built(self, config: Mapping[str, Any]) -> Structure | None:
        """What its class makes of a config; None where it does not take it."""
        try:
            return Structure.of(sketch(self.source, config))
        except (ModelError, OutOfMemoryError):  # some numbers make tables that fit into no memory
            return None

    @cached_property
    def search(self) -> NumberSearch:
        """For the numbers that make the class like the model."""
        common = frozenset(import_transformers().PreTrainedConfig().to_dict())
        return NumberSearch(self.plain, self.built, Structure.of(self.model), common, self._asked())

    def _asked(self) -> frozenset[Leaf]:
        """Keys that its class asks the config for, and the config does not have."""
        base = import_transformers().PreTrainedConfig
        asked: list[tuple[Any, str]] = []

        def note(config: Any, key: str) -> Any:
            asked.append((config, key))
            raise AttributeError(f"{type(config).__name__!r} object has no attribute {key!r}")

        if hasattr(base, "__getattr__"):
            return frozenset()
        base.__getattr__ = note
        try:
            model = sketch(self.source, self.plain)
        except ModelError:
            return frozenset()
        finally:
            del base.__getattr__
        paths = {id(part): tuple(filter(None, path.split("."))) for path, part in configs_in(vars(model)["config"])}
        found = set()
        for config, key in asked:
            if id(config) in paths and not key.startswith("_"):
                found.add((*paths[id(config)], key))
        return frozenset(found)


def owners(model: nn.Module) -> Iterator[StockPart]:
    """The outermost stock models that a model consists of."""
    above: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in above) or not source_of(module):
            continue
        above.append(f"{name}." * (name != ""))
        yield StockPart(name, module, vars(module)["config"], source_of(module))


def follow(model: nn.Module, inputs: Inputs | None = None) -> None:
    """Give the configs of a model the numbers that its tensors have after surgery, as far as they can say them.

        follow(small, example_inputs)

    Args:
        model: after surgery; its configs are changed in place.
        inputs: on which the stock class has to answer as the model does. None where that is not to be tried.
    """
    for owner in owners(model):
        search = owner.search
        vars(owner.model).pop(NOTE, None)
        vars(owner.model).pop(RAN, None)
        nearest, said = search.solved(), dict[Leaf, Any]()
        found = search.said_rightly(nearest)
        for changes in _fewer(search, found):
            if _is_true(model, owner, changes, inputs):
                said = dict(changes)
                break
        untrue = []
        for leaf, number in found.items():
            if leaf not in said:
                untrue.append(f"{'.'.join(map(str, leaf))} = {number}")
        if untrue:
            vars(owner.model)[NOTE] = f"with {listing(untrue, 3)} in its config it gives other outputs"
        elif obstacle := search.obstacle(nearest):
            vars(owner.model)[NOTE] = f"no numbers in its config {obstacle}"
        record(owner.model, needed=RAN not in vars(owner.model))


def _fewer(search: NumberSearch, found: Numbers) -> Iterator[Numbers]:
    """Numbers to change: all that were found, or else all but one."""
    if not found:
        return
    yield found
    for path in found:
        fewer = search.said_rightly(all_but(found, path))
        if fewer:
            yield fewer


# --------------------------------------------------------------------------------------------------- does it answer so?


def _is_true(model: nn.Module, owner: StockPart, changes: Numbers, inputs: Inputs | None) -> bool:
    """Set the numbers; where the stock class, or the model itself, then answers otherwise they are as before."""
    if inputs is None:
        _set(owner, changes)
        return True
    weights = [*model.parameters(), *model.buffers()]
    answer: Callable[[nn.Module, Inputs], Any] = _outputs
    if any(has_no_numbers(t) or is_mapped(t) for t in weights):
        answer = _computed
    try:
        before = answer(model, inputs)
    except ForwardError:  # it does not run without numbers
        if owner.search.unlike(changes):
            return False
        _set(owner, changes)
        return True
    try:
        same = _agree(before, answer(_with_stock(model, owner, changes), inputs))
    except ShallowerError:  # the surgery is done and proven; a config that cannot be tried says nothing
        return False
    if same:
        undo = _set(owner, changes)
        with suppress(ForwardError, SurgeryError):
            if _agree(before, answer(model, inputs)):
                if owner.search.whole(changes):
                    vars(owner.model)[RAN] = True
                return True
        undo()
    return False


def _outputs(model: nn.Module, inputs: Inputs) -> Observed:
    """What the model gives."""
    return observed(model, Pass(inputs), (), after=True)


def _agree(expected: Observed | Sequence[str], found: Observed | Sequence[str]) -> bool:
    """Whether two models gave the same up to rounding, or did the same."""
    if not isinstance(expected, Observed) or not isinstance(found, Observed):
        return expected == found
    allowed = 0.0
    for output in expected.outputs:
        if output.is_floating_point():
            allowed = max(allowed, ALLOWED.get(output.dtype, LOOSE * torch.finfo(output.dtype).eps))
    return distance(expected, found) <= allowed


def _with_stock(model: nn.Module, owner: StockPart, changes: Numbers) -> nn.Module:
    """The model with what the class makes of the changed config in its place, which shares all weights.

    Where the config does not say everything, the surgery is done to it, as loading a saved model does.

    Raises:
        ModelError: that has other tensors.
    """
    stock = build_skeleton(owner.source, with_numbers(owner.plain, changes))
    whole = owner.search.whole(changes)
    if not whole:
        with torch.device("meta"):
            replay(stock, edits(owner.model))
    own = slots_of(owner.model)
    for name, slot in slots_of(stock).items():
        if name not in own or own[name].tensor.shape != slot.tensor.shape:
            raise ModelError(f"{name}: it is not as the changed config and the surgery make it")
        tensor = own[name].tensor
        if whole and slot.kind == "transient" and not has_no_numbers(slot.tensor):
            tensor = slot.tensor.to(tensor.device)
        setattr(slot.module, slot.attribute, tensor)
    stock.train(owner.model.training)
    if not owner.name:
        return stock
    made = detached_copy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    made.set_submodule(owner.name, stock)
    return made


class _OperationLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation with the shapes that it reads and its other arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = mapped(lambda t: (tuple(t.shape), str(t.dtype)), (args, kwargs or {}))
        self.seen.append(f"{func}{given}")
        return func(*args, **(kwargs or {}))


def _computed(model: nn.Module, inputs: Inputs) -> list[str]:
    """What the model computes, without numbers.

    Raises:
        ForwardError: it does not run without.
    """
    empty = detached_copy(model, weightless([*model.parameters(), *model.buffers()]))
    recorder = _OperationLog()
    run = Pass(inputs).converted(lambda t: t.to("meta"))
    with failing(ForwardError, "the model does not run without numbers"), torch.no_grad(), recorder:
        run.over(empty)
    return recorder.seen


# ---------------------------------------------------------------------------------------------------- setting numbers


def _set(owner: StockPart, changes: Numbers) -> Callable[[], None]:
    """Set the numbers, and all that follow from them, in the configs of a model and its parts; what undoes it."""
    made = list(settings_for(owner, with_numbers(owner.plain, changes)))
    before = [settings.now(owner.model) for settings in made]
    for settings in made:
        settings.perform(owner.model)

    def undo() -> None:
        for settings in reversed(before):
            settings.perform(owner.model)

    return undo


def settings_for(owner: StockPart, config: Mapping[str, Any]) -> Iterator[Settings]:
    """What is to be set in the configs of a stock model and its parts so that they are as the class makes them."""
    old = dict(sketch(owner.source, owner.plain).named_modules())
    new = dict(sketch(owner.source, config).named_modules())
    seen: set[int] = set()
    for name, module in owner.model.named_modules():
        own = vars(module).get("config")
        if id(own) in seen or not hasattr(own, "to_dict") or name not in old or name not in new:
            continue
        seen.add(id(own))
        was, becomes = vars(old[name]).get("config"), vars(new[name]).get("config")
        if was is not None and becomes is not None:
            yield Settings(name, tuple(_differences(was.to_dict(), becomes.to_dict())))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[Any]:
    """What two configs of one class say differently: (path, value in the second)."""
    for key, value in new.items():
        before = old.get(key, _NONE)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _differences(before, value, (*at, key))
        elif before != value:
            yield (*at, key), value

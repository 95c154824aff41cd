"""What the modules of a model read and return while it runs.

    with recorded(model, ["fc1", "fc2"]) as seen:
        model(x)
    seen.inputs["fc1"]                          # a tensor for each call

Modules may be called by position or by keyword, once, several times or never, and on no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from shallower.core.trees import mapped, tensors
from shallower.errors import SiteError

K = TypeVar("K", bound=Hashable)

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Called with a module and its arguments; may return others, as (args, kwargs)."""

After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""Called with a module, its arguments and its output; may return another output."""


@contextmanager
def watching(
    modules: nn.Module | Mapping[K, nn.Module],
    *,
    before: Mapping[K, Before] | None = None,
    after: Mapping[K, After] | None = None,
) -> Iterator[None]:
    """Call functions whenever some modules run.

        with watching(model, before={"fc1": lambda module, args, kwargs: print(read(args, kwargs).shape)}):
            model(x)

    Args:
        modules: a model, whose parts are meant by their dotted names, or modules by keys of any kind.
        before: called before a module runs.
        after: called after it has run.

    Raises:
        SiteError: the model has no module of this name.
    """
    with ExitStack() as stack:
        for key, reads in (before or {}).items():
            handle = _module(modules, key).register_forward_pre_hook(reads, with_kwargs=True)
            stack.callback(handle.remove)
        for key, returns in (after or {}).items():
            handle = _module(modules, key).register_forward_hook(returns, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@dataclass
class Recorded(Generic[K]):
    """What was seen, by module.

    Attributes:
        inputs: the tensor that each call read.
        outputs: what each call returned, in its own structure.
    """

    inputs: dict[K, list[Tensor]] = field(default_factory=dict)
    outputs: dict[K, list[Any]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget it."""
        for calls in (*self.inputs.values(), *self.outputs.values()):
            calls.clear()


def copied(tensor: Tensor) -> Tensor:
    """The tensor without its history, safe from what writes into it later."""
    return tensor.detach().clone()


@contextmanager
def recorded(
    modules: nn.Module | Mapping[K, nn.Module],
    keys: Iterable[K],
    *,
    inputs: bool = True,
    outputs: bool = True,
    keep: Callable[[Tensor], Any] = copied,
) -> Iterator[Recorded[K]]:
    """Record what some modules read and return.

        with evaluating(model), recorded(model, ["fc1"], outputs=False) as seen:
            call(model, batch)
        (x,) = seen.inputs["fc1"]

    Args:
        modules: a model, whose parts are meant by their dotted names, or modules by keys of any kind.
        keys: which of them.
        inputs, outputs: what to record.
        keep: what is kept of each tensor, `Tensor.detach` where nothing writes into it later.

    Raises:
        SiteError: the model has no module of this name, or, while it runs, one is called without a tensor.
    """
    seen: Recorded[K] = Recorded()
    before: dict[K, Before] = {}
    after: dict[K, After] = {}
    for key in keys:
        if inputs:
            before[key] = _reader(seen.inputs.setdefault(key, []), keep)
        if outputs:
            after[key] = _writer(seen.outputs.setdefault(key, []), keep)
    with watching(modules, before=before, after=after):
        yield seen


def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a layer reads: the first among its arguments, by position or by keyword.

    Raises:
        SiteError: there is none.
    """
    first = next(tensors((args, kwargs)), None)
    if first is None:
        raise SiteError("a layer of the site was called without a tensor")
    return first


def _reader(calls: list[Tensor], keep: Callable[[Tensor], Any]) -> Before:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(keep(read(args, kwargs)))

    return before


def _writer(calls: list[Any], keep: Callable[[Tensor], Any]) -> After:
    def after(_: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        calls.append(mapped(keep, output))

    return after


def _module(modules: nn.Module | Mapping[K, nn.Module], key: K) -> nn.Module:
    if isinstance(modules, Mapping):
        return modules[key]
    try:
        return modules.get_submodule(str(key))
    except AttributeError:
        raise SiteError(f"the model has no module {key!r}; were the sites found in this model?") from None

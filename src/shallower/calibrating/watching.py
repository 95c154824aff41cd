"""What a site's layers read and give in one pass, taken up by hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shallower.calibrating.patches import flat, unusual_padding
from shallower.calibrating.residual import ResidualSums
from shallower.core.inputs import Stopped, call, tensors
from shallower.errors import SiteError
from shallower.sites import LinearMap, Site

_SAMPLE = 1 << 12


@dataclass(frozen=True)
class Goal:
    """What the consumers of a site give in the dense network, in one call.

    Attributes:
        y: for each consumer, its output; where `streamed`, and part of what it is added to.
        streamed: for each consumer, whether that part is in `y`.
        units: for each consumer, (d,) float32, what a unit of each output becomes in the sum; ones where it is in none.
    """

    y: tuple[Tensor, ...]
    streamed: tuple[bool, ...]
    units: tuple[Tensor, ...]


Goals = Mapping[str, Sequence[Goal]]


def _sample(t: Tensor) -> Tensor:
    """Some of the values, spread over all dimensions."""
    flat = t.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE) | 1].clone()


class _Finished(Stopped):
    """All sites have run: the rest of the forward pass is of no use."""


class Watch:
    """Records what the maps of some sites read and give while a model runs; the pass stops after the last of them."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], sampled: bool = False) -> None:
        self.model = model
        self.sites = sites
        self._keep: Callable[[Tensor], Tensor] = _sample if sampled else torch.clone
        self._sampled = sampled
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.others: dict[str, list[Tensor | None]] = {}
        self.units: dict[str, Tensor] = {}
        self.read_as: dict[str, LinearMap] = {}
        self._handles: list[Any] = []
        self._sums = _Sums(self)
        self._wanted = {site.consumers[-1].name: site.calls for site in sites}
        self._follows: list[str] = []
        self._reached: Callable[[], bool] = lambda: True

    def __enter__(self) -> Watch:
        consumers = {m.name: m for site in self.sites for m in site.consumers}
        producers = {site.producer.name: site.producer for site in self.sites if site.producer is not None}
        # a map may be the consumer of one site and the producer of the next
        for name, m in {**producers, **consumers}.items():
            self._hook(m, follow=name in consumers)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, m: LinearMap, *, follow: bool) -> None:
        module = self.model.get_submodule(m.name)

        padding = unusual_padding(module)
        self.read_as[m.name] = m if padding is None else replace(m, padding=(0, 0))

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(tensors((args, kwargs))).detach()
            self.inputs.setdefault(m.name, []).append(self._keep(x) if padding is None else self._keep(padding(x)))

        def after(_: nn.Module, _args: Any, output: Tensor) -> None:
            self.outputs.setdefault(m.name, []).append(self._keep(output.detach()))
            self._follows.append(m.name)
            self._sums.follow(output)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if follow:
            self._handles.append(module.register_forward_hook(after))

    def run(self, inputs: Any, reached: Callable[[], bool] = lambda: True) -> None:
        """One forward pass, as far as it is needed, and at least until `reached`."""
        self.inputs, self.outputs, self.others, self._follows = {}, {}, {}, []
        self._sums = _Sums(self, measure=not self.units and not self._sampled)
        self._sums.keep = _sample if self._sampled else lambda t: t
        self._reached = reached
        try:
            with self._sums:
                call(self.model, inputs)
        except _Finished:
            pass
        maps = {m.name: m for site in self.sites for m in site.consumers}
        for name, unit in zip(self._follows, self._sums.units, strict=True):
            if unit is not None:
                divided = flat(unit, maps[name].kind == "conv2d")[0]
                self.units[name] = torch.where(divided == 0, 0.0, 1 / divided)
        for name, other in zip(self._follows, self._sums.others, strict=True):
            self.others.setdefault(name, []).append(other)

    def forget(self) -> None:
        """What the last pass recorded."""
        self.inputs, self.outputs, self.others = {}, {}, {}
        self._sums = _Sums(self)

    def limit(self, sites: Sequence[Site]) -> None:
        """End the passes after these sites."""
        self._wanted = {site.consumers[-1].name: site.calls for site in sites}

    def goals(self, site: Site, compensation: float) -> list[Goal]:
        """What the last pass tells."""
        names = [m.name for m in site.consumers]
        found = []
        for i in range(calls(site, [self.outputs], names)):
            others = [self.others[name][i] for name in names]
            ys = []
            for name, other in zip(names, others, strict=True):
                y = self.outputs[name][i]
                ys.append(y + compensation * other if compensation and other is not None else y)
            streamed = tuple(bool(compensation) and other is not None for other in others)
            units = tuple(self.units.get(m.name, torch.ones(m.d_out)) for m in site.consumers)
            found.append(Goal(tuple(ys), streamed, units))
        return found

    def complete(self) -> bool:
        """Whether every consumer has run as often as it does in a pass."""
        return self._reached() and all(len(self.outputs.get(m, [])) >= calls for m, calls in self._wanted.items())

    def tensors(self, site: Site) -> list[Tensor]:
        """All that the last pass recorded at a site."""
        made = () if site.producer is None else (site.producer.name,)
        names = [m.name for m in site.consumers]
        read = [t for name in (*made, *names) for t in self.inputs.get(name, ())]
        others = [t for name in names for t in self.others.get(name, ()) if t is not None]
        return [*read, *(t for name in names for t in self.outputs.get(name, ())), *others]

    def reads(self, site: Site) -> list[Tensor]:
        """Samples of it."""
        return [t if self._sampled else _sample(t) for t in self.tensors(site)]


class _Sums(ResidualSums):
    """Ends the pass one call after the last residual sum."""

    def __init__(self, watch: Watch, measure: bool = False) -> None:
        super().__init__(measure)
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stop where nothing is left to follow."""
        result = super().__torch_function__(func, types, args, kwargs)
        if not self.followed and self._watch.complete():
            raise _Finished
        return result


def calls(
    site: Site, seen: Sequence[Mapping[str, Sequence[Any]]], names: Sequence[str], calls: int | None = None
) -> int:
    """How often the consumers have run, which must be alike."""
    ran = [len(each.get(name, ())) for each in seen for name in names]
    expected = ran[0] if calls is None else calls
    if expected == 0 or any(count != expected for count in ran):
        raise SiteError(
            f"{site.name}: its consumers did not run alike on this batch; is this the model that the sites were "
            "found in, and are the batches like the example inputs?"
        )
    return expected

"""What a site's layers read and return in one pass, and the residual sums that their outputs go into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from shallower.calibrating.patches import flat, unusual_padding
from shallower.calibrating.residual_sums import ResidualSums
from shallower.core.inputs import Stopped, call
from shallower.core.watching import After, Before, copied, read, watching
from shallower.errors import Refusal
from shallower.sites import LinearMap, Site

_SAMPLE = 1 << 12
"""Values of a tensor by which it is compared with what it should be."""


@dataclass(frozen=True)
class DenseOutputs:
    """What the consumers of a site return in the dense network, in one call: what they should return when narrower.

    Attributes:
        y: for each consumer, its output; where `streamed`, and part of what it is added to.
        streamed: for each consumer, whether that part is in `y`.
        units: for each consumer, (d,) float32, what a unit of each output becomes in the sum; ones where it is in none.
    """

    y: tuple[Tensor, ...]
    streamed: tuple[bool, ...]
    units: tuple[Tensor, ...]


Goals = Mapping[str, Sequence[DenseOutputs] | Refusal]
"""Of one batch: by site, one for each call; or why there are none."""


class _Finished(Stopped):
    """All sites have run: the rest of the forward pass is of no use."""


class Recorder:
    """Records what the maps of some sites read and return while a model runs; the pass stops after the last of them.

        with evaluating(model), Recorder(model, sites) as recorder:
            recorder.run(inputs)
            outputs = recorder.outputs[site.consumers[0].name]      # one for each call

    Attributes:
        inputs, outputs: by map, what each call read and returned in the last pass.
        others: by consumer, what each call's output was added to; None where it was added to nothing.
        units: by consumer, what a unit of its outputs becomes in that sum.
        read_as: by map, its geometry as its recorded input needs it: padding is done where it is not with zeros.
        rows: of each call of a consumer, how many positions its output had.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], sampled: bool = False) -> None:
        self.model = model
        self.sites = sites
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.others: dict[str, list[Tensor | None]] = {}
        self.units: dict[str, Tensor] = {}
        self.read_as: dict[str, LinearMap] = {}
        self.rows: list[int] = []
        self._sampled = sampled
        self._keep: Callable[[Tensor], Tensor] = copied
        if sampled:
            self._keep = _sampled_values
        self._stack = ExitStack()
        self._sums = _Sums(self)
        self._follows: list[str] = []
        self._reached: Callable[[], bool] = lambda: True
        self.limit(sites)

    def __enter__(self) -> Recorder:
        maps: dict[str, LinearMap] = {}
        for site in self.sites:
            if site.producer is not None:
                maps[site.producer.name] = site.producer
        # a map may be the consumer of one site and the producer of the next
        consumers = self._consumers()
        maps |= consumers
        before = {name: self._before(m) for name, m in maps.items()}
        after = {name: self._after(m) for name, m in consumers.items()}
        self._stack.enter_context(watching(self.model, before=before, after=after))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _consumers(self) -> dict[str, LinearMap]:
        return {m.name: m for site in self.sites for m in site.consumers}

    def _before(self, m: LinearMap) -> Before:
        padding = unusual_padding(self.model.get_submodule(m.name))
        self.read_as[m.name] = m
        if padding is not None:
            self.read_as[m.name] = replace(m, padding=(0, 0))

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = read(args, kwargs).detach()
            if padding is not None:
                x = padding(x)
            self.inputs.setdefault(m.name, []).append(self._keep(x))

        return before

    def _after(self, m: LinearMap) -> After:
        name = m.name

        def after(_: nn.Module, _args: Any, _kwargs: Any, output: Tensor) -> None:
            # first, since the pass may end with the next operation once there are all outputs
            if output.numel():
                self.rows.append(len(flat(output, m.kind == "conv2d")))
            self.outputs.setdefault(name, []).append(self._keep(output.detach()))
            self._follows.append(name)
            self._sums.follow(output)

        return after

    def limit(self, sites: Sequence[Site]) -> None:
        """End the passes after these sites."""
        self._wanted = {site.consumers[-1].name: site.calls for site in sites}

    def run(self, inputs: Any, reached: Callable[[], bool] = lambda: True) -> None:
        """One forward pass, as far as it is needed, and at least until `reached`."""
        self.forget()
        self._sums = _Sums(self, measure=not self.units and not self._sampled)
        if self._sampled:
            self._sums.keep = _sampled_values
        self._reached = reached
        try:
            with self._sums:
                call(self.model, inputs)
        except _Finished:
            pass
        consumers = self._consumers()
        for name, unit, other in zip(self._follows, self._sums.units, self._sums.others, strict=True):
            self.others.setdefault(name, []).append(other)
            if unit is not None and unit.numel():
                # the way back divides by the scales in between, and makes 0 of what they nearly cut off
                divided = flat(unit, consumers[name].kind == "conv2d")[0]
                self.units[name] = torch.where(divided == 0, 0.0, 1 / divided)

    def forget(self) -> None:
        """Drop what the last pass recorded."""
        self.inputs, self.outputs, self.others, self._follows, self.rows = {}, {}, {}, [], []
        self._sums = _Sums(self)

    def complete(self) -> bool:
        """Whether every consumer has run as often as it does in a pass."""
        return self._reached() and all(len(self.outputs.get(m, [])) >= calls for m, calls in self._wanted.items())

    def calls(self, site: Site) -> int | Refusal:
        """How often the consumers ran in the last pass; 0 where they all were skipped."""
        ran = {m.name: len(self.outputs.get(m.name, ())) for m in site.consumers}
        least, most = min(ran, key=ran.__getitem__), max(ran, key=ran.__getitem__)
        if ran[least] == ran[most]:
            return ran[least]
        return Refusal(f"in one pass `{most}` ran {ran[most]} times and `{least}` {ran[least]} times")

    def goals(self, site: Site, compensation: float) -> list[DenseOutputs] | Refusal:
        """What the consumers of a site returned in the last pass.

        Args:
            site: which one.
            compensation: the part of what an output was added to that counts as its own.
        """
        calls = self.calls(site)
        if isinstance(calls, Refusal):
            return calls
        return [self._goal(site, compensation, i) for i in range(calls)]

    def _goal(self, site: Site, compensation: float, i: int) -> DenseOutputs:
        ys, streamed, units = [], [], []
        for m in site.consumers:
            y, other = self.outputs[m.name][i], self.others[m.name][i]
            streamed.append(bool(compensation) and other is not None)
            if compensation and other is not None:
                y = y + compensation * other
            ys.append(y)
            units.append(self.units.get(m.name, torch.ones(m.d_out)))
        return DenseOutputs(tuple(ys), tuple(streamed), tuple(units))

    def tensors(self, site: Site) -> list[Tensor]:
        """All that the last pass recorded at a site."""
        found: list[Tensor] = []
        if site.producer is not None:
            found += self.inputs.get(site.producer.name, ())
        for m in site.consumers:
            found += self.inputs.get(m.name, ())
            found += self.outputs.get(m.name, ())
            for other in self.others.get(m.name, ()):
                if other is not None:
                    found.append(other)
        return found

    def samples(self, site: Site) -> list[Tensor]:
        """Some values of each of these tensors."""
        tensors = self.tensors(site)
        if self._sampled:
            return tensors
        return list(map(_sampled_values, tensors))


class _Sums(ResidualSums):
    """Ends the pass one call after the last residual sum."""

    def __init__(self, recorder: Recorder, measure: bool = False) -> None:
        super().__init__(measure)
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stop where nothing is left to follow."""
        result = super().__torch_function__(func, types, args, kwargs)
        if not self.followed and self._recorder.complete():
            raise _Finished
        return result


def _sampled_values(t: Tensor) -> Tensor:
    """Some of the values, spread over all dimensions."""
    values = t.detach().reshape(-1)
    # an odd step: an even one would meet the same channels again and again
    return values[:: max(1, values.numel() // _SAMPLE) | 1].clone()

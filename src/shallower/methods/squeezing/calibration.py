"""The data that squeezing is calibrated on, with the way to read them, and the passes over them.

calibration = Calibration(batches, SqueezeOptions(sensitivity=False))
calibration.grams(dense, small, [site], with_inputs=False)
divergence(calibration, dense, small)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor, nn

from shallower.calibrating.collecting import GramOptions, collect_goals, collect_grams, one_site, samples_in
from shallower.calibrating.fisher import output_metrics
from shallower.calibrating.grams import Centred
from shallower.calibrating.recording import Goals
from shallower.calibrating.site_grams import SiteGrams
from shallower.calibrating.walking import Walk
from shallower.core.inputs import (
    Inputs,
    InputsOf,
    arguments_in,
    call,
    default_inputs_of,
    default_mask_of,
    model_device,
    reiterable,
    to_device,
)
from shallower.core.modes import evaluating
from shallower.core.processes import summed_over_processes
from shallower.errors import SiteError
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.sites import Site, Sites

_SENSITIVE = 32
"""Batches, evenly spaced, on which sensitivity is measured."""

_JUDGED = 8
"""Batches, evenly spaced, on which two networks are compared."""

_GOALS = 1 << 28
"""Bytes of the dense network's outputs that are held at a time, where passes run from the inputs."""


@dataclass(frozen=True)
class Calibration:
    """What squeezing is done with.

    Attributes:
        batches: what is calibrated on; kept in memory, so that every pass sees the same in the same order.
        options: of the squeezing.
        inputs_of: returns the model's inputs in a batch.
    """

    batches: Iterable[Any]
    options: SqueezeOptions = field(default_factory=SqueezeOptions)
    inputs_of: InputsOf = default_inputs_of

    def __post_init__(self) -> None:
        if not isinstance(self.batches, (list, tuple)):
            object.__setattr__(self, "batches", list(reiterable(self.batches)))

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(map(samples_in, map(self.inputs_of, self.batches)))

    def mask_of(self, batch: Any) -> Tensor | None:
        """The mask of padding of a batch."""
        return (self.options.mask_of or default_mask_of)(batch)

    def read(self) -> Iterator[tuple[Inputs, Tensor | None]]:
        """Inputs and mask of every batch."""
        for batch in self.batches:
            yield self.inputs_of(batch), self.mask_of(batch)

    def metrics(self, model: nn.Module, sites: Iterable[Site]) -> dict[str, Centred]:
        """The influence of a change at each consumer's output on the model's output; empty without sensitivity."""
        if not self.options.sensitivity:
            return {}
        names = [m.name for site in sites for m in site.consumers]
        return output_metrics(
            model,
            names,
            _spread(list(self.batches), _SENSITIVE),
            inputs_of=self.inputs_of,
            mask_of=self.options.mask_of,
            output_of=self.options.output_of,
            logits=self.options.logits,
            seed=self.options.seed,
        )

    def goals(self, dense: nn.Module, sites: Sequence[Site]) -> list[Goals]:
        """What the consumers of the first of these sites should return, of as many as fit into memory."""
        return collect_goals(
            dense,
            sites,
            self.batches,
            compensation=self.options.compensation,
            inputs_of=self.inputs_of,
            most=_GOALS,
        )

    def grams(
        self,
        dense: nn.Module,
        small: nn.Module | None,
        sites: Sequence[Site],
        with_inputs: bool,
        with_rows: bool = False,
        goals: Sequence[Goals] | None = None,
        walk: Walk | None = None,
    ) -> dict[str, SiteGrams]:
        """Gram matrices of these sites."""
        options = GramOptions(
            compensation=0.0 if small is None else self.options.compensation,
            inputs=with_inputs,
            joint=with_inputs and self.options.linear_path,
            rows=with_rows,
        )
        found = collect_grams(
            dense,
            small,
            sites,
            self.batches,
            options,
            goals=goals,
            walk=walk,
            inputs_of=self.inputs_of,
            mask_of=self.options.mask_of,
        )
        return {site.name: one_site(found, site) for site in sites}


def divergence(calibration: Calibration, dense: nn.Module, small: nn.Module) -> float:
    """The mean divergence of two networks' outputs, on some of the batches of all processes.

    Of logits the Kullback-Leibler divergence of the distributions, else the squared difference.
    """
    total = count = 0.0
    batches = list(calibration.batches)
    step = max(1, len(batches) // _JUDGED)
    with evaluating(dense), evaluating(small):
        for batch in islice(batches, 0, _JUDGED * step, step):
            each = _divergences(calibration, dense, small, batch)
            total, count = total + float(each.sum()), count + each.numel()
    total, count = summed_over_processes(total, count)
    return total / max(1, count)


def _divergences(calibration: Calibration, dense: nn.Module, small: nn.Module, batch: Any) -> Tensor:
    """Of each output on one batch that counts."""
    options = calibration.options
    inputs = to_device(calibration.inputs_of(batch), model_device(dense))
    raw = call(dense, inputs)
    there, here = options.output_of(raw).float(), options.output_of(call(small, inputs)).float()
    logits = hasattr(raw, "logits") if options.logits is None else options.logits
    if logits:
        there, here = there.log_softmax(-1), here.log_softmax(-1)
        each = (there.exp() * (there - here)).sum(-1)
    else:
        each = (there - here).square().sum(-1)
    mask = calibration.mask_of(batch)
    if mask is not None and mask.shape == each.shape:
        each = each[mask.to(each.device).bool()]
    return each


def _spread(batches: Sequence[Any], most: int) -> Sequence[Any]:
    """So many of the batches, evenly spaced."""
    return batches[:: max(1, -(-len(batches) // most))]


def reader_of(model: nn.Module, sites: Sites, first: Any, example_inputs: Inputs | None) -> InputsOf:
    """How to read batches like the first: of (a, b), two tensors, whether b is labels or a second argument.

    That follows from how many arguments the model was found with, or is timed with, or else from its signature.

    Raises:
        SiteError: it does not follow from any of them.
    """
    if not (isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(t, Tensor) for t in first)):
        return default_inputs_of
    arguments = sites.arguments
    if example_inputs is not None:
        arguments = arguments_in(example_inputs)
    if not arguments:
        least, most = _positional(model)
        if least < 2 <= most:
            raise SiteError(
                "a calibration batch is a pair of tensors: these may be (inputs, labels) or two arguments of the "
                "model. Say which: inputs_of=lambda batch: batch[0], or inputs_of=tuple"
            )
        arguments = least
    return default_inputs_of if arguments < 2 else tuple


def _positional(model: nn.Module) -> tuple[int, float]:
    """How many positional arguments a model needs at least, and takes at most."""
    least, most = 0, 0.0
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = math.inf
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
    return least, most

"""The data that squeezing is calibrated on, read once, and the passes over them.

calibration = Calibration(batches, sh.SqueezeOptions(sensitivity=False))
calibration.grams(dense, small, [site])
mean_divergence(calibration, dense, small)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from shallower.calibrating.collecting import GramOptions, collect_goals, collect_grams
from shallower.calibrating.fisher import OutputOf, default_output_of, output_metrics
from shallower.calibrating.grams import Centred
from shallower.calibrating.recording import Goals
from shallower.calibrating.site_grams import SiteGrams
from shallower.calibrating.walking import Walk
from shallower.core.batches import Batch, Batches
from shallower.core.inputs import Inputs, InputsOf, arguments_in, call, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.core.outputs import are_logits
from shallower.core.processes import summed_over_processes
from shallower.errors import Refusal, SiteError
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.sites import Site, Sites
from shallower.training.divergence import counted, kl_at_positions

_SENSITIVE = 32
"""Batches, evenly spaced, on which sensitivity is measured."""

_THINNED = 3
"""Of so many rows one tells the sensitivity: a gradient costs as much as two passes and more."""

_BACKWARD = 3
"""Passes that one forward and backward costs."""

_JUDGED = 8
"""Batches, evenly spaced, on which two networks are compared."""

_GOALS = 1 << 28
"""Bytes of the dense network's outputs that are held at a time, where passes run from the inputs."""


class Calibration:
    """What squeezing is done with: the data, read once, and the options.

        calibration = Calibration(batches, sh.SqueezeOptions(seed=1))

    Attributes:
        batches: inputs and masks, the same in every pass.
        options: of the squeezing.
        refused: sites that cannot be calibrated and keep their widths, each with the reason.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        options: SqueezeOptions | None = None,
        inputs_of: InputsOf = default_inputs_of,
    ) -> None:
        self.options = options or SqueezeOptions()
        self.batches = Batches.read(batches, inputs_of, self.options.mask_of)
        self.refused: dict[str, str] = {}

    @property
    def output_of(self) -> OutputOf:
        """How the output that matters is taken from what the model returns."""
        return self.options.output_of or default_output_of

    def metrics(self, model: nn.Module, sites: Iterable[Site]) -> dict[str, Centred]:
        """The influence of a change at each consumer's output on the model's output; empty without sensitivity."""
        if not self.options.sensitivity:
            return {}
        names = [m.name for site in sites for m in site.consumers]
        chosen = list(islice(self.batches, 0, None, -(-len(self.batches) // _SENSITIVE)))
        self.batches.run += _BACKWARD * sum(batch.rows for batch in chosen) / _THINNED
        return output_metrics(
            model,
            names,
            chosen,
            output_of=self.output_of,
            logits=self.options.logits,
            seed=self.options.seed,
            thin=_THINNED,
        )

    def goals(self, dense: nn.Module, sites: Sequence[Site]) -> list[Goals]:
        """What the consumers of the first of these sites should return, of as many as fit into memory."""
        return collect_goals(
            dense,
            sites,
            self.batches,
            compensation=self.options.compensation,
            most=_GOALS,
        )

    def grams(
        self,
        dense: nn.Module,
        small: nn.Module | None,
        sites: Sequence[Site],
        *,
        inputs: bool = False,
        rows: bool = False,
        goals: Sequence[Goals] | None = None,
        walk: Walk | None = None,
    ) -> dict[str, SiteGrams | Refusal]:
        """Gram matrices of these sites; see `collect_grams`."""
        options = GramOptions(
            compensation=self.options.compensation * (small is not None),
            inputs=inputs,
            joint=inputs and self.options.linear_path,
            rows=rows,
        )
        return collect_grams(dense, small, sites, self.batches, options, goals=goals, walk=walk)


def mean_divergence(calibration: Calibration, dense: nn.Module, small: nn.Module) -> float:
    """The mean divergence of two networks' outputs, on some of the batches of all processes.

    Of logits the Kullback-Leibler divergence of the distributions, else the squared difference.
    """
    batches = calibration.batches
    step = max(1, len(batches) // _JUDGED)
    total = count = 0.0
    with evaluating(dense), evaluating(small):
        for index in range(0, min(len(batches), _JUDGED * step), step):
            batch = batches[index].on(model_device(dense))
            each = divergences(calibration, wanted_on(calibration, dense, batch), small, batch)
            batches.run += 2 * batches[index].rows
            total, count = total + float(each.sum()), count + each.numel()
    total, count = summed_over_processes(total, count)
    return total / max(1, count)


@dataclass(frozen=True)
class Wanted:
    """What the dense network returns on one batch.

    Attributes:
        output: the tensor that matters of it.
        logits: whether these are compared as distributions.
    """

    output: Tensor
    logits: bool


def wanted_on(calibration: Calibration, dense: nn.Module, batch: Batch) -> Wanted:
    """What others are compared with on a batch, `wanted_on(calibration, dense, batch)`."""
    raw = call(dense, batch.inputs)
    logits = calibration.options.logits
    if logits is None:
        logits = are_logits(raw)
    return Wanted(calibration.output_of(raw), logits)


def divergences(calibration: Calibration, wanted: Wanted, small: nn.Module, batch: Batch) -> Tensor:
    """Of each output on one batch that counts, `divergences(calibration, wanted, small, batch)`."""
    there, here = wanted.output, calibration.output_of(call(small, batch.inputs))
    each = (there.float() - here.float()).square().sum(-1)
    if wanted.logits:
        each = kl_at_positions(here, there)
    return counted(each, batch.mask)


def reader_of(model: nn.Module, sites: Sites, example_inputs: Inputs | None) -> InputsOf:
    """How to read batches: of (a, b), two tensors, whether b is labels or a second argument.

    That follows from how many arguments the model was found with, or is timed with, or else from its signature.
    """
    arguments = sites.arguments
    if example_inputs is not None:
        arguments = arguments_in(example_inputs)

    def read(batch: Any) -> Inputs:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)
        if pair and (arguments or _needed_arguments(model)) > 1:
            return tuple(batch)
        return default_inputs_of(batch)

    return read


def _needed_arguments(model: nn.Module) -> int:
    """How many positional arguments a model is called with, if that does not depend on the caller.

    Raises:
        SiteError: it does: some have defaults.
    """
    least, most = 0, 0.0
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            most = math.inf
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            most += 1
            least += parameter.default is parameter.empty
    if least < 2 <= most:
        raise SiteError(
            "a calibration batch is a pair of tensors: these may be (inputs, labels) or two arguments of the model. "
            "Say which: inputs_of=lambda batch: batch[0], or inputs_of=tuple"
        )
    return least

"""Passes over two networks that start from the last finished block."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shallower.calibrating.finished_blocks import Course, FinishedBlocks, course_of
from shallower.calibrating.patches import check_mask
from shallower.calibrating.recording import Recorder
from shallower.core.batches import Batches
from shallower.core.failures import sentence
from shallower.core.inputs import InputsOf, default_inputs_of, model_device
from shallower.core.modes import evaluating
from shallower.errors import ForwardError, SiteError
from shallower.sites import Site

_ROUNDING = 1e-5
"""Relative difference of values that count as the same."""

_logger = logging.getLogger(__name__)


class Walk:
    """Both networks, each continuing from the blocks that are finished instead of from the inputs.

        walk = Walk.along(dense, small, sites, batches)
        for site in sites:                          # in this order
            grams = collect_grams(dense, small, [site], batches, walk=walk)

    The dense network never changes, and runs each block once; the small one runs it again when its sites are squeezed.
    What the sites read and return in the dense network is compared, on the first batch, with a pass from the inputs,
    and on all batches nothing may come from a block that was passed over. Where it does, or where a block returns
    what cannot be kept, the walk ends, which is logged once with the reason, and all passes run from the inputs.

    Attributes:
        dense, small: what the finished blocks of both networks returned; `small` is None where there is just one.
        course: when the blocks run.
        samples: by site, some values of what its maps read and return on the first batch.
    """

    def __init__(
        self,
        dense: FinishedBlocks,
        small: FinishedBlocks | None,
        course: Course,
        samples: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self.dense = dense
        self.small = small
        self.course = course
        self.samples = samples

    @classmethod
    def along(
        cls,
        dense: nn.Module,
        small: nn.Module | None,
        sites: Sequence[Site],
        batches: Iterable[Any],
        inputs_of: InputsOf = default_inputs_of,
    ) -> Walk:
        """Along these sites, in this order; one pass of the dense network over the first batch.

        Raises:
            FitError: the batch has a mask that `mask_of` returned and that fits none of the sites.
        """
        calibration = Batches.read(batches, inputs_of)
        if not len(calibration):
            # a process without data: there is nothing to run
            nothing = Course({}, {}, {})
            walk = cls(FinishedBlocks(dense, nothing), None, nothing, {})
            walk.end()
            return walk
        first = calibration[0].on(model_device(dense))
        with evaluating(dense), Recorder(dense, sites, sampled=True) as recorder:
            course = course_of(dense, sites, lambda: recorder.run(first.inputs))
        check_mask(first, recorder.rows)
        samples = {site.name: recorder.samples(site) for site in sites}
        blocks = None
        if small is not None:
            blocks = FinishedBlocks(small, course)
        walk = cls(FinishedBlocks(dense, course), blocks, course, samples)
        if not any(course.before.values()):
            walk.end()
        return walk

    @property
    def on(self) -> bool:
        """Whether passes still start from finished blocks."""
        return self.dense.on

    def end(self, reason: str = "") -> None:
        """Let all passes run from the inputs from now on; a reason is logged."""
        if reason and self.on:
            _logger.warning("every calibration pass now runs from the inputs, which takes longer: %s", reason)
        for blocks in (self.dense, self.small):
            if blocks is not None:
                blocks.give_up()

    def blocks_of(self, model: nn.Module) -> FinishedBlocks | None:
        """The finished blocks of one of the two networks."""
        if model is self.dense.model:
            return self.dense
        return self.small

    def agrees(self, recorder: Recorder, site: Site, first: bool) -> bool:
        """Whether the maps of a site read and returned what they do in a pass from the inputs."""
        if not first or recorder.model is not self.dense.model:
            return all(bool(t.sum(dtype=torch.float32).isfinite()) for t in recorder.tensors(site))
        here, there = recorder.samples(site), self.samples[site.name]
        return len(here) == len(there) and all(map(_same_but_rounding, here, there))


def walked(recorder: Recorder, walk: Walk | None, index: int, sites: Sequence[Site], inputs: Any) -> float:
    """One pass of a network over a batch, from its finished blocks where that can be done: the part that ran.

    Args:
        recorder: of the network.
        walk: along which; None to run from the inputs.
        index: of the batch.
        sites: that the pass is for. Only a pass for a single site starts from finished blocks.
        inputs: of the batch.
    """
    blocks = None
    if walk is not None:
        blocks = walk.blocks_of(recorder.model)
    if walk is None or blocks is None or not blocks.on or len(sites) != 1:
        recorder.run(inputs)
        return 1.0
    site = sites[0]
    to = walk.course.before[site.name]
    if blocks is walk.dense:
        to = walk.course.ahead[site.name]
    part = blocks.part(index, walk.course.before[site.name])
    try:
        with blocks.resumed(index, to):
            recorder.run(inputs, lambda: blocks.reached)
    except (ForwardError, SiteError) as error:
        # the model may not bear blocks that return nothing; an error of its own comes again in a pass from the inputs
        walk.end(f"{site.name}: {sentence(error)}")
    else:
        if walk.agrees(recorder, site, index == 0):
            return part
        walk.end(f"{site.name} reads more than what the block before it returns")
    recorder.run(inputs)
    return 1.0


def _same_but_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether two samples are the same but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    return not a.numel() or bool((a - b).abs().max() <= _ROUNDING * b.abs().max())

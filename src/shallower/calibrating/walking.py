"""Passes that start from the last finished block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shallower.calibrating.replay import Course, Replay, course_of
from shallower.calibrating.watching import Watch
from shallower.core.inputs import InputsOf, default_inputs_of, model_device, to_device
from shallower.core.modes import evaluating
from shallower.sites import Site

_ROUNDING = 1e-5


class Walk:
    """Both networks, each going on from the blocks that are finished instead of from the inputs.

        walk = Walk.along(dense, small, sites, batches)
        for site in sites:                          # in this order
            grams = collect_grams(dense, small, [site], batches, walk=walk)

    The dense network never changes, and runs each block once; the small one runs it again when its sites are squeezed.
    What the sites read and give in the dense network is compared, on the first batch, with what they do in a pass from
    the inputs, and on all batches nothing may come from a block that was passed over. Where it does the walk ends, and
    all passes run from the inputs.

    Attributes:
        dense, small: what the finished blocks of both networks gave; `small` is None where there is just one.
        course: when the blocks run.
        reads: by site, samples of what its maps read and give on the first batch.
    """

    def __init__(
        self, dense: Replay, small: Replay | None, course: Course, reads: Mapping[str, Sequence[Tensor]]
    ) -> None:
        self.dense = dense
        self.small = small
        self.course = course
        self.reads = reads

    @classmethod
    def along(
        cls,
        dense: nn.Module,
        small: nn.Module | None,
        sites: Sequence[Site],
        batches: Iterable[Any],
        inputs_of: InputsOf = default_inputs_of,
    ) -> Walk:
        """Along these sites, in this order; one pass of the dense network over the first batch."""
        first = to_device(inputs_of(next(iter(batches))), model_device(dense))
        with evaluating(dense), Watch(dense, sites, sampled=True) as watch:
            course = course_of(dense, sites, lambda: watch.run(first))
        reads = {site.name: watch.reads(site) for site in sites}
        replays = [None if model is None else Replay(model, course) for model in (dense, small)]
        assert replays[0] is not None
        walk = cls(replays[0], replays[1], course, reads)
        if not any(course.before.values()):
            walk.end()
        return walk

    @property
    def on(self) -> bool:
        """Whether it still goes on."""
        return self.dense.on

    def end(self) -> None:
        """Let all passes run from the inputs from now on."""
        for replay in (self.dense, self.small):
            if replay is not None:
                replay.give_up()

    def agrees(self, watch: Watch, site: Site, first: bool) -> bool:
        """Whether the maps of a site read and gave what they do in a pass from the inputs."""
        reads = watch.reads(site)
        if not first or watch.model is not self.dense.model:
            return all(bool(t.sum(dtype=torch.float32).isfinite()) for t in watch.tensors(site))
        return len(reads) == len(self.reads[site.name]) and all(map(_same, reads, self.reads[site.name]))


def walked(watch: Watch, walk: Walk | None, index: int, sites: Sequence[Site], inputs: Any) -> None:
    """One pass of a network over a batch, from its finished blocks where that can be done."""
    replay = None if walk is None else walk.dense if watch.model is walk.dense.model else walk.small
    if walk is not None and replay is not None and replay.on and len(sites) == 1:
        to = (walk.course.ahead if replay is walk.dense else walk.course.before)[sites[0].name]
        try:
            with replay.going_on(index, to):
                watch.run(inputs, lambda: replay.reached)
            if walk.agrees(watch, sites[0], index == 0):
                return
        except Exception:  # whatever a model makes of blocks that give nothing; a pass from the inputs decides
            pass
        walk.end()
    watch.run(inputs)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two samples are the same but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= _ROUNDING * b.abs().max()) if a.numel() else True

"""The error of every site at every width, alone and in the dense network: what widths are allocated by.

curves = error_curves(dense, sites, calibration, metrics, paths, walk)
curves["layer.0"][384]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from shallower.calibrating.grams import Centred
from shallower.calibrating.walking import Walk
from shallower.core.processes import summed_over_processes
from shallower.errors import Refusal
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.refitting import error_curve, metric_of
from shallower.sites import Site

_MEMORY = 1 << 28
"""Bytes of Gram matrices that are held at a time, where passes run from the inputs."""


def error_curves(
    dense: nn.Module,
    sites: Sequence[Site],
    calibration: Calibration,
    metrics: Mapping[str, Centred],
    paths: Mapping[str, int],
    walk: Walk,
) -> dict[str, dict[int, float]]:
    """For each site, the error at every width; at width 0, of a full collapse where that is possible.

    Args:
        dense: the model as it is.
        sites: of this model, in order of execution.
        calibration: the data, and the options.
        metrics: weight of errors at the consumers' outputs, see `refitting.metric_of`.
        paths: by site, of what the rank of a linear path is a multiple; 0 for none.
        walk: along these sites.
    """
    options = calibration.options
    curves: dict[str, dict[int, float]] = {}
    waiting = list(sites)
    while waiting:
        group: Sequence[Site] = waiting[:1]
        if not _goes_on(walk):
            group = _fitting_in_memory(waiting)
        waiting = waiting[len(group) :]
        inputs = options.collapse or any(paths[site.name] for site in group)
        found = calibration.grams(dense, None, group, inputs=inputs, walk=walk)
        for site in group:
            grams = found.pop(site.name)
            if isinstance(grams, Refusal):
                # what cannot be calibrated keeps its width, and does not keep the others from being squeezed
                curves[site.name] = {site.width: 0.0}
                calibration.refused[site.name] = str(grams)
                continue
            curve = error_curve(site, grams, metric_of(site, metrics, grams), paths=paths[site.name])
            scale = 1.0
            if options.sensitivity:
                # the metric is a mean over positions, and the model's output feels all of them
                scale = sum(m.positions for m in site.consumers) / len(site.consumers)
            curves[site.name] = {width: scale * error for width, error in curve.items()}
    return curves


def _goes_on(walk: Walk) -> bool:
    """Whether passes go on from finished blocks: in all processes or in none, so that all make the same passes."""
    ended = not walk.on
    if summed_over_processes(float(ended))[0] > 0 and not ended:
        walk.end()
    return walk.on


def _fitting_in_memory(sites: Sequence[Site]) -> Sequence[Site]:
    """The first of the sites: as many as their Gram matrices fit into memory together."""
    room = _MEMORY
    for i, site in enumerate(sites):
        columns = site.width * site.columns_each
        if site.producer is not None:
            columns += site.producer.d_in
        room -= 16 * columns**2
        if room < 0:
            return sites[: max(1, i)]
    return sites

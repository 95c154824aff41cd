"""What calibration data tell about a site as a whole: Gram matrices of what its consumers read and should give.

    grams = collect_grams(dense, small, sites, batches)     # {site name: SiteGrams}

Only sums are kept, in float64, so that memory does not grow with the data, and Gram matrices of several batches, data
sets or machines are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.patches import flat, patches, thinned
from shallower.calibrating.site_grams import HELD_OUT, Rows, SiteGrams
from shallower.calibrating.walking import Walk, walked
from shallower.calibrating.watching import Goal, Goals, Watch, calls
from shallower.core.inputs import (
    InputsOf,
    MaskOf,
    default_inputs_of,
    default_mask_of,
    model_device,
    reiterable,
    tensors,
    to_device,
)
from shallower.core.memory import give_back
from shallower.core.modes import evaluating
from shallower.core.processes import summed_over_processes
from shallower.errors import FitError, SiteError
from shallower.sites import Site

"""Rows that are converted to float64, or whose products are added up in float32, at a time."""
"""Columns of a Gram matrix that are computed at a time."""
"""Positions of a convolution that are used, for each column of its patches: neighbours tell nearly the same."""

_POSITIONS = 1 << 17
"""Positions of which the inputs and outputs themselves are kept, for fitting the producers."""
"""Hidden values that are computed at a time."""
"""Values of a tensor by which it is compared with what it should be."""

"""Of one batch: by site, one for each call."""


def collect_goals(
    dense: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    compensation: float = 0.0,
    inputs_of: InputsOf = default_inputs_of,
    most: int | None = None,
) -> list[Goals]:
    """What the consumers of some sites should give, batch by batch, from one pass of the dense network.

    Args:
        dense: the model as it is.
        sites: in order of execution.
        batches: read in the same order as they will be read for `collect_grams`.
        compensation: see `collect_grams`.
        inputs_of: picks the model's inputs out of a batch.
        most: bytes to be kept. Sites from the last on are left out until the rest fits; the first never is.

    Raises:
        SiteError: the batches cannot be read again.
    """
    reiterable(batches)
    share = len(batches) if isinstance(batches, Sized) else 1
    device = model_device(dense)
    goals: list[Goals] = []
    chosen = list(sites)
    with ExitStack() as stack:
        stack.enter_context(evaluating(dense))
        watch = stack.enter_context(Watch(dense, chosen))
        for batch in tqdm(batches, desc="dense outputs", delay=5, leave=False):
            watch.run(to_device(inputs_of(batch), device))
            if not goals and most is not None and len(chosen) > 1:
                sizes = [
                    share * sum(y.nbytes for m in s.consumers for y in watch.outputs.get(m.name, ())) for s in chosen
                ]
                room = [sum(sizes[: i + 1]) <= most for i in range(len(sizes))]
                chosen = chosen[: max(1, sum(room))]
                watch.limit(chosen)
            goals.append({site.name: watch.goals(site, compensation) for site in chosen})
    return goals


def collect_grams(
    dense: nn.Module,
    small: nn.Module | None,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    goals: Sequence[Goals] | None = None,
    walk: Walk | None = None,
    compensation: float = 0.0,
    with_inputs: bool = False,
    with_joint: bool = False,
    with_rows: bool = False,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, SiteGrams]:
    """Gram matrices of the sites, by name: what the consumers read in `small`, against what they give in `dense`.

    Of each batch, the passes stop at the last of the sites.

    Args:
        dense: the model as it is.
        small: the model with the earlier sites squeezed already; None for `dense` itself.
        sites: that have not been squeezed yet, in both models.
        batches: read once here, but a one-shot iterator is refused.
        goals: what `collect_goals` found with the same compensation and batches; then `dense` does not run.
        walk: goes on from the blocks that are finished before the sites, instead of from the inputs.
        compensation: where a consumer's output is added to a residual stream, this part of the difference between the
            two models' streams is added to what the consumer should give.
        with_inputs: also of what the producer reads, where it reads the positions that the consumers read.
        with_joint: also of both side by side, there.
        with_rows: also keep what the producers read and the consumers should give.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask out of a batch; by default a two-dimensional `attention_mask`.

    Raises:
        SiteError: a site did not run as it did when it was found, or the batches cannot be read again.
        FitError: there are no batches or just one sample, or a value is not finite; the error names the site.
    """
    reiterable(batches)
    share = len(batches) if isinstance(batches, Sized) else 1
    device = model_device(dense)
    sums: dict[str, SiteGrams] = {}
    kept: dict[str, tuple[list[Rows], list[Rows]]] = {site.name: ([], []) for site in sites}
    parts = dict.fromkeys(kept, 0)
    positions = dict.fromkeys(kept, 0.0)
    units: dict[str, Tensor] = {}
    samples = 0
    with ExitStack() as stack:
        target: Watch | None = None
        if small is None or goals is None:
            stack.enter_context(evaluating(dense))
            target = stack.enter_context(Watch(dense, sites))
        source = target
        if small is not None:
            stack.enter_context(evaluating(small))
            source = stack.enter_context(Watch(small, sites))
        assert source is not None
        for index, batch in enumerate(tqdm(batches, desc="calibrating", delay=5, leave=False)):
            mask = default_mask_of(batch) if mask_of is None else mask_of(batch)
            inputs = to_device(inputs_of(batch), device)
            samples += samples_in(inputs)
            if target is not None:
                walked(target, walk, index, sites, inputs)
            if source is not target:
                walked(source, walk, index, sites, inputs)
            rows = _Rows(None if mask is None else mask.to(device).bool().flatten(), share)
            for site in sites:
                if target is not None:
                    given: Sequence[Goal] = target.goals(site, compensation)
                else:
                    given = goals[index][site.name] if goals is not None else ()
                wanted = rows.wanted(site, given, source, compensation)
                units[site.name] = torch.cat(given[0].units)
                sums[site.name] = rows.grams(site, source, wanted, with_inputs, with_joint, sums.get(site.name))
                for part, held_out in rows.taken(site, source, wanted, parts[site.name]):
                    parts[site.name] += 1
                    positions[site.name] += 0 if held_out else part.positions
                    if with_rows:
                        kept[site.name][held_out].append(Rows(part.x.float().clone(), part.y.float().clone()))
            source.forget()
            if target is not None:
                target.forget()
            give_back()
    if samples < 2:
        raise FitError(
            f"{'one sample is' if samples else 'no batches are'} too little to calibrate on; give a few hundred samples"
        )
    found = {}
    for site in sites:
        grams = sums.pop(site.name).over_processes()
        seen_at = summed_over_processes(positions[site.name])[0]
        found[site.name] = replace(grams, rows=kept[site.name], units=units[site.name], positions=seen_at)
        if not (grams.fit.is_finite() and grams.held.is_finite()):
            raise FitError(
                f"{site.name}: what its consumer `{site.consumers[0].name}` reads is not finite on the calibration "
                "batches; does the model overflow, or do the batches hold NaN?"
            )
    return found


@dataclass(frozen=True)
class _Rows:
    """Makes rows of what a batch's tensors hold, and Gram matrices of them.

    Attributes:
        mask: positions that count, flattened; None for all.
        share: batches that there are.
    """

    mask: Tensor | None
    share: int

    def wanted(self, site: Site, goals: Sequence[Goal], source: Watch, compensation: float) -> list[Tensor]:
        """What the consumers should give side by side, one tensor for each call, in the consumers' own layout."""
        names = [m.name for m in site.consumers]
        calls(site, [source.inputs], names, len(goals))
        wanted = []
        for i, goal in enumerate(goals):
            ys = []
            for name, y, streamed in zip(names, goal.y, goal.streamed, strict=True):
                here = source.others[name][i]
                if streamed and here is None:
                    raise SiteError(f"{site.name}: what `{name}` gives is added to nothing on this batch")
                ys.append(y - compensation * here if streamed and here is not None else y)
            wanted.append(torch.cat(ys, 1 if site.consumers[0].kind == "conv2d" else -1))
        return wanted

    def grams(
        self,
        site: Site,
        source: Watch,
        wanted: Sequence[Tensor],
        with_inputs: bool,
        with_joint: bool,
        total: SiteGrams | None,
    ) -> SiteGrams:
        """The sums with this batch."""
        first = site.consumers[0]
        for i, ys in enumerate(wanted):
            z, y = source.inputs[first.name][i], flat(ys, first.kind == "conv2d")
            step = thinned(len(y) * self.share, site.width, first.taps)
            read = patches(z, source.read_as[first.name], step)
            x = None
            if with_inputs and site.producer is not None and _read_alike(site):
                x = flat(source.inputs[site.producer.name][i], first.kind == "conv2d")
            y = y[::step]
            if self.mask is not None and step == 1 and len(self.mask) == len(y):
                read, y = read[self.mask], y[self.mask]
                x = None if x is None else x[self.mask]
            seen = SiteGrams.of(read, x if with_inputs else None, y, joint=with_joint)
            total = seen if total is None else total + seen
        assert total is not None
        return total

    def taken(self, site: Site, source: Watch, wanted: Sequence[Tensor], seen: int) -> Iterator[tuple[Rows, bool]]:
        """Rows that producers may be fitted on, and whether they are held out: tokens, or whole images.

        Args:
            site: whose rows.
            source: what its producer read.
            wanted: what its consumers should give.
            seen: how many parts were taken before.
        """
        if site.producer is None or site.averaged or site.pooled or site.flattened:
            return  # a pooling stands between what is read and what is given
        for i, ys in enumerate(wanted):
            x = source.inputs[site.producer.name][i]
            if ys.dim() == 4 and site.consumers[0].kind == "conv2d":
                each = max(1, ys[0].numel() // ys.shape[1])
            else:
                x, ys, each = flat(x, False), flat(ys, False), 1
                if self.mask is not None and len(self.mask) == len(x):
                    x, ys = x[self.mask], ys[self.mask]
            step = -(-len(x) * each * self.share // _POSITIONS)
            rows = Rows(x[::step], ys[::step])
            cut = len(rows.x) - len(rows.x) // HELD_OUT
            if len(rows.x) < HELD_OUT:
                cut = 0 if seen % HELD_OUT == HELD_OUT - 1 else len(rows.x)
            for part, held_out in ((slice(None, cut), False), (slice(cut, None), True)):
                if len(rows.x[part]):
                    seen += 1
                    yield Rows(rows.x[part], rows.y[part]), held_out


def _read_alike(site: Site) -> bool:
    """Whether what the producer reads at a position is what the consumers give there comes from, and nothing else."""
    if site.between or site.averaged or site.pooled or site.flattened:
        return False
    if all(m.kind != "conv2d" for m in site.maps):
        return True
    return all(m.kind == "conv2d" and m.taps == 1 and m.stride == (1, 1) and m.padding == (0, 0) for m in site.maps)


def samples_in(inputs: Any) -> int:
    """Samples in a batch."""
    first = next(tensors(inputs), None)
    return 0 if first is None else len(first) if first.dim() else 1

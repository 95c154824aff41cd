"""Gram matrices of what the consumers of sites read and should return, over the calibration data.

    grams = collect_grams(dense, small, sites, batches)     # {site name: SiteGrams, or why there are none}

Only sums are kept, and rows where there are few, so that memory does not grow with the data; sums of several processes
are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.calibrating.patches import check_mask, flat, flat_mask, patches, thinned
from shallower.calibrating.recording import DenseOutputs, Goals, Recorder
from shallower.calibrating.site_grams import SiteGrams, SiteRows, fitted_rows, read_alike
from shallower.calibrating.walking import Walk, walked
from shallower.core.batches import Batches
from shallower.core.inputs import InputsOf, MaskOf, default_inputs_of, model_device
from shallower.core.memory import free_bytes, give_back, total_bytes
from shallower.core.modes import evaluating
from shallower.core.processes import gathered, raised_anywhere, summed_over_processes
from shallower.core.tensors import nbytes_of
from shallower.errors import FitError, Refusal, SiteError
from shallower.sites import Site

_POSITIONS = 1 << 17
"""Positions of which the inputs and outputs themselves are kept, for fitting the producers."""

_COPIES = 4
"""Matrices of the size of a site's second moments that are held at a time: of rows for fitting and held out, the
inverse, the products."""
_SMALL = 1 << 28
"""Bytes that are not asked about."""

Present = TypeVar("Present")

_NEVER = "its consumers ran in no calibration batch, or on no rows"


@dataclass(frozen=True)
class GramOptions:
    """What is collected at each site, besides what its consumers read and should return.

        collect_grams(dense, small, [site], batches, GramOptions(compensation=1.0, rows=True))

    Attributes:
        compensation: where a consumer's output is added to a residual stream, this part of the difference between the
            two models' streams is added to what the consumer should return.
        inputs: also moments of what the producer reads, where it reads the positions that the consumers read.
        joint: also of both side by side, there.
        rows: also keep what the producer reads and the consumers should return.
    """

    compensation: float = 0.0
    inputs: bool = False
    joint: bool = False
    rows: bool = False


def collect_goals(
    dense: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    compensation: float = 0.0,
    inputs_of: InputsOf = default_inputs_of,
    most: int | None = None,
) -> list[Goals]:
    """What the consumers of some sites should return, batch by batch, from one pass of the dense network.

        goals = collect_goals(dense, sites, batches)
        grams = collect_grams(dense, small, [sites[0]], batches, goals=goals)

    Args:
        dense: the model as it is.
        sites: in order of execution.
        batches: the same, in the same order, as for `collect_grams`.
        compensation: see `GramOptions`.
        inputs_of: picks the model's inputs out of a batch.
        most: bytes to be kept. Sites from the last on are left out until the rest fits; the first never is.

    Raises:
        SiteError: the batches cannot be read.
    """
    calibration = Batches.read(batches, inputs_of)
    device = model_device(dense)
    goals: list[Goals] = []
    chosen = list(sites)
    with evaluating(dense), Recorder(dense, chosen) as recorder:
        for batch in tqdm(calibration, desc="dense outputs", delay=5, leave=False):
            recorder.run(batch.on(device).inputs)
            calibration.run += batch.rows
            if not goals and most is not None:
                chosen = _sites_that_fit(recorder, chosen, most // len(calibration))
                recorder.limit(chosen)
            goals.append({site.name: recorder.goals(site, compensation) for site in chosen})
    return goals


def _sites_that_fit(recorder: Recorder, sites: list[Site], most: int) -> list[Site]:
    """The first of the sites, as many as their outputs fit into so many bytes; at least one."""
    for i, site in enumerate(sites):
        for m in site.consumers:
            most -= nbytes_of(recorder.outputs.get(m.name, ()))
        if most < 0:
            return sites[: max(1, i)]
    return sites


def collect_grams(
    dense: nn.Module,
    small: nn.Module | None,
    sites: Sequence[Site],
    batches: Iterable[Any],
    options: GramOptions | None = None,
    *,
    goals: Sequence[Goals] | None = None,
    walk: Walk | None = None,
    inputs_of: InputsOf = default_inputs_of,
    mask_of: MaskOf | None = None,
) -> dict[str, SiteGrams | Refusal]:
    """Gram matrices of the sites, by name: what the consumers read in `small`, against what they return in `dense`.

        grams = collect_grams(dense, None, sites, batches)["encoder.layer.3"]

    Of each batch, the passes stop at the last of the sites. A batch in which a site sees no rows counts for nothing
    there. A site that sees other rows in `small` than in `dense` (where routing decides), or that runs otherwise than
    it did when it was found, gets a `Refusal` with the reason.

    Args:
        dense: the model as it is.
        small: the model with the earlier sites squeezed already; None for `dense` itself.
        sites: that have not been squeezed yet, in both models.
        batches: a list, a DataLoader, or `Batches` that were read before.
        options: what else is collected.
        goals: what `collect_goals` found with the same compensation and batches; then `dense` does not run.
        walk: continues from the blocks that are finished before the sites, instead of from the inputs.
        inputs_of: picks the model's inputs out of a batch.
        mask_of: picks the mask out of a batch; by default a two-dimensional `attention_mask`.

    Raises:
        SiteError: the batches cannot be read.
        ForwardError: the model does not run on a batch.
        FitError: there are no batches or just one sample, `mask_of` returns a mask that fits none of the sites (with
            `walk`, that was asked already), or a value is not finite; the error names the site. What one process
            raises, all raise.
    """
    device = model_device(dense)
    with raised_anywhere(), ExitStack() as stack:
        calibration = Batches.read(batches, inputs_of, mask_of)
        passes = _Passes(sites, options or GramOptions(), len(calibration), device)
        target = source = None
        if small is None or goals is None:
            stack.enter_context(evaluating(dense))
            target = source = stack.enter_context(Recorder(dense, sites))
        if small is not None:
            stack.enter_context(evaluating(small))
            source = stack.enter_context(Recorder(small, sites))
        assert source is not None
        for index, batch in enumerate(tqdm(calibration, desc="calibrating", delay=5, leave=False)):
            here = batch.on(device)
            for recorder in dict.fromkeys((target, source)):
                if recorder is not None:
                    calibration.run += batch.rows * walked(recorder, walk, index, sites, here.inputs)
            if walk is None:
                check_mask(here, source.rows)
            passes.add(target, source, None if goals is None else goals[index], here.mask)
            for recorder in (target, source):
                if recorder is not None:
                    recorder.forget()
            # what was read and returned is freed after each batch: only the sums stay
            give_back()
    check_enough(int(summed_over_processes(calibration.rows)[0]))
    return passes.found()


def _too_large(site: Site, positions: int) -> Refusal | None:
    """Why the second moments of a site cannot be held in memory; None where they can."""
    columns = site.width * site.columns_each
    needed = 8 * _COPIES * columns * min(columns, positions)
    if needed < _SMALL:
        return None
    room = max(free_bytes(), total_bytes() // 2)
    if needed <= room or not room:
        return None
    return Refusal(
        f"the second moments of its {columns} columns take {needed / 2**30:.1f} GiB of memory, and there is room for "
        f"{room / 2**30:.1f} GiB"
    )


def check_enough(samples: int) -> None:
    """Refuse data on which nothing can be calibrated.

    Raises:
        FitError: there are fewer than two samples.
    """
    if samples < 1:
        raise FitError("calibration needs data: `batches` is empty. Give a few hundred samples")
    if samples < 2:
        raise FitError("one sample is not enough to calibrate on: give a few hundred samples")


@dataclass
class _SiteSoFar:
    """What was seen at one site so far.

    Attributes:
        grams: the sums; None before any rows were seen.
        rows: for fitting and held out.
        units: of the consumers' outputs, once they were seen.
        calls, positions: calls that were added, and positions of the rows for fitting that were taken.
        refusal: why the site cannot be calibrated.
    """

    grams: SiteGrams | None = None
    rows: tuple[list[SiteRows], list[SiteRows]] = field(default_factory=lambda: ([], []))
    units: Tensor | None = None
    calls: int = 0
    positions: float = 0.0
    refusal: Refusal | None = None


class _Passes:
    """Adds up what recorders saw, pass by pass."""

    def __init__(self, sites: Sequence[Site], options: GramOptions, batches: int, device: torch.device) -> None:
        self._sites = sites
        self._options = options
        self._batches = batches
        self._device = device
        self._seen = {site.name: _SiteSoFar() for site in sites}

    def add(self, target: Recorder | None, source: Recorder, goals: Goals | None, mask: Tensor | None) -> None:
        """Add one pass.

        Args:
            target: what ran in the dense network; None where `goals` says it.
            source: what ran in the network that is calibrated.
            goals: what the consumers should return.
            mask: positions that count; None for all.
        """
        counting = flat_mask(mask)
        for site in self._sites:
            seen = self._seen[site.name]
            if seen.refusal is not None:
                continue
            wanted: Sequence[DenseOutputs] | Refusal = ()
            if target is not None:
                wanted = target.goals(site, self._options.compensation)
            elif goals is not None:
                wanted = goals[site.name]
            calls = source.calls(site)
            for problem in (wanted, calls):
                if isinstance(problem, Refusal):
                    seen.refusal = problem
            if isinstance(wanted, Refusal) or isinstance(calls, Refusal):
                continue
            if calls != len(wanted):
                seen.refusal = Refusal(
                    f"its consumers ran {calls} times in the squeezed network and {len(wanted)} times in the dense one"
                )
                continue
            if wanted:
                seen.units = torch.cat(wanted[0].units)
            for i, goal in enumerate(wanted):
                seen.refusal = seen.refusal or self._add_call(site, source, i, goal, counting)

    def _add_call(
        self, site: Site, source: Recorder, i: int, goal: DenseOutputs, mask: Tensor | None
    ) -> Refusal | None:
        """Add one call of a site."""
        first, seen = site.consumers[0], self._seen[site.name]
        images = first.kind == "conv2d"
        parts = []
        for m, y, streamed in zip(site.consumers, goal.y, goal.streamed, strict=True):
            here = source.others[m.name][i]
            if y.shape != source.outputs[m.name][i].shape:
                return Refusal("it sees other rows in the squeezed network than in the dense one")
            if streamed and here is None:
                return Refusal(f"what `{m.name}` returns is added to nothing in the squeezed network")
            if streamed and here is not None:
                # y + c (stream of the dense network - stream here), of which `goal.y` has all but the last
                y = y - self._options.compensation * here
            parts.append(y)
        wanted = torch.cat(parts, 1 if images else -1)
        if not wanted.numel():
            return None
        y = flat(wanted, images)
        step = thinned(len(y) * self._batches, site.width, site.columns_each)
        if seen.grams is None and (refusal := _too_large(site, len(y) * self._batches // step)) is not None:
            return refusal
        z = patches(source.inputs[first.name][i], source.read_as[first.name], step)
        x = None
        if self._options.inputs and read_alike(site) and site.producer is not None:
            x = flat(source.inputs[site.producer.name][i], images)
        if mask is not None and len(mask) == len(y):
            counting = mask[::step]
            z, y = z[counting], y[::step][counting]
            if x is not None:
                x = x[mask]
        else:
            y = y[::step]
        grams = SiteGrams.of(z, x, y, joint=self._options.joint, number=seen.calls)
        seen.calls += 1
        if seen.grams is not None:
            grams = seen.grams + grams
        seen.grams = grams
        for part, held_out in self._taken(site, source.inputs, i, wanted, mask):
            if not held_out:
                seen.positions += part.positions
            if self._options.rows:
                seen.rows[held_out].append(SiteRows(part.x.float().clone(), part.y.float().clone()))
        return None

    def _taken(
        self, site: Site, inputs: Mapping[str, Sequence[Tensor]], i: int, y: Tensor, mask: Tensor | None
    ) -> Iterator[tuple[SiteRows, bool]]:
        """Rows that producers may be fitted on, and whether they are held out: tokens, or whole images."""
        if site.producer is None or not site.bridge.pixelwise:
            return  # a pooling stands between what is read and what is returned
        x = inputs[site.producer.name][i]
        positions = 1
        if y.dim() == 4 and site.consumers[0].kind == "conv2d":
            positions = max(1, y[0].numel() // y.shape[1])
        else:
            x, y = flat(x, False), flat(y, False)
            if mask is not None and len(mask) == len(x):
                x, y = x[mask], y[mask]
        # rounded up, so that all batches together keep no more than that many positions
        step = max(1, -(-len(x) * positions * self._batches // _POSITIONS))
        rows = SiteRows(x[::step], y[::step])
        cut = fitted_rows(len(rows.x), self._seen[site.name].calls - 1)
        for part, held_out in ((slice(None, cut), False), (slice(cut, None), True)):
            if len(rows.x[part]):
                yield SiteRows(rows.x[part], rows.y[part]), held_out

    def found(self) -> dict[str, SiteGrams | Refusal]:
        """The sums of all processes.

        Raises:
            FitError: a value is not finite; the error names the site.
        """
        found: dict[str, SiteGrams | Refusal] = {}
        for site in self._sites:
            seen = self._seen[site.name]
            refusal = _first_present(gathered(seen.refusal))
            if refusal is not None:
                found[site.name] = refusal
                continue
            # a process that saw no rows of this site takes part in the sums all the same
            shapes = _first_present(gathered(None if seen.grams is None else seen.grams.shapes))
            units = _first_present(gathered(None if seen.units is None else seen.units.cpu()))
            if shapes is None or units is None:
                found[site.name] = Refusal(_NEVER)
                continue
            grams = (seen.grams or SiteGrams.empty(shapes, self._device)).over_processes()
            (positions,) = summed_over_processes(seen.positions)
            if not (grams.fit.is_finite() and grams.held.is_finite()):
                raise FitError(
                    f"{site.name}: what its consumer `{site.consumers[0].name}` reads is not finite on the calibration "
                    "batches; does the model overflow, or do the batches hold NaN?"
                )
            found[site.name] = replace(grams, rows=seen.rows, units=units.to(self._device), positions=positions)
        return found


def _first_present(values: Sequence[Present | None]) -> Present | None:
    for value in values:
        if value is not None:
            return value
    return None


def one_site(found: Mapping[str, SiteGrams | Refusal], site: Site) -> SiteGrams:
    """The Gram matrices of a site that has to be calibrated.

    Raises:
        SiteError: it cannot be; the error says why.
    """
    grams = found[site.name]
    if isinstance(grams, Refusal):
        raise SiteError(f"{site.name}: cannot be calibrated, since {grams}. Leave the site out")
    return grams

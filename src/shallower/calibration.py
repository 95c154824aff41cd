"""What calibration data tell about a site as a whole: Gram matrices of what its consumers read and should give.

    grams = collect_grams(dense, small, sites, batches)     # {site name: SiteGrams}

Only sums are kept, in float64, so that memory does not grow with the data, and Gram matrices of several batches, data
sets or machines are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from shallower.errors import FitError, SiteError
from shallower.inputs import InputsOf, call, default_inputs_of, model_device, reiterable, tensors, to_device
from shallower.memory import give_back
from shallower.processes import summed_over_processes
from shallower.replay import Course, Replay, course_of
from shallower.residual import ResidualSums
from shallower.sites import LinearMap, Site
from shallower.statistics import MaskOf, default_mask_of, evaluating

_ROWS = 1 << 10
"""Rows that are converted to float64, or whose products are added up in float32, at a time."""

_COLUMNS = 256
"""Columns of a Gram matrix that are computed at a time."""

_PER_COLUMN = 256
"""Positions of a convolution that are used, for each column of its patches: neighbours tell nearly the same."""

_POSITIONS = 1 << 17
"""Positions of which the inputs and outputs themselves are kept, for fitting the producers."""

_VALUES = 1 << 22
"""Hidden values that are computed at a time."""

_SAMPLE = 1 << 12
"""Values of a tensor by which it is compared with what it should be."""

_ROUNDING = 1e-5

HELD_OUT = 4
"""One row of so many is kept apart, to choose by."""


@dataclass(frozen=True)
class Gram:
    """Sums over positions of z, y and their products: all that least squares from z to y needs.

        total = Gram.of(z, y) + Gram.of(z2, y2)

    Attributes:
        count: positions seen.
        z, y: (n,) and (d,) float64, sums.
        zz, zy: (n, n) and (n, d) float64, sums of products.
        yy: (d,) float64, sums of squares.
    """

    count: float
    z: Tensor
    y: Tensor
    zz: Tensor
    zy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, z: Tensor, y: Tensor, *, quick: bool = False) -> Gram:
        """Of samples: z (positions, n) and y (positions, d), of any dtype.

        With `quick`, products of up to 1,024 rows are added up in float32: twice as fast, and right to about 1e-6.
        """
        return cls.empty(z.shape[1], y.shape[1], z.device).extended([z], y, quick=quick)

    def extended(self, z: Sequence[Tensor], y: Tensor, *, quick: bool = False) -> Gram:
        """With more samples, which are added to the sums of this one in place.

        Args:
            z: side by side; (positions, n) together.
            y: (positions, d).
            quick: see `of`.
        """
        dtype = torch.float32 if quick else torch.float64
        for start in range(0, len(y), _ROWS):
            rows = slice(start, start + _ROWS)
            parts, b = [part[rows].to(dtype) for part in z], y[rows].to(dtype)
            a = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            self.z.add_(a.sum(0))
            self.y.add_(b.sum(0))
            self.yy.add_(b.square().sum(0))
            for left in range(0, a.shape[1], _COLUMNS):
                # the blocks on and above the diagonal are enough
                part = a[:, left : left + _COLUMNS].T
                self._add(self.zz[left : left + _COLUMNS, left:], part, a[:, left:])
                self._add(self.zy[left : left + _COLUMNS], part, b)
        for left in range(_COLUMNS, a.shape[1] if len(y) else 0, _COLUMNS):
            self.zz[left : left + _COLUMNS, :left] = self.zz[:left, left : left + _COLUMNS].T
        return replace(self, count=self.count + len(y))

    @staticmethod
    def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        else:
            total.add_(left @ right)

    def part(self, columns: slice) -> Gram:
        """Of some of the columns of z alone; the sums are views."""
        return replace(self, z=self.z[columns], zz=self.zz[columns, columns], zy=self.zy[columns])

    @classmethod
    def empty(cls, n: int, d: int, device: torch.device | str = "cpu") -> Gram:
        """Of nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(0.0, zeros(n), zeros(d), zeros(n, n), zeros(n, d), zeros(d))

    def __add__(self, other: Gram) -> Gram:
        """Of both samples together."""
        if self.zy.shape != other.zy.shape:
            raise FitError("Gram matrices of different sites do not add up")
        return Gram(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def over_processes(self) -> Gram:
        """Of the samples of all processes of `torch.distributed`; itself where there is one."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        count = torch.tensor([self.count], dtype=torch.float64, device=self.z.device)
        sums = [count, *(getattr(self, field.name).clone() for field in fields(self)[1:])]
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
        return Gram(float(sums[0]), *sums[1:])

    def centred(self, intercept: bool = True) -> Centred:
        """Means and second moments; about the means where the fit has an intercept, about 0 where it has none.

        Raises:
            FitError: nothing was seen, or something was not finite.
        """
        if self.count < 2:
            raise FitError(f"{self.count:.0f} positions were seen: too few calibration data to fit anything")
        if not all(bool(t.isfinite().all()) for t in (self.z, self.y, self.zz, self.zy, self.yy)):
            raise FitError("a value is not finite: does the model overflow on the calibration batches?")
        mean_z, mean_y = self.z / self.count, self.y / self.count
        if not intercept:
            mean_z, mean_y = torch.zeros_like(mean_z), torch.zeros_like(mean_y)
        return Centred(
            (self.zz / self.count).addr_(mean_z, mean_z, alpha=-1),
            (self.zy / self.count).addr_(mean_z, mean_y, alpha=-1),
            (self.yy / self.count - mean_y.square()).clamp_min(0),
            mean_z,
            mean_y,
        )


@dataclass(frozen=True)
class Centred:
    """Moments for a least-squares fit y = W (z - mean_z) + mean_y.

    Attributes:
        zz, zy: (n, n) and (n, d) float64.
        yy: (d,) float64, of each output.
        mean_z, mean_y: (n,) and (d,); zero where the fit has no intercept.
    """

    zz: Tensor
    zy: Tensor
    yy: Tensor
    mean_z: Tensor
    mean_y: Tensor


@dataclass(frozen=True)
class Rows:
    """What a site reads and should give.

    Attributes:
        x: (rows, d_in), or (images, d_in, height, width) where the maps are convolutions.
        y: (rows, d) or (images, d, height, width), the consumers' outputs side by side.
    """

    x: Tensor
    y: Tensor

    def chunks(self, width: int) -> Iterator[Rows]:
        """The rows, so many at a time as a hidden tensor of this width allows."""
        each = max(1, self.x[0].numel() // self.x.shape[1]) * width
        for x, y in zip(*(torch.split(t, max(1, _VALUES // each)) for t in (self.x, self.y)), strict=True):
            yield Rows(x, y)

    @property
    def positions(self) -> int:
        """Outputs that count."""
        return self.y.numel() // self.y.shape[1]


@dataclass(frozen=True)
class SiteGrams:
    """What was seen at one site; rows for fitting and rows that are held out.

    Attributes:
        fit, held: from what the consumers read (patches of it, for a convolution) to what they should give.
        inputs: (fit, held) from what the producer reads, for a full collapse; None where that was not asked for, or
            where it reads other positions.
        joint: (fit, held) from what the consumers and what the producer read, side by side; `fit`, `held` and `inputs`
            are parts of it. None where `inputs` is.
        rows: (fit, held), what the producer reads and the consumers should give at some of the positions; empty where
            that was not asked for. Of this process alone.
        units: (d,) what a unit of each of the consumers' outputs becomes in the sum that it goes into; ones where it
            goes into none.
        positions: of the rows for fitting, kept or not; of all processes together.
    """

    fit: Gram
    held: Gram
    inputs: tuple[Gram, Gram] | None = None
    joint: tuple[Gram, Gram] | None = None
    rows: tuple[Sequence[Rows], Sequence[Rows]] = ((), ())
    units: Tensor | None = None
    positions: float = 0.0

    @classmethod
    def of(cls, fit: Gram, held: Gram, columns: int) -> SiteGrams:
        """Of Gram matrices that go on, behind so many columns, with what the producer reads."""
        if len(fit.z) == columns:
            return cls(fit, held)
        read, given = slice(0, columns), slice(columns, None)
        return cls(fit.part(read), held.part(read), (fit.part(given), held.part(given)), (fit, held))

    @property
    def all(self) -> Gram:
        """All rows."""
        return self.fit + self.held


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
        watch = stack.enter_context(_Watch(dense, chosen))
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
    sums: dict[str, tuple[Gram, Gram]] = {}
    kept: dict[str, tuple[list[Rows], list[Rows]]] = {site.name: ([], []) for site in sites}
    parts = dict.fromkeys(kept, 0)
    positions = dict.fromkeys(kept, 0.0)
    units: dict[str, Tensor] = {}
    samples = 0
    with ExitStack() as stack:
        target: _Watch | None = None
        if small is None or goals is None:
            stack.enter_context(evaluating(dense))
            target = stack.enter_context(_Watch(dense, sites))
        source = target
        if small is not None:
            stack.enter_context(evaluating(small))
            source = stack.enter_context(_Watch(small, sites))
        assert source is not None
        for index, batch in enumerate(tqdm(batches, desc="calibrating", delay=5, leave=False)):
            mask = default_mask_of(batch) if mask_of is None else mask_of(batch)
            inputs = to_device(inputs_of(batch), device)
            samples += samples_in(inputs)
            if target is not None:
                _walked(target, walk, index, sites, inputs)
            if source is not target:
                _walked(source, walk, index, sites, inputs)
            rows = _Rows(None if mask is None else mask.to(device).bool().flatten(), share)
            for site in sites:
                if target is not None:
                    given: Sequence[Goal] = target.goals(site, compensation)
                else:
                    given = goals[index][site.name] if goals is not None else ()
                wanted = rows.wanted(site, given, source, compensation)
                units[site.name] = torch.cat(given[0].units)
                sums[site.name] = rows.grams(site, source, wanted, with_inputs, sums.get(site.name))
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
        fit, held = (gram.over_processes() for gram in sums.pop(site.name))
        columns = site.width * site.consumers[0].taps
        seen_at = summed_over_processes(positions[site.name])[0]
        found[site.name] = replace(
            SiteGrams.of(fit, held, columns), rows=kept[site.name], units=units[site.name], positions=seen_at
        )
        if not bool(fit.zz.isfinite().all() and held.zz.isfinite().all()):
            raise FitError(
                f"{site.name}: what its consumer `{site.consumers[0].name}` reads is not finite on the calibration "
                "batches; does the model overflow, or do the batches hold NaN?"
            )
    return found


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
        with evaluating(dense), _Watch(dense, sites, sampled=True) as watch:
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

    def agrees(self, watch: _Watch, site: Site, first: bool) -> bool:
        """Whether the maps of a site read and gave what they do in a pass from the inputs."""
        reads = watch.reads(site)
        if not first or watch.model is not self.dense.model:
            return all(bool(t.sum(dtype=torch.float32).isfinite()) for t in watch.tensors(site))
        return len(reads) == len(self.reads[site.name]) and all(map(_same, reads, self.reads[site.name]))


def _walked(watch: _Watch, walk: Walk | None, index: int, sites: Sequence[Site], inputs: Any) -> None:
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


def _sample(t: Tensor) -> Tensor:
    """Some of the values, spread over all dimensions."""
    flat = t.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE) | 1].clone()


class _Finished(Exception):  # noqa: N818 (it is no error)
    """All sites have run: the rest of the forward pass is of no use."""


class _Watch:
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

    def __enter__(self) -> _Watch:
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
        for i in range(_calls(site, [self.outputs], names)):
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

    def __init__(self, watch: _Watch, measure: bool = False) -> None:
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


@dataclass(frozen=True)
class _Rows:
    """Makes rows of what a batch's tensors hold, and Gram matrices of them.

    Attributes:
        mask: positions that count, flattened; None for all.
        share: batches that there are.
    """

    mask: Tensor | None
    share: int

    def wanted(self, site: Site, goals: Sequence[Goal], source: _Watch, compensation: float) -> list[Tensor]:
        """What the consumers should give side by side, one tensor for each call, in the consumers' own layout."""
        names = [m.name for m in site.consumers]
        _calls(site, [source.inputs], names, len(goals))
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
        source: _Watch,
        wanted: Sequence[Tensor],
        with_inputs: bool,
        total: tuple[Gram, Gram] | None,
    ) -> tuple[Gram, Gram]:
        """(fit, held) of the consumers' inputs and, where asked for, of the producer's beside them, with this batch.

        The sums of `total` are added to in place.
        """
        first = site.consumers[0]
        for i, ys in enumerate(wanted):
            z, y = source.inputs[first.name][i], flat(ys, first.kind == "conv2d")
            step = thinned(len(y) * self.share, site.width, first.taps)
            parts = [patches(z, source.read_as[first.name], step)]
            if with_inputs and site.producer is not None and _read_alike(site):
                parts.append(flat(source.inputs[site.producer.name][i], first.kind == "conv2d"))
            y = y[::step]
            if self.mask is not None and step == 1 and len(self.mask) == len(y):
                parts, y = [part[self.mask] for part in parts], y[self.mask]
            if total is None:
                n = sum(part.shape[1] for part in parts)
                total = (Gram.empty(n, y.shape[1], y.device), Gram.empty(n, y.shape[1], y.device))
            cut = len(y) - len(y) // HELD_OUT
            total = (
                total[0].extended([part[:cut] for part in parts], y[:cut]),
                total[1].extended([part[cut:] for part in parts], y[cut:]),
            )
        assert total is not None
        return total

    def taken(self, site: Site, source: _Watch, wanted: Sequence[Tensor], seen: int) -> Iterator[tuple[Rows, bool]]:
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


def may_collapse(site: Site) -> bool:
    """Whether least squares can make one linear map of the site."""
    if any(m.kind == "conv2d" for m in site.maps):
        return False
    return not site.not_linear and site.producer is not None and site.activation is not None and site.calls == 1


def patches(z: Tensor, m: LinearMap, step: int = 1) -> Tensor:
    """What each output position of a map reads: (positions, d_in * taps), the taps of a channel beside one another.

    Args:
        z: in the map's own layout.
        m: the map.
        step: of so many positions one is taken.
    """
    if m.kind != "conv2d":
        return flat(z, False)[::step]
    if m.taps == 1 and m.padding == (0, 0):
        return flat(z[:, :, :: m.stride[0], :: m.stride[1]], True)[::step]
    found, seen = [], 0
    for images in torch.split(z, max(1, _VALUES // max(1, z[0].numel() * m.taps))):
        columns = F.unfold(images, m.kernel, dilation=m.dilation, padding=m.padding, stride=m.stride)
        each = columns.shape[2]
        taken = torch.arange(-seen % step, len(images) * each, step, device=z.device)
        found.append(columns.transpose(1, 2)[taken // each, taken % each])
        seen += len(images) * each
    return torch.cat(found)


def unusual_padding(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """How a convolution pads its input where a `LinearMap` does not say it: not with zeros, or not evenly."""
    if not isinstance(module, nn.Conv2d) or (module.padding_mode == "zeros" and module.padding != "same"):
        return None
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return lambda x: F.pad(x, module._reversed_padding_repeated_twice, mode)


def thinned(positions: int, channels: int, taps: int) -> int:
    """Every how many-th position is enough: all tokens, but of a convolution neighbours tell nearly the same."""
    return max(1, positions // (_PER_COLUMN * channels * taps)) if taps > 1 else 1


def flat(t: Tensor, channels_first: bool) -> Tensor:
    """(positions, channels)."""
    if channels_first:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1])


def _calls(
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


def samples_in(inputs: Any) -> int:
    """Samples in a batch."""
    first = next(tensors(inputs), None)
    return 0 if first is None else len(first) if first.dim() else 1

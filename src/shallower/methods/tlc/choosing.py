"""What sites that are linear become: one layer, one fitted kernel, fewer channels in the middle, or just apart.

    plan = method.plan()                                            # which sites are linear
    plan = choose_forms(model, plan, example_inputs, batches=calibration)
    small = sh.apply(model, plan, example_inputs)

An activation that goes makes two layers one on paper only: two 3x3 convolutions of equal width merge into a 5x5 that
costs more. So each form is counted, built and timed on the device it is for, in turn with the layers as they are, and
what was found stands in the entry's note.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from shallower.core.algebra import response, wide
from shallower.core.inputs import Inputs, InputsOf, call, default_inputs_of, model_device, reiterable, to_device
from shallower.core.modes import evaluating
from shallower.core.text import amount
from shallower.errors import MethodError, PlanError
from shallower.measuring.timing import Ratio, times_in_turn
from shallower.modules import attachment
from shallower.modules.attachment import detached_copy
from shallower.modules.layers import bias_of, weight_of
from shallower.planning.entries import Entry, Fate, Fit
from shallower.planning.forms import inexact, steps
from shallower.planning.geometry import fitted_map
from shallower.planning.plan import Plan
from shallower.sites import LinearMap, Site
from shallower.surgery.checking import check_fits
from shallower.surgery.operating import operate

_ELEMENTS = 1 << 24
"""Numbers in the patches that are held at a time."""
_ALIKE = 0.03
"""Times that differ by less than this part of the layers' time are taken for equal."""
_DEARER = 0.05
"""What has more MACs or parameters is to take less of the time, by so much."""
_BLOCKS = 12
"""Parts of the timing, which tell the noise."""
_MOST_TOGETHER = 4
"""Overlapping sites for which all combinations of forms are tried."""


def choose_forms(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs,
    *,
    batches: Iterable[Any] | None = None,
    error: float = 0.05,
    kernels: Sequence[tuple[int, int]] | None = None,
    ranks: Sequence[float] = (0.25, 0.5, 0.75),
    rounds: int = 60,
    inputs_of: InputsOf = default_inputs_of,
) -> Plan:
    """The plan with the form of every site without kept channels decided by its counted and its measured cost.

    Tried are, for sites that overlap in all combinations: the layers apart, with and without the dropped channels; one
    merged layer where that is exact, with the skip around the site inside where there is one. With `batches` also what
    only comes close: a pair of convolutions replaced by one kernel, fitted by least squares to the pair's output,
    again with the skip inside; and the pair narrowed in the middle, to the ranks that keep most of the output.

    Times come with the interval that their noise leaves (see `shallower.measuring.timing.Ratio`). That only the
    activation goes, all layers and channels staying, is what everything else is held against: it costs less than
    what is there on any machine. Another form is taken only where it is faster by more than the noise, by 5 % more
    where it has more MACs or parameters; or where it has fewer and is not slower by more than the noise. Of these
    the fastest is taken. Forms that may come within 3 % of it count as equally fast, and the one with fewest MACs
    and parameters is taken, exact ones first.

    Args:
        model: that the plan is for; it is left as it is.
        plan: entries that keep channels, have a fit already or are gated stay as they are.
        example_inputs: of the size that the latency counts for.
        batches: to fit on, a few hundred samples; the last one judges the error. None: exact forms only.
        error: greatest relative squared error of what a fitted form gives, as part of the output's variance (with
            the skip, where there is one). Training afterwards mends much more than this: then take 1.
        kernels: sizes for fitted kernels; by default the larger of the pair's two along each axis, and 1x1.
        ranks: widths for the narrowed middle, as parts of the linear channels.
        rounds: of timing, in at most 12 blocks.
        inputs_of: picks the model's inputs out of a batch.

    Raises:
        MethodError: the error or a rank is out of range.
        PlanError: the plan does not fit the model.
    """
    if error < 0 or any(not 0 < rank <= 1 for rank in ranks):
        raise MethodError(f"error={error}, ranks={tuple(ranks)}: the error is not negative, a rank is a part of 1")
    check_fits(model, plan)
    now = detached_copy(model)
    data = None if batches is None else reiterable(batches)
    trial = _Trial(now, example_inputs, data, error, kernels, ranks, rounds, inputs_of)
    decided: dict[str, Entry] = {}
    with evaluating(now):
        for group in tqdm(_groups(plan.entries), desc="choosing forms", delay=2):
            chosen = trial.decide(group) if _is_open(group) else group
            for step in steps(chosen):
                operate(now, step)
            decided |= {entry.site.name: entry for entry in chosen}
    return replace(plan, entries=tuple(decided[entry.site.name] for entry in plan.entries))


@dataclass(frozen=True)
class _Form:
    """One way to do a group of sites."""

    label: str
    entries: tuple[Entry, ...]
    fitted: bool = False

    @property
    def cost(self) -> tuple[int, int]:
        """MACs and parameters."""
        made = [step.form for step in steps(self.entries)]
        # of overlapping sites the later ones count what the earlier ones left
        macs = sum(f.macs - f.macs_before for f in made)
        return macs, sum(f.params - f.params_before for f in made)


@dataclass
class _Trial:
    """Builds and times forms in a model that changes from group to group."""

    now: nn.Module
    example_inputs: Inputs
    batches: Iterable[Any] | None
    error: float
    kernels: Sequence[tuple[int, int]] | None
    ranks: Sequence[float]
    rounds: int
    inputs_of: InputsOf

    def decide(self, group: Sequence[Entry]) -> Sequence[Entry]:
        """The group's entries with their forms and why these."""
        sites = [entry.site for entry in group]
        x = self.read_by_first(sites)
        now = _Chain(self.now, sites)
        if not now.runs_on(x):
            return group
        plain = _Form("apart, all channels", tuple(_unsliced(entry) for entry in group))
        forms = [plain, *_exact(group)]
        models = {form.label: self.built(form) for form in forms}
        apart = next((form for form in forms if form.label == "apart"), plain)
        errors: dict[str, float] = {}
        if self.batches is not None and len(group) == 1:
            fits, judge = self.fitted(apart, models[apart.label])
            reference = _Chain(models[apart.label], sites)(judge)
            for form in fits:
                built = self.built(form)
                errors[form.label] = _relative_error(_Chain(built, sites, form.entries)(judge), reference)
                forms.append(form)
                models[form.label] = built
        chains = {"now": now} | {form.label: _Chain(models[form.label], sites, form.entries) for form in forms}
        blocks = max(1, min(_BLOCKS, self.rounds))
        seconds = times_in_turn(chains, x, blocks=blocks, passes=-(-self.rounds // blocks))
        near = [form for form in forms if errors.get(form.label, 0.0) <= self.error]
        against = [Ratio.of(seconds[form.label], seconds[plain.label]) for form in near]
        chosen = near[surely_fastest([form.cost for form in near], against, [form.fitted for form in near])]
        times = {form.label: Ratio.of(seconds[form.label], seconds["now"]) for form in forms}
        note = _note(chosen, forms, times, errors, self.error)
        return [replace(entry, note=note) for entry in chosen.entries]

    def built(self, form: _Form) -> nn.Module:
        small = copy.deepcopy(self.now)
        for step in steps(form.entries):
            operate(small, step)
        return small

    def read_by_first(self, sites: Sequence[Site]) -> Tensor:
        """What the first map of a group reads on the example inputs."""
        seen: list[Tensor] = []
        first = self.now.get_submodule(cast("LinearMap", sites[0].producer).name)
        handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            call(self.now, to_device(self.example_inputs, model_device(self.now)))
        finally:
            handle.remove()
        return seen[0]

    def fitted(self, apart: _Form, linear: nn.Module) -> tuple[list[_Form], Tensor]:
        """Forms that come close on the batches, and the input of the last batch to judge them by.

        Args:
            apart: the site without its activation, exactly.
            linear: the model with that form.
        """
        (entry,) = apart.entries
        site = entry.site
        producer, consumer = cast("LinearMap", site.producer), site.consumers[0]
        first, second = linear.get_submodule(producer.name), linear.get_submodule(consumer.name)
        fits = len(site.consumers) == 1 and producer.groups == consumer.groups == 1
        grams: dict[tuple[int, int], PatchGram] = {}
        for kernel in self.sizes(producer, consumer) if fits and consumer.kind == "conv2d" else ():
            try:
                grams[kernel] = PatchGram(fitted_map(producer, consumer, kernel))
            except PlanError:
                continue  # no padding keeps the output's size
        moments = torch.zeros(())
        count, total = 0, torch.zeros(())
        x = torch.zeros(())
        for batch in _with_last(cast("Iterable[Any]", self.batches)):
            with _recorded(first, second) as seen:
                call(linear, to_device(self.inputs_of(batch.value), model_device(linear)))
            x = seen["x"]
            if batch.is_last and batch.number:
                break
            for gram in grams.values():
                gram.add(x, seen["y"])
            z = _rows(seen["z"], site.channels_first)
            moments, total, count = moments + z.T @ z, total + z.sum(0), count + len(z)
        found = []
        blank = torch.full((site.width,), int(Fate.LINEAR), dtype=torch.int8)
        ones, zeros = torch.ones(site.width, dtype=torch.float64), torch.zeros(site.width, dtype=torch.float64)
        for kernel, gram in grams.items():
            weight, bias = gram.solve()
            fit = Fit((), (bias,), None, (weight,))
            for folded in _skips(site, fit_kernel=fitted_map(producer, consumer, kernel)):
                label = f"one fitted {kernel[0]}x{kernel[1]} kernel{' with the skip inside' * folded}"
                found.append(
                    _Form(label, (Entry(site, blank, ones, zeros, fit=fit, becomes="merged", fold_skip=folded),), True)
                )
        width = weight_of(first).shape[0] if producer.kind != "conv1d" else 0
        for part in self.ranks if fits and width else ():
            rank = max(1, round(part * width))
            if rank < width:
                narrow = narrowed_pair(first, second, moments / count, total / count, rank)
                form = _Form(
                    f"narrowed to {rank}", (Entry(site, blank, ones, zeros, fit=narrow, becomes="pair"),), True
                )
                if form.cost < apart.cost:
                    found.append(form)
        return found, x

    def sizes(self, producer: LinearMap, consumer: LinearMap) -> Sequence[tuple[int, int]]:
        if self.kernels is not None:
            return self.kernels
        size = max(producer.kernel[0], consumer.kernel[0]), max(producer.kernel[1], consumer.kernel[1])
        return [size, (1, 1)] if producer.taps > 1 and consumer.taps > 1 else []


def surely_fastest(costs: Sequence[tuple[int, int]], times: Sequence[Ratio], fitted: Sequence[bool]) -> int:
    """Which of several forms to take: the fastest, as far as the noise lets one say; 0 where it does not.

    Args:
        costs: MACs and parameters of each.
        times: each one's, as part of the first one's.
        fitted: which are not exact.
    """

    def is_allowed(form: int) -> bool:
        if any(a > b for a, b in zip(costs[form], costs[0], strict=True)):
            return times[form].high < 1 - _DEARER
        return times[form].is_faster or (costs[form] != costs[0] and not times[form].is_slower)

    allowed = [0, *filter(is_allowed, range(1, len(costs)))]
    fastest = min(times[form].median for form in allowed)
    alike = [form for form in allowed if times[form].low <= fastest + _ALIKE]
    return min(alike, key=lambda form: (fitted[form], costs[form]))


def _note(
    chosen: _Form, forms: Sequence[_Form], times: Mapping[str, Ratio], errors: Mapping[str, float], limit: float
) -> str:
    def told(form: _Form) -> str:
        macs, params = form.cost
        text = f"{form.label}: {_signed(params)} params, {_signed(macs)} MACs, {times[form.label]} of the time"
        if form.label in errors:
            over = f", more than {limit:.3g}" if errors[form.label] > limit else ""
            text += f", error {errors[form.label]:.3g}{over}"
        return text

    others = "; ".join(told(form) for form in forms if form is not chosen)
    return f"{told(chosen)}. Not: {others}"[:2000]


def _signed(count: int) -> str:
    return f"{'-' if count < 0 else '+'}{amount(abs(count))}"


def _is_open(group: Sequence[Entry]) -> bool:
    """Whether something is to be decided."""
    return all(
        len(e.kept) == 0
        and e.site.producer is not None
        and e.fit is None
        and not e.site.gated
        and not e.site.between
        and e.site.kind != "heads"
        and not e.becomes
        and e.site.calls == 1
        and not e.site.averaged
        for e in group
    )


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that share a layer together, in the order of the network."""
    groups: list[list[Entry]] = []
    for step in steps(entries):
        names = {m.name for m in step.entry.site.maps}
        own = [group for group in groups if any(names & {m.name for m in e.site.maps} for e in group)]
        for group in own[1:]:
            own[0].extend(group)
            groups.remove(group)
        if own:
            own[0].append(step.entry)
        else:
            groups.append([step.entry])
    return groups


def _exact(group: Sequence[Entry]) -> list[_Form]:
    """All exact forms of a group but the one that keeps every channel."""
    choices = list(itertools.product(("apart", "merged"), repeat=len(group)))
    if len(group) > _MOST_TOGETHER:
        choices = [choices[0], choices[-1]]
    forms: list[_Form] = []
    for choice in choices:
        entries = [replace(e, becomes=cast("Any", becomes)) for e, becomes in zip(group, choice, strict=True)]
        folds = (True, False) if set(choice) == {"merged"} and group[-1].site.residual is not None else (False,)
        for folded in folds:
            entries[-1] = replace(entries[-1], fold_skip=folded)
            try:
                if any(_inexact(entries)):
                    continue
                steps(entries)
            except PlanError:
                continue
            label = "apart" if set(choice) == {"apart"} else "merged" if set(choice) == {"merged"} else ""
            label = label or ", ".join(f"{e.site.consumers[0].name} {b}" for e, b in zip(group, choice, strict=True))
            forms.append(_Form(f"{label}{' with the skip inside' * folded}", tuple(entries)))
    if not any(bool(len(e.dropped)) for e in group):
        forms = [form for form in forms if form.label != "apart"]  # the same as with all channels
    return forms


def _inexact(entries: Sequence[Entry]) -> Iterator[bool]:
    """Whether a merge that an entry asks for would not be exact, for each."""
    maps = {m.name: m for entry in entries for m in entry.site.maps}
    for step in steps(entries):
        site, form = step.entry.site, step.form
        producer = maps[cast("LinearMap", site.producer).name]
        yield form.kind == "merged" and any(inexact(step.entry, producer, maps[c.name]) for c in site.consumers)
        maps.update({m.name: m for m in form.maps})


def _unsliced(entry: Entry) -> Entry:
    """The same channels, those that are dropped too, with nothing but the activation gone."""
    dropped = entry.fates == Fate.DROP
    fates = torch.full_like(entry.fates, int(Fate.LINEAR))
    slopes = torch.where(dropped, 0.0, entry.slopes)
    return replace(entry, fates=fates, slopes=slopes, becomes="apart")


def _skips(site: Site, fit_kernel: LinearMap) -> tuple[bool, ...]:
    """Whether the skip around a site may go into a kernel: inside where it may, outside else."""
    if site.residual is None or site.residual.source not in ("", cast("LinearMap", site.producer).name):
        return (False,)
    same = fit_kernel.d_in == fit_kernel.d_out and fit_kernel.stride == (1, 1)
    centred = all(k % 2 and 2 * p == k - 1 for k, p in zip(fit_kernel.kernel, fit_kernel.padding, strict=True))
    return (True, False) if same and centred else (False,)


class _Chain(nn.Module):
    """The layers of a group of sites, with what stands between them and the skip around them."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], entries: Sequence[Entry] = ()) -> None:
        super().__init__()
        names: list[str] = []
        layers: list[nn.Module] = []
        for i, site in enumerate(sites):
            first = cast("LinearMap", site.producer).name
            layers += [model.get_submodule(name) for name in (first, site.norm_before) if name and name not in names]
            place = site.activation
            inside = place is not None and bool(site.norm_before) and place.module.startswith(f"{site.norm_before}.")
            if place is not None and not inside:
                with attachment.exposed(model, [place]) as modules:
                    layers.append(copy.deepcopy(modules[place]))
            layers += [model.get_submodule(name) for name in (site.norm_after,) if name]
            names += [first, *(c.name for c in site.consumers)]
            if i + 1 < len(sites):
                layers.append(model.get_submodule(site.consumers[0].name))
        last = sites[-1]
        self.layers = nn.Sequential(*layers)
        self.ends = nn.ModuleList([model.get_submodule(c.name) for c in last.consumers])
        self.skip = last.residual is not None and not any(entry.fold_skip for entry in entries)
        norm = "" if last.residual is None else last.residual.norm
        self.norm = model.get_submodule(norm) if norm else nn.Identity()
        self.eval()

    def runs_on(self, x: Tensor) -> bool:
        """Whether this is all that happens to x: a reshape between the layers would be missing here."""
        try:
            self(x)
        except RuntimeError:
            return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        y = self.norm(self.ends[0](z))
        for end in self.ends[1:]:
            end(z)
        result: Tensor = y + x if self.skip else y
        return result


class _Numbered:
    def __init__(self, value: Any, number: int, is_last: bool) -> None:
        self.value, self.number, self.is_last = value, number, is_last


def _with_last(batches: Iterable[Any]) -> Iterator[_Numbered]:
    """Each batch with its number, and whether it is the last."""
    waiting: list[Any] = []
    number = 0
    for batch in batches:
        if waiting:
            yield _Numbered(waiting.pop(), number, False)
            number += 1
        waiting.append(batch)
    for batch in waiting:
        yield _Numbered(batch, number, True)


class _recorded:  # noqa: N801
    """What two layers in a row read and give: x, z, y."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.second = first, second

    def __enter__(self) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        self.handles = [
            self.first.register_forward_hook(lambda _, args, __: seen.update(x=args[0].detach())),
            self.second.register_forward_hook(lambda _, args, y: seen.update(z=args[0].detach(), y=y.detach())),
        ]
        return seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _rows(z: Tensor, channels_first: bool) -> Tensor:
    """(positions, channels), float64."""
    z = z.movedim(1, -1) if channels_first and z.dim() > 2 else z
    return wide(z.reshape(-1, z.shape[-1]))


def _relative_error(found: Tensor, reference: Tensor) -> float:
    """Squared error as a part of the reference's variance over everything but its channels."""
    dims = [i for i in range(reference.dim()) if i != (1 if reference.dim() == 4 else reference.dim() - 1)]
    centred = wide(reference) - wide(reference).mean(dims, keepdim=True)
    return float((wide(found) - wide(reference)).square().sum() / centred.square().sum().clamp_min(1e-300))


class PatchGram:
    """Second moments of a convolution's input patches and of the outputs it is to give; batches add up.

        gram = PatchGram(fitted_map(conv1, conv2, (3, 3)))
        gram.add(x, conv2(conv1(x)))
        weight, bias = gram.solve()

    Memory is O((d_in kh kw)^2), whatever the data.

    Args:
        m: the convolution to be fitted; its geometry counts.
    """

    def __init__(self, m: LinearMap) -> None:
        self.map = m
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Add images x (n, d_in, h, w) and the outputs y (n, d_out, h', w') that they are to give."""
        m = self.map
        size = max(1, _ELEMENTS // max(1, m.d_in * m.taps * y.shape[2] * y.shape[3]))
        for images, outputs in zip(torch.split(x, size), torch.split(y, size), strict=True):
            patches = F.unfold(images, m.kernel, m.dilation, m.padding, m.stride).transpose(1, 2).flatten(0, 1)
            rows = wide(torch.cat([patches, patches.new_ones(len(patches), 1)], 1))
            self.xx = self.xx + rows.T @ rows
            self.xy = self.xy + rows.T @ wide(outputs.flatten(2).transpose(1, 2).flatten(0, 1))

    def solve(self, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """The kernel (d_out, d_in, kh, kw) and the bias (d_out,) with the least squared error, float64.

        Args:
            ridge: added to the diagonal of the Gram matrix, relative to its mean.

        Raises:
            MethodError: nothing was added, or it is not finite.
        """
        xx, xy = torch.as_tensor(self.xx), torch.as_tensor(self.xy)
        if xx.dim() == 0 or not bool(xx.isfinite().all()) or not bool(xy.isfinite().all()):
            raise MethodError(f"{self.map.name}: there is no finite data to fit a kernel on")
        damped = xx + ridge * xx.diagonal()[:-1].mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        solution = torch.linalg.solve(damped, xy).T
        weight = solution[:, :-1].reshape(self.map.d_out, self.map.d_in, *self.map.kernel)
        return weight.contiguous(), solution[:, -1].contiguous()


def narrowed_pair(first: nn.Module, second: nn.Module, moments: Tensor, mean: Tensor, rank: int) -> Fit:
    """Two linear layers in a row with fewer channels between them, so that the second gives nearly what it gave.

    Of the directions of z, the second layer's input, those are kept that carry most of its output: the leading right
    singular vectors of W E[z z^T]^(1/2), where W stacks the taps of the kernel. What is left out is replaced by its
    mean.

    Args:
        first, second: as they are, with nothing between them.
        moments: (m, m) E[z z^T], float64.
        mean: (m,) E[z].
        rank: channels that remain.

    Reference: Izenman, Reduced-rank regression for the multivariate linear model, 1975, theorem 1.
    """
    rows, columns = wide(weight_of(first)), wide(weight_of(second))
    taps = columns.flatten(2).transpose(1, 2).flatten(0, 1) if columns.dim() > 2 else columns  # (d_out taps, m)
    values, vectors = torch.linalg.eigh(moments)
    roots = values.clamp_min(0).sqrt()
    kept = roots > 1e-7 * roots.max()
    vectors, roots = vectors[:, kept], roots[kept]
    _, _, directions = torch.linalg.svd(taps @ (vectors * roots), full_matrices=False)
    directions = directions[:rank]
    down = directions @ (vectors / roots).T  # (rank, m)
    back = (vectors * roots) @ directions.T  # (m, rank)
    bias = bias_of(first)
    shape = (-1, *rows.shape[1:])
    narrow = (down @ rows.flatten(1)).reshape(shape)
    up = torch.einsum("om...,mr->or...", columns, back)
    own = bias_of(second)
    lost = response(columns, mean - back @ (down @ mean))
    return Fit(
        (),
        ((lost if own is None else wide(own) + lost),),
        narrow,
        (up,),
        None if bias is None else down @ wide(bias),
    )

"""What sites that are linear become: one layer, one fitted kernel, fewer channels in the middle, or just apart.

An activation that goes makes two layers one on paper only: two 3x3 convolutions of equal width merge into a 5x5 that
is more expensive. So each form is counted, built and timed on the device it is for, in turn with the layers as they
are, and the entry's note says what was found.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn
from tqdm.auto import tqdm

from shallower.core.inputs import Inputs, InputsOf, default_inputs_of, reiterable
from shallower.core.modes import evaluating
from shallower.core.text import amount
from shallower.errors import MethodError
from shallower.measuring.timing import Ratio
from shallower.methods.tlc.trying import Trial, Tried
from shallower.methods.tlc.variants import Variant, is_open
from shallower.modules.attachment import detached_copy
from shallower.planning.entries import Entry
from shallower.planning.forms import steps
from shallower.planning.plan import Plan
from shallower.sites import overlapping
from shallower.surgery.checking import check_fits
from shallower.surgery.operating import operate

_ALIKE = 0.03
"""Times that differ by less than this part of the layers' time are taken for equal."""
_EXPENSIVE = 0.05
"""A form with more MACs or parameters has to take less of the time, by this part of it."""
_MOST_NOTE = 2000


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

        plan = method.plan()                                            # which sites are linear
        plan = sh.choose_forms(model, plan, example_inputs, batches=calibration)
        small = sh.apply(model, plan, example_inputs)

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
        raise MethodError(f"error={error}, ranks={tuple(ranks)}: the error must not be negative, a rank is a part of 1")
    check_fits(model, plan)
    now = detached_copy(model)
    data = None if batches is None else reiterable(batches)
    trial = Trial(now, example_inputs, data, kernels, ranks, rounds, inputs_of)
    ordered = {step.entry.site.name: step.entry for step in plan.steps}
    groups = overlapping([entry.site for entry in ordered.values()])
    with evaluating(now):
        for sites in tqdm(groups, desc="choosing forms", delay=2):
            group = [ordered[site.name] for site in sites]
            tried = trial.of(group) if is_open(group) else None
            if tried is not None:
                group = _decided(tried, error)
            for step in steps(group):
                operate(now, step)
            ordered |= {entry.site.name: entry for entry in group}
    return replace(plan, entries=tuple(ordered[entry.site.name] for entry in plan.entries))


def _decided(tried: Tried, error: float) -> list[Entry]:
    """The entries of the variant to take, with the reason in their notes."""
    plain = tried.variants[0]
    near = [variant for variant in tried.variants if tried.errors.get(variant.label, 0.0) <= error]
    against = tried.against(plain.label)
    best = surely_fastest([Rival(variant.cost, against[variant.label], variant.fitted) for variant in near])
    note = _choice_note(near[best], tried, error)
    return [replace(entry, note=note) for entry in near[best].entries]


class Rival(NamedTuple):
    """What is known of a form.

    Attributes:
        cost: MACs and parameters.
        time: as part of the first form's.
        fitted: it is not exact.
    """

    cost: tuple[int, int]
    time: Ratio
    fitted: bool = False


def surely_fastest(rivals: Sequence[Rival]) -> int:
    """Which of several forms to take: the fastest, as far as the noise lets one say; 0 where it does not."""
    plain = rivals[0]

    def is_allowed(rival: Rival) -> bool:
        if any(map(operator.gt, rival.cost, plain.cost)):
            return rival.time.high < 1 - _EXPENSIVE
        return rival.time.is_faster or (rival.cost != plain.cost and not rival.time.is_slower)

    allowed = [plain, *filter(is_allowed, rivals[1:])]
    fastest = min(rival.time.median for rival in allowed)
    alike = [rival for rival in allowed if rival.time.low <= fastest + _ALIKE]
    return rivals.index(min(alike, key=lambda rival: (rival.fitted, rival.cost)))


def _choice_note(chosen: Variant, tried: Tried, limit: float) -> str:
    times = tried.against("now")
    others = "; ".join(_variant_text(v, times, tried.errors, limit) for v in tried.variants if v is not chosen)
    return f"{_variant_text(chosen, times, tried.errors, limit)}. Not: {others}"[:_MOST_NOTE]


def _variant_text(variant: Variant, times: Mapping[str, Ratio], errors: Mapping[str, float], limit: float) -> str:
    macs, params = variant.cost
    label = variant.label
    text = f"{label}: {_signed(params)} params, {_signed(macs)} MACs, {times[label]} of the time"
    if label not in errors:
        return text
    text += f", error {errors[label]:.3g}"
    if errors[label] > limit:
        text += f", more than {limit:.3g}"
    return text


def _signed(count: int) -> str:
    sign = "-" if count < 0 else "+"
    return f"{sign}{amount(abs(count))}"

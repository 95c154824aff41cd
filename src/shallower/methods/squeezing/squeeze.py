"""Calibrated squeezing: the best narrower network that a few hundred samples can find, without training.

For each site, in order: choose the channels from which least squares predicts best what the consumers should return,
weighted by their influence on the model's output, and fit the consumers anew. Each site is calibrated on the network
whose earlier sites are squeezed already, towards what the dense network does there. How many channels each site keeps
follows from the sites' curves of error against cost, in units of the model's output; or is the same share everywhere,
where that is asked for. Where the target is a latency, the cost is what was measured on this machine (latencies.py),
and the whole model is timed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shallower.core.codec import field_names
from shallower.core.failures import failing
from shallower.core.inputs import Inputs, InputsOf, model_device
from shallower.core.modes import without_inference_mode
from shallower.core.processes import raised_anywhere
from shallower.core.trees import to_device
from shallower.errors import FitError, MethodError, Refusal, TargetError
from shallower.methods.squeezing.calibration import Calibration, reader_of
from shallower.methods.squeezing.costing import Times, WidthCosts
from shallower.methods.squeezing.coupled.coupling import not_described
from shallower.methods.squeezing.coupled.readers import is_coupled, not_squeezed
from shallower.methods.squeezing.diagnosing import check_call, check_model, explained
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.progress import Progress, identity_of
from shallower.methods.squeezing.searching import Search
from shallower.methods.squeezing.sweeping import Sweep
from shallower.methods.squeezing.uniformity import only_expressible
from shallower.modules.attachment import attached_places, detached_copy
from shallower.modules.offloading import with_mapped_weights
from shallower.planning.family import Family
from shallower.planning.plan import Plan
from shallower.planning.targets import Target
from shallower.sites import Site, Sites
from shallower.training.loop import Score


def squeeze(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    target: str | Target,
    *,
    score: Score | None = None,
    uniform: bool = False,
    inputs_of: InputsOf | None = None,
    example_inputs: Inputs | None = None,
    checkpoint: str | Path | None = None,
    options: SqueezeOptions | None = None,
    **misplaced: object,
) -> Plan:
    """A plan, with fitted weights, that makes hidden widths smaller until the target is met, without training.

        plan = sh.squeeze(model, sites, batches, target="params:60%")
        small = sh.apply(model, plan, example_inputs)

    Args:
        model: in the state it is to be used in; it is not changed. It may be offloaded by Accelerate: its weights are
            then mapped from their files, so that a model may be larger than memory.
        sites: of this model, or a selection of them.
        batches: a few hundred samples of what the model is used on, labels are not needed. They are read once.
        target: `params:`, `macs:`, `size:`, `latency:` on this device, or `drop:`, which needs `score`; see `Target`.
        score: quality of a model, higher is better; for `drop:` alone.
        uniform: keep the same share of every site's channels, so that a stock class can load the result. Sites of a
            Transformers model whose width its config does not express (a pooler, a classifier) stay as they are.
        inputs_of: returns the model's inputs in a batch. By default a batch is what the model takes, or (inputs,
            labels); of two tensors, whichever the model was found with.
        example_inputs: what latencies are measured on; by default the inputs of the first batch. Measured latencies of
            layers are kept in the user's cache folder, or in $SHALLOWER_CACHE, for this processor and version of torch.
        checkpoint: a folder for what is done so far. Where it exists, an interrupted squeezing of the same model on
            the same batches goes on from it, with the same result; one of anything else is refused.
        options: everything else, see `SqueezeOptions`.

    Raises:
        SiteError: no site can be made narrower, or the model cannot be called with the batches.
        TargetError: the target cannot be met, and the error says what can; or the model meets it as it is.
        FitError: the calibration data are too few or not finite; the error names the site.
        MethodError: a `drop:` target comes without `score`, or an option is out of range.
        CheckpointError: the checkpoint is damaged, or of another squeezing.
        TypeError: an option is given here and not in `options`.

    Of several processes all raise what one of them raises.

    Warns:
        CalibrationWarning: a site has far fewer positions to fit on than numbers to fit; how many samples would do.
        UniformWarning: no stock class can load the result, though `uniform` was asked for.
    """
    _refuse_misplaced(misplaced)
    target = Target.parse(target)
    if target.unit == "latency":
        sites = _timed_alone(sites)
    with raised_anywhere(), without_inference_mode():
        search = _search(model, sites, batches, options, uniform, inputs_of, example_inputs, checkpoint)
        with _explaining(search):
            plan = search.plan(target, score)
        search.sweep.warn_of_shortage(plan)
        return _told(plan, search.sweep.calibration)


def squeeze_family(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    smallest: str | Target,
    count: int = 5,
    *,
    uniform: bool = False,
    inputs_of: InputsOf | None = None,
    checkpoint: str | Path | None = None,
    options: SqueezeOptions | None = None,
) -> Family:
    """Plans from large to small, from which any size in between is made without data.

        family = sh.squeeze_family(model, sites, batches, "macs:30%")
        family.save("family/")
        small = sh.apply(model, family.plan(model, "macs:47%"), example_inputs)

    What the members share (the weight of errors, the curves of error, what the model itself returns) is found once.

    Args:
        model, sites, batches, uniform, inputs_of, checkpoint, options: see `squeeze`.
        smallest: of params, MACs, size or KV cache: what the smallest member leaves. The others are spread evenly
            between it and the whole model.
        count: how many members.

    Raises:
        TargetError: the smallest cannot be reached, or is of a latency or a score.
        MethodError: `count` is not positive.
        SiteError, FitError, CheckpointError: see `squeeze`.

    Of several processes all raise what one of them raises.
    """
    if isinstance(smallest, str):
        smallest = Target.parse(smallest)
    if smallest.unit in ("latency", "drop"):
        raise TargetError(f"the target {smallest} has to be measured: a family is made for params, macs, size or kv")
    if not isinstance(count, int) or count < 1:
        raise MethodError(f"count={count!r:.40}: a family has at least one member")
    with raised_anywhere(), without_inference_mode():
        search = _search(model, sites, batches, options, uniform, inputs_of, None, checkpoint)
        with _explaining(search):
            members = tuple(reversed(list(search.members(smallest, count))))
        for member in members:
            search.sweep.warn_of_shortage(member.plan)
        kept = [replace(member, plan=_told(member.plan, search.sweep.calibration)) for member in members]
        return Family(tuple(kept), search.counts.before, tuple(search.sites.names))


def _told(plan: Plan, calibration: Calibration) -> Plan:
    """The plan with what is known of its making: the rows, how often they ran, and what could not be calibrated."""
    batches = calibration.batches
    return replace(plan, seen=batches.seen(), passes=round(batches.passes, 1), left_out=dict(calibration.refused))


def _search(
    model: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    options: SqueezeOptions | None,
    uniform: bool,
    inputs_of: InputsOf | None,
    example_inputs: Inputs | None,
    checkpoint: str | Path | None,
) -> Search:
    """Everything that a squeezing needs, checked."""
    options = options or SqueezeOptions()
    dense = without_attached(with_mapped_weights(model))
    squeezable = narrowable(sites)
    check_model(dense, squeezable)
    if uniform:
        options = replace(options, collapse=False)
        squeezable = only_expressible(dense, squeezable)
    calibration = calibration_of(dense, squeezable, batches, options, inputs_of, example_inputs)
    reasons = not_described(dense, list(filter(is_coupled, squeezable)), calibration)
    squeezable = squeezable.usable(
        lambda site: Refusal(reasons[site.name]) if site.name in reasons else None,
        "the model has no site that can be made narrower",
    )
    progress = None
    if checkpoint is not None:
        progress = Progress(checkpoint, identity_of(dense, squeezable, calibration.batches.digest, options))
    sweep = Sweep(dense, squeezable, calibration, progress)
    times = Times(dense, squeezable, timed_on(calibration, example_inputs, dense), options)
    return Search(sweep, WidthCosts(dense, squeezable), times, options.round_to, uniform)


@contextmanager
def _explaining(search: Search) -> Iterator[None]:
    """Tell what was wrong with the data where something fails because of them."""
    try:
        yield
    except Exception as error:
        cause = explained(search.sweep.dense, search.sites, search.sweep.calibration, error)
        if cause is None:
            raise
        raise cause from error


def without_attached(model: nn.Module) -> nn.Module:
    """The model, or a copy with nothing attached; `without_attached(model)`."""
    if not attached_places(model):
        return model
    return detached_copy(model)


def narrowable(sites: Sites) -> Sites:
    """The sites whose channels can be kept one by one, and whose readers can be fitted anew to them.

    Of those that share a layer some are left out, see `Sites.apart`; a coupled site only where another cuts the same
    side of it, or is fitted there.

    Raises:
        SiteError: there is none; the error says why.
    """
    usable = sites.usable(not_squeezed, "the model has no site that can be made narrower")
    others = usable.select(lambda site: not is_coupled(site)).apart()
    cut: dict[tuple[str, str], str] = {}
    for site in others:
        for m in site.maps:
            if site.followed or m in site.consumers:
                cut[m.name, "columns"] = site.name
            if site.followed or m not in site.consumers:
                cut[m.name, "rows"] = site.name
    left: dict[str, str] = {}
    for site in usable:
        if is_coupled(site):
            clashes = [cut[key] for slot in site.slots if (key := (slot.module, str(slot.side))) in cut]
            if clashes:
                left[site.name] = f"it shares a layer with {clashes[0]}; narrow it by itself, before or after"
    stay = {*others.names} | {site.name for site in usable if is_coupled(site)} - left.keys()
    return usable.only((site for site in usable if site.name in stay), {**others.skipped, **left})


def _timed_alone(sites: Sites) -> Sites:
    """The sites that run in one piece, whose latency can be measured.

    Raises:
        SiteError: there is none.
    """

    def scattered(site: Site) -> Refusal | None:
        if not is_coupled(site):
            return None
        return Refusal("its layers are spread over the network, and its latency is not measured; ask for macs: instead")

    return sites.usable(scattered, "no site can be timed by itself")


def _refuse_misplaced(misplaced: dict[str, object]) -> None:
    for name in misplaced:
        if name in field_names(SqueezeOptions):
            raise TypeError(f"squeeze() takes {name} among its options: options=sh.SqueezeOptions({name}=...)")
        raise TypeError(f"squeeze() got an unexpected keyword argument {name!r}")


def calibration_of(
    dense: nn.Module,
    sites: Sites,
    batches: Iterable[Any],
    options: SqueezeOptions,
    inputs_of: InputsOf | None,
    example_inputs: Inputs | None,
) -> Calibration:
    """The batches, read once, with the first of them tried on the model.

        calibration_of(model, sites, batches, sh.SqueezeOptions(), None, None)

    Raises:
        FitError: there are none, or the model returns nothing that could be weighed.
        SiteError: they can be read only once, or are not what the model takes.
    """
    calibration = Calibration(batches, options, inputs_of or reader_of(dense, sites, example_inputs))
    if not len(calibration.batches):
        raise FitError("calibration needs data: `batches` is empty. Give a few hundred samples")
    remedy = (
        "Give batches like the example inputs that the sites were found with, or say with inputs_of= how to read yours"
    )
    output = check_call(dense, calibration.batches[0].inputs, "the first calibration batch", remedy)
    with failing(FitError, "output_of fails on what the model returns"):
        chosen = calibration.output_of(output)
    if not isinstance(chosen, torch.Tensor) or not chosen.is_floating_point():
        returned = f"one of {chosen.dtype}" if isinstance(chosen, torch.Tensor) else f"a {type(chosen).__name__}"
        raise FitError(
            f"output_of must return a floating-point tensor of what the model returns, and returned {returned}"
        )
    return calibration


def timed_on(calibration: Calibration, example_inputs: Inputs | None, dense: nn.Module) -> Inputs:
    """What latencies are measured on, on the model's device; `timed_on(calibration, None, model)`.

    Raises:
        SiteError: the model cannot be called with it.
    """
    if example_inputs is None:
        inputs = calibration.batches[0].inputs
    else:
        inputs = example_inputs
        check_call(dense, inputs, "example_inputs", "Give what find_sites was given")
    on_device: Inputs = to_device(inputs, model_device(dense))
    return on_device

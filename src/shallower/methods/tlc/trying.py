"""The forms of a group of sites, built, fitted and timed in turn."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Gram
from shallower.calibrating.patches import flat
from shallower.core.algebra import wide
from shallower.core.inputs import Inputs, InputsOf, call, model_device
from shallower.core.trees import to_device
from shallower.core.watching import recorded
from shallower.errors import PlanError
from shallower.measuring.timing import Ratio, times_in_turn
from shallower.methods.tlc.chains import Chain
from shallower.methods.tlc.fitting import fitted_kernel, narrowed_pair, patch_gram
from shallower.methods.tlc.variants import Variant, all_channels, exact_variants, skips
from shallower.modules.layers import weight_of
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.forms import steps
from shallower.planning.geometry import fitted_map
from shallower.sites import LinearMap, Site
from shallower.surgery.operating import operate

_BLOCKS = 12
"""Parts of the timing, which show the noise."""


@dataclass(frozen=True)
class Tried:
    """What was found of a group's variants.

    Attributes:
        variants: the first one keeps all channels and every layer.
        errors: of the fitted ones, by label: squared, as a part of the output's variance.
        seconds: by label, one median a block of the timing; "now" for the layers as they are.
    """

    variants: list[Variant]
    errors: dict[str, float]
    seconds: dict[str, list[float]]

    def against(self, other: str) -> dict[str, Ratio]:
        """Each variant's time as a part of another's, by label."""
        return {v.label: Ratio.of(self.seconds[v.label], self.seconds[other]) for v in self.variants}


@dataclass
class Trial:
    """Builds and times variants in a model that changes from group to group; see `choose_forms` for the fields."""

    now: nn.Module
    example_inputs: Inputs
    batches: Iterable[Any] | None
    kernels: Sequence[tuple[int, int]] | None
    ranks: Sequence[float]
    rounds: int
    inputs_of: InputsOf

    def of(self, group: Sequence[Entry]) -> Tried | None:
        """Everything that can be done with a group; None where its layers alone are not what runs."""
        sites = [entry.site for entry in group]
        x = self._read_by_first(sites)
        chains = {"now": Chain(self.now, sites)}
        if not chains["now"].runs_on(x):
            return None
        variants = [all_channels(group), *exact_variants(group)]
        models = {variant.label: self._built(variant) for variant in variants}
        errors: dict[str, float] = {}
        if self.batches is not None and len(group) == 1 and _can_be_fitted(sites[0]):
            apart = next((v for v in variants if v.label == "apart"), variants[0])
            fits, judge = self._fitted(apart, models[apart.label])
            wanted = Chain(models[apart.label], sites)(judge)
            for variant in fits:
                models[variant.label] = self._built(variant)
                found = Chain(models[variant.label], sites, variant.entries)(judge)
                errors[variant.label] = variance_error(found, wanted)
            variants += fits
        for variant in variants:
            chains[variant.label] = Chain(models[variant.label], sites, variant.entries)
        blocks = max(1, min(_BLOCKS, self.rounds))
        seconds = times_in_turn(chains, x, blocks=blocks, passes=-(-self.rounds // blocks))
        return Tried(variants, errors, dict(seconds))

    def _built(self, variant: Variant) -> nn.Module:
        small = copy.deepcopy(self.now)
        for step in steps(variant.entries):
            operate(small, step)
        return small

    def _read_by_first(self, sites: Sequence[Site]) -> Tensor:
        """What the first map of a group reads on the example inputs."""
        first = cast("LinearMap", sites[0].producer).name
        with recorded(self.now, [first], outputs=False) as seen:
            call(self.now, to_device(self.example_inputs, model_device(self.now)))
        return seen.inputs[first][-1]

    def _fitted(self, apart: Variant, linear: nn.Module) -> tuple[list[Variant], Tensor]:
        """Variants that come close on the batches, and the input of the last batch to judge them by.

        Args:
            apart: the site without its activation, exactly.
            linear: the model with that form.
        """
        (entry,) = apart.entries
        site = entry.site
        producer, consumer = cast("LinearMap", site.producer), site.consumers[0]
        kernels = self._kernels(producer, consumer)
        grams: dict[LinearMap, Gram] = {}
        between: Gram | None = None
        x = torch.zeros(())
        for number, pair in enumerate(self._seen(linear, producer.name, consumer.name)):
            x = pair.x
            if pair.is_last and number:
                break
            for m in kernels:
                gram = patch_gram(m, pair.x, pair.y)
                grams[m] = grams[m] + gram if m in grams else gram
            z = flat(pair.z, site.bridge.dim == 1)
            between = Gram.of(z) if between is None else between.seen(z)
        collapsed = Entry.collapse(site)
        found = []
        for m, gram in grams.items():
            weight, bias = fitted_kernel(m, gram)
            fit = Fit((), (bias,), None, (weight,))
            for folded in skips(site, m):
                label = f"one fitted {m.kernel[0]}x{m.kernel[1]} kernel{' with the skip inside' * folded}"
                found.append(Variant(label, (_with(collapsed, fit, "merged", folded),), fitted=True))
        first, second = linear.get_submodule(producer.name), linear.get_submodule(consumer.name)
        width = len(weight_of(first))
        for part in self.ranks:
            rank = max(1, round(part * width))
            if producer.kind == "conv1d" or rank >= width or between is None:
                continue
            narrow = narrowed_pair(first, second, between.centred(False).zz, between.centred().mean_z, rank)
            variant = Variant(f"narrowed to {rank}", (_with(collapsed, narrow, "pair"),), fitted=True)
            if variant.cost < apart.cost:
                found.append(variant)
        return found, x

    def _kernels(self, producer: LinearMap, consumer: LinearMap) -> list[LinearMap]:
        """The single convolutions, one for each size of kernel, that keep the output's size."""
        if consumer.kind != "conv2d":
            return []
        sizes = self.kernels
        if sizes is None:
            larger = max(producer.kernel[0], consumer.kernel[0]), max(producer.kernel[1], consumer.kernel[1])
            sizes = []
            if producer.taps > 1 and consumer.taps > 1:
                sizes = [larger, (1, 1)]
        found: list[LinearMap] = []
        for kernel in sizes:
            with suppress(PlanError):  # no padding keeps the output's size
                found.append(fitted_map(producer, consumer, kernel))
        return found

    def _seen(self, model: nn.Module, first: str, second: str) -> Iterator[_Seen]:
        """What two layers in a row read and return on each batch."""
        device = model_device(model)
        batches = iter(cast("Iterable[Any]", self.batches))
        following = next(batches, None)
        while following is not None:
            batch, following = following, next(batches, None)
            with recorded(model, [first, second]) as seen:
                call(model, to_device(self.inputs_of(batch), device))
            x, z, y = seen.inputs[first][-1], seen.inputs[second][-1], seen.outputs[second][-1]
            yield _Seen(x, z, y, following is None)


@dataclass(frozen=True)
class _Seen:
    """x -> first layer -> z -> second layer -> y, on one batch."""

    x: Tensor
    z: Tensor
    y: Tensor
    is_last: bool


def _can_be_fitted(site: Site) -> bool:
    """Whether one kernel or a narrower pair can be fitted to the site's two layers."""
    maps = site.maps
    return len(maps) == 2 and all(m.groups == 1 for m in maps)


def variance_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference||^2 as a part of the reference's variance over everything but its channels."""
    channels = 1 if reference.dim() == 4 else reference.dim() - 1
    dims = [dim for dim in range(reference.dim()) if dim != channels]
    found, reference = wide(found), wide(reference)
    centred = reference - reference.mean(dims, keepdim=True)
    return float((found - reference).square().sum() / centred.square().sum().clamp_min(1e-300))


def _with(entry: Entry, fit: Fit, becomes: Any, fold_skip: bool = False) -> Entry:
    return Entry(
        entry.site, entry.fates, entry.slopes, entry.offsets, fit=fit, becomes=becomes, fold_skip=fold_skip
    )  # fmt: skip

"""What a model costs with its sites at given widths: counted, or timed on this machine.

counts = WidthCosts(model, sites)
counts.after({"layer.0": 384, "layer.1": 0})        # 0: one linear map in the place of the site
times = Times(model, sites, example_inputs, sh.SqueezeOptions())
times.measured({"layer.0": 384, "layer.1": 0})      # seconds
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from torch import nn

from shallower.calibrating.site_grams import may_collapse
from shallower.core.inputs import Inputs
from shallower.measuring.cost import cost_as_found
from shallower.measuring.measurement import compare
from shallower.methods.squeezing.coupled.readers import is_coupled, readers_of
from shallower.methods.squeezing.latencies import Latency, narrowed_copy, site_latencies, stand_in, stand_ins
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.modules.layers import weight_of
from shallower.planning.costs import Cost, cost_after, kv_saved, size_saved
from shallower.planning.forms import Step, form_of
from shallower.planning.plan import Plan
from shallower.sites import Site, Sites, overlapping

SiteWidths = Mapping[str, int]
"""Site name -> channels that stay; 0 for one linear map in the place of the site."""

_TIMING_ROUNDS = 15
"""The whole model is timed in so many rounds; on a busy machine in more, until the ratio is precise or time is up."""

_PRECISION = 0.01
_TIMING_SECONDS = 3.0
_ROUND_SECONDS = 2e-3
"""A round takes at least this long for each model, see `compare`."""

_TRUST = (0.5, 2.0)
"""Bounds of the part of the sites' savings that the whole model is taken to save."""


class WidthCosts:
    """Parameters, MACs, bytes and the KV cache of the model, by the widths of its sites.

    Attributes:
        dense: the model as it is.
        sites: that may be squeezed.
    """

    def __init__(self, dense: nn.Module, sites: Sites) -> None:
        self.dense = dense
        self.sites = sites
        self._alone: dict[tuple[str, int], Cost] = {}

    @cached_property
    def before(self) -> Cost:
        """Of the model as it is."""
        return cost_as_found(self.dense, self.sites)

    def after(self, widths: SiteWidths) -> Cost:
        """Of the model with its sites at these widths."""
        if self._overlapping:
            plan = Plan(tuple(stand_ins(self.sites, widths)))
            after = cost_after(plan, self.before, self.dense)
            for site in self.sites:
                added = self._added(site, widths[site.name])
                after = replace(after, params=after.params + added.params, size=after.size + added.size)
            return after
        before = self.before
        params, macs, size, kv = before.params, before.macs, before.size, before.kv
        for site in self.sites:
            saved = self._saved_alone(site, widths[site.name])
            params, macs, size = params - saved.params, macs - saved.macs, size - saved.size
            if kv is not None:
                kv -= saved.kv or 0
        return replace(before, params=params, macs=macs, size=size, kv=kv)

    def of_site(self, site: Site, width: int, unit: str) -> float:
        """What one site costs at a width: MACs or numbers of the KV cache for such a target, else parameters."""
        saved = self._saved_alone(site, width)
        if unit == "kv":
            return site.cached_each * width
        if unit == "macs":
            return site.macs - saved.macs
        return site.params - saved.params

    def _saved_alone(self, site: Site, width: int) -> Cost:
        """Parameters, MACs, bytes and bytes of the KV cache that this width alone saves."""
        key = (site.name, width)
        if key not in self._alone:
            saved = Cost(0, 0, 0)
            if width != site.width:
                entry = stand_in(site, width)
                step = Step(entry, form_of(entry))
                params, macs = site.params - step.form.params, site.macs - step.form.macs
                added = self._added(site, width)
                size = size_saved(step, self.dense) - added.size
                saved = Cost(params - added.params, macs, size, kv=kv_saved(step, self.dense))
            self._alone[key] = saved
        return self._alone[key]

    def _added(self, site: Site, width: int) -> Cost:
        """The biases that a fit gives to convolutions which have none."""
        if width in (0, site.width):
            return Cost(0, 0, 0)
        readers = list(site.consumers)
        if is_coupled(site):
            readers = [reader.map for reader in readers_of(self.dense, site)]
        params = size = 0
        for m in readers:
            if m.kind == "conv2d" and not m.bias:
                params += m.d_out
                size += m.d_out * weight_of(self.dense.get_submodule(m.name)).element_size()
        return Cost(params, 0, size)

    @cached_property
    def _overlapping(self) -> bool:
        """Whether sites share a layer, as consumer of one and producer of another: then their savings do not add up."""
        return len(overlapping(self.sites)) < len(self.sites) or any(map(is_coupled, self.sites))


class Times:
    """Seconds of the model, by the widths of its sites: predicted from the sites' latencies, or measured.

    Attributes:
        dense: the model as it is.
        sites: that may be squeezed.
        inputs: what is timed, on the model's device.
        options: which widths may be asked for.
        trust: part of the time saved by single sites that the whole model saves, as far as it was measured.
    """

    def __init__(self, dense: nn.Module, sites: Sites, inputs: Inputs, options: SqueezeOptions) -> None:
        self.dense = dense
        self.sites = sites
        self.inputs = inputs
        self.options = options
        self.trust = 1.0

    @cached_property
    def before(self) -> float:
        """Of the model as it is."""
        models = {"dense": self.dense}
        return compare(models, self.inputs, rounds=_TIMING_ROUNDS, seconds=_TIMING_SECONDS / 2)["dense"].latency

    @cached_property
    def latencies(self) -> dict[str, Latency]:
        """Of the sites, as parts of the whole model's."""
        merged = [site.name for site in self.sites if self.options.collapse and may_collapse(site)]
        return site_latencies(self.dense, self.sites, self.inputs, round_to=self.options.round_to, collapse=merged)

    def predicted(self, widths: SiteWidths) -> float:
        """Of the model with its sites at these widths, if it saves what they save one by one."""
        saved = 0.0
        for site in self.sites:
            latency = self.latencies[site.name]
            saved += latency.part - latency.at(widths[site.name])
        return self.before * (1 - saved)

    def expected(self, widths: SiteWidths) -> float:
        """The same, corrected by what was measured so far."""
        return self.before - self.trust * (self.before - self.predicted(widths))

    def measured(self, widths: SiteWidths) -> float:
        """Of the model with its sites at these widths, timed in turns with the dense model."""
        small = narrowed_copy(self.dense, self.sites, widths, paths=self.options.linear_path)
        models = {"dense": self.dense, "small": small}
        found = compare(models, self.inputs, rounds=_TIMING_ROUNDS, seconds=_TIMING_SECONDS)["small"]
        # the spread of a median falls with the root of the number of rounds
        wanted = round((found.ratio_spread / found.ratio / _PRECISION) ** 2)
        affordable = round(_TIMING_SECONDS / (2 * max(self.before, _ROUND_SECONDS)))
        rounds = min(wanted, affordable)
        if rounds > _TIMING_ROUNDS:
            found = compare(models, self.inputs, rounds=rounds)["small"]
        return found.ratio * self.before

    def learn(self, widths: SiteWidths, seconds: float) -> None:
        """Correct what is expected by a measurement at these widths."""
        ratio = (self.before - seconds) / (self.before - self.predicted(widths))
        # a little less than was saved, so that the next widths are rather too small than too large
        self.trust = 0.99 * min(max(ratio, _TRUST[0]), _TRUST[1])

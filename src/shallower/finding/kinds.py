"""From a model to its sites, of the kinds that are asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal, get_args

from torch import nn

from shallower.core.inputs import Inputs, arguments_in
from shallower.core.text import listing
from shallower.errors import SiteError
from shallower.finding.branches.describing import branches_of
from shallower.finding.channels import rules as rules  # registers them
from shallower.finding.channels.following import Following
from shallower.finding.channels.standing_in import like_twins
from shallower.finding.channels.trials.trying import that_follow
from shallower.finding.linear.describing import Describer
from shallower.modules.offloading import with_mapped_weights
from shallower.recording.tracing import Trace, trace_forward
from shallower.sites import Site, Sites

SiteKind = Literal["hidden", "heads", "stream", "experts", "activation", "branch"]
"""What to look for:

hidden      channels between linear maps: feed-forward, gated, classifier, convolution, and all others that are followed
            through whatever stands between (squeeze and excitation, concatenation, reshapes)
heads       attention heads, or key-value groups with their query heads
stream      the coupled channels of a stage: what its blocks read and add to; for keep and drop only
experts     the experts of a mixture, of which a router chooses; for keep and drop only
activation  activations without a width of their own, which can only become linear
branch      F of x + F(x), attention or a feed-forward part for instance, and whole layers; dropped as one part
"""

KINDS: tuple[SiteKind, ...] = get_args(SiteKind)


def find_sites(
    model: nn.Module, example_inputs: Inputs, *, kinds: Collection[SiteKind] | SiteKind | Literal["all"] = "hidden"
) -> Sites:
    """The sites of `model`, and what looked like one but cannot be used, from one forward pass.

        sites = sh.find_sites(model, {"input_ids": ids, "attention_mask": mask})
        print(sites)
        everything = sh.find_sites(model, images, kinds="all")

    The model is run once, in eval mode and without gradients, and is left as it was; a few times more, without data,
    where numbers that it holds (how many heads) have to fall with the channels. Models on the meta device or made of
    fake tensors are run without data, those that Accelerate has offloaded with their weights mapped from files.

    Args:
        model: any module that runs in eager mode.
        example_inputs: what it is called with: a tensor, a tuple of positional or a dict of keyword arguments.
        kinds: some of `SiteKind`, one of them, or "all".

    Raises:
        SiteError: `model` is not a module with parameters, or does not run on these inputs, or there is no such kind.
    """
    wanted = _wanted(kinds)
    model = with_mapped_weights(model)
    followed = Following(trace_forward(model, example_inputs))
    described = Describer(followed)
    sites = described.sites(places="activation" in wanted)
    sites = _with_followed(model, example_inputs, followed, described, sites, wanted)
    if "branch" in wanted:
        sites = _with_branches(followed.trace, sites)
    chosen = sites.select(lambda site: site.followed or _kind_of(site) in wanted)
    return replace(chosen, arguments=arguments_in(example_inputs))


def _kind_of(site: Site) -> SiteKind:
    """Which of the kinds to look for a site is that was not followed."""
    if site.kind in ("activation", "branch"):
        return site.kind
    return "hidden"


def kinds_of(text: str) -> Collection[SiteKind]:
    """Kinds from a text such as "hidden,stream".

    Raises:
        SiteError: there is no such kind.
    """
    chosen = _wanted("all" if text == "all" else text.replace(" ", "").split(","))
    return [kind for kind in KINDS if kind in chosen]


def _wanted(kinds: Collection[str] | str) -> set[str]:
    if kinds == "all":
        return set(KINDS)
    if isinstance(kinds, str):
        kinds = [kinds]
    if not isinstance(kinds, Collection):
        raise SiteError(f'kinds are some of {listing(list(KINDS))}, or "all", not a {type(kinds).__name__}')
    chosen = set(kinds)
    unknown = sorted(map(str, chosen - set(KINDS)))
    if unknown:
        raise SiteError(f'there is no kind of site {unknown[0]!r:.80}; kinds are {listing(list(KINDS))}, or "all"')
    return chosen


def _with_followed(
    model: nn.Module, inputs: Inputs, f: Following, described: Describer, sites: Sites, wanted: set[str]
) -> Sites:
    """The sites and, between them, those whose channels were followed through whatever stands between linear maps.

    Why such channels may not become linear is said at their site, and is no reason not to keep and drop them.
    """
    asked = wanted & {"hidden", "heads", "stream", "experts"}
    if not asked:
        return sites
    kept, unfit, reasons = that_follow(model, inputs, f, tuple(sites), asked)
    found, refused = like_twins(f, sites, kept, unfit)
    reached = {slot.module for site in found for slot in site.slots if slot.side == "rows"}
    skipped = dict(sites.skipped)
    for name, reason in {**reasons, **refused}.items():
        if name in skipped:
            reason = f"{skipped[name]}; nor can its channels be cut: {reason}"
        skipped[name] = reason
    for name in list(skipped):
        # the name is that of a layer, or of what holds it and those that read it
        inside = [layer for layer in reached if layer.startswith(f"{name}.")]
        if name in reached or any(described.not_linear.get(layer) == sites.skipped.get(name, "") for layer in inside):
            del skipped[name]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    everything = [*sites, *(_with_reason(site, described.not_linear) for site in found)]
    everything.sort(key=lambda site: order.get(_first_layer(site), 0))
    return replace(sites, ordered=tuple(everything), skipped=skipped)


def _with_branches(trace: Trace, sites: Sites) -> Sites:
    """The sites, and behind them the branches and layers."""
    found, reasons = branches_of(trace)
    return sites.only([*sites, *found.values()], reasons)


def _with_reason(site: Site, reasons: Mapping[str, str]) -> Site:
    """A hidden site with the reason why its channels may not become linear, where one of the layers has one."""
    if site.kind != "hidden":
        return site
    for slot in site.slots:
        name = slot.module
        while slot.side == "rows" and name:
            if name in reasons:
                return replace(site, not_linear=reasons[name])
            name = name.rpartition(".")[0]
    return site


def _first_layer(site: Site) -> str:
    if site.slots:
        return site.name.partition(":")[0]
    if site.maps:
        return site.maps[0].name
    return site.activation.module if site.activation is not None else ""

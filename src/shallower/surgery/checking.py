"""Does a plan fit a model: the same layers, of the same sizes, with the same weights."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from shallower.errors import PlanError
from shallower.modules.layers import check_shape, check_tensor
from shallower.modules.site_parts import fingerprint, parts_of
from shallower.planning.plan import Plan
from shallower.sites import Site


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Check that the plan was made for this model.

    Args:
        model: perhaps with a method attached.
        plan: for this model.

    Raises:
        PlanError: a layer is missing, or of another kind or size, or the plan depends on weights and was made for
            others.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"a plan is applied to a torch.nn.Module, not to a {type(model).__name__}")
    if not isinstance(plan, Plan):
        raise PlanError(f"what is applied is a Plan, not a {type(plan).__name__}; Plan.load reads one from its folder")
    names = dict(model.named_modules())
    for entry in plan.entries:
        site = entry.site
        parts = parts_of(model, [site])
        for m in site.maps:
            check_shape(site.name, parts[m.name], m)
        for slot in site.slots:
            check_tensor(site.name, parts[slot.module], slot)
        for call in (*site.averages, *site.choices):
            _check_held(site, call.module, names)
        for listed in site.lists:
            _check_held(site, listed.module, names)
            if len(list(model.get_submodule(listed.module).children())) != site.width:
                raise PlanError(f"{site.name}: `{listed.module}` has not {site.width} entries")
        for follower in site.followers:
            _check_held(site, follower.module, names)
            if (
                follower.written is None
                and type(vars(model.get_submodule(follower.module)).get(follower.attribute)) is not int
            ):
                raise PlanError(f"{site.name}: `{follower.module}` has no whole number {follower.attribute!r:.80}")
    if plan.fingerprint:
        found = fingerprint(model, plan.sites)
        if found and found != plan.fingerprint:
            raise PlanError(
                "the plan was made for other weights than the model has at these sites (their fingerprints differ). "
                "Load the weights it was made for, or make the plan again"
            )


def _check_held(site: Site, name: str, names: Container[str]) -> None:
    if name not in names:
        raise PlanError(f"{site.name}: the model has no module `{name}`, which belongs to the site")

"""Does a plan fit a model: the same layers, of the same sizes, with the same weights."""

from __future__ import annotations

from torch import nn

from shallower.errors import PlanError
from shallower.modules.layers import check_shape
from shallower.planning.fingerprints import fingerprint
from shallower.planning.plan import Plan


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Check that the plan was made for this model.

    Args:
        model: with nothing attached to it.
        plan: to be applied to it.

    Raises:
        PlanError: a layer is missing, or of another kind or size, or the plan depends on weights and was made for
            others.
    """
    for entry in plan.entries:
        site = entry.site
        names = [place.module for place in (site.activation, *site.dropouts) if place is not None]
        for name in [*names, *(m.name for m in site.maps), site.norm_before, site.norm_after]:
            try:
                model.get_submodule(name)
            except AttributeError:
                raise PlanError(
                    f"{site.name}: the model has no module `{name}`. Is this the model that the plan was made for?"
                ) from None
        for m in site.maps:
            check_shape(site.name, model.get_submodule(m.name), m)
    if plan.fingerprint:
        found = fingerprint(model, [entry.site for entry in plan.entries])
        if found and found != plan.fingerprint:
            raise PlanError(
                "the plan was made for other weights than the model has at these sites (their fingerprints differ). "
                "Load the weights it was made for, or make the plan again"
            )

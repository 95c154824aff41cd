"""What every method has in common: it is attached to a model, trained or not, and returns a plan.

method = sh.LayerCollapse(model, sites)
optimizer = AdamW(method.param_groups(weight_decay=0.01))
method.follow(optimizer)
for batch in loader:
    method.before_step()
    loss = method.loss(lambda: task_loss(model, batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step()
plan = method.plan()
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from shallower.errors import MethodError, PlanError, ShallowerError
from shallower.modules import attachment
from shallower.modules.layers import check_shape
from shallower.modules.site_parts import fingerprint
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Place, Site, Sites
from shallower.training.trainable import Trainable


class Method(Trainable):
    """A way to decide what happens to the channels of a model's sites.

        class LargestRows(sh.Method):
            def plan(self):
                return sh.Plan([sh.Entry.narrow(site, range(site.width // 2)) for site in self.sites])

    Everything but `plan` is neutral unless a subclass needs it. What a method adds to the model is in the model's
    `state_dict`, so that a checkpoint of the model resumes the method too.

    Args:
        model: the model; methods may attach modules to it, until `detach`.
        sites: the sites to decide on, as `find_sites` returns them, or a selection.

    Raises:
        MethodError: the sites were found in another model.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        check_sites(model, sites)
        super().__init__(model)
        self.sites = sites

    def plan(self) -> Plan:
        """The fates that the method has decided on; the model is not changed.

        Raises:
            MethodError: the method decides nothing.
        """
        raise MethodError(f"{type(self).__name__} decides nothing: it does not override plan()")

    def fit(self, *_args: Any, **_options: Any) -> Any:
        """Train in the rounds that the method prescribes.

        Raises:
            MethodError: the method has no rounds of its own.
        """
        raise MethodError(
            f"{type(self).__name__} has no rounds of its own: train with shallower.train(..., method=method)"
        )

    def detach(self) -> None:
        """Remove what the method added to the model; the trained weights stay as they are."""
        self.unfollow()
        attachment.detach(self.model)


def linearisable(sites: Sites) -> Sites:
    """Those sites that may become linear; the reasons of the others go to `skipped`.

    Raises:
        MethodError: there is none.
    """
    return sites.usable(lambda site: site.bridge.not_linear, "there is no site that may become linear", MethodError)


def detach_from(model: nn.Module, sites: Iterable[Site], names: Collection[str]) -> None:
    """Put back the activations of those sites that have these names.

    detach_from(model, sites, method.activations)
    """
    attachment.detach(model, [activation_of(site) for site in sites if site.name in names])


def bound_plan(model: nn.Module, entries: Iterable[Entry], method: str) -> Plan:
    """A plan that holds for the weights as they are now.

    bound_plan(model, entries, "layer-collapse")
    """
    made = tuple(entries)
    return Plan(made, fingerprint(model, [entry.site for entry in made]), method)


def activation_of(site: Site) -> Place:
    """Where a site's activation is.

    Raises:
        MethodError: the site has none.
    """
    if site.activation is None:
        raise MethodError(f"{site.name}: it has no activation")
    return site.activation


def check_sites(model: nn.Module, sites: Iterable[Site], error: type[ShallowerError] = MethodError) -> None:
    """Refuse sites that were found in another model.

        check_sites(model, sites)

    Raises:
        ShallowerError: (of the kind `error`) a layer of a site is missing, or is of another kind or size.
    """
    for site in sites:
        try:
            if site.activation is not None:
                model.get_submodule(site.activation.module)
            for m in site.maps:
                check_shape(site.name, model.get_submodule(m.name), m)
        except (AttributeError, PlanError) as wrong:
            raise error(
                f"{site.name}: the sites were found in another model, or before this one was changed ({wrong}). Find "
                "them again, find_sites(model, example_inputs)"
            ) from None

"""Which sites a stock class of Transformers can load with another width.

    sites = only_expressible(model, sites)      # the others are left as they are, with a warning that names them

Found by trying, without weights: all sites are narrowed, the config follows, the stock class is built from it, and the
sites are left out whose layers have other sizes there. A pooler as wide as the model, for example, has no number of its
own in the config.
"""

from __future__ import annotations

import warnings

from torch import nn

from shallower.core.text import listing
from shallower.methods.squeezing.latencies import stand_in
from shallower.modules.attachment import detached_copy
from shallower.modules.offloading import weightless
from shallower.planning.forms import steps
from shallower.saving.stock.solving import Structure
from shallower.sites import Sites
from shallower.surgery.configs import follow, owners
from shallower.surgery.operating import operate

_REASON = "the config does not express its width as a number of its own"


class UniformWarning(UserWarning):
    """Sites keep their width, or no stock class can load the result, though equal widths were asked for."""


def only_expressible(model: nn.Module, sites: Sites) -> Sites:
    """The sites whose width the model's config expresses, so that its stock class loads the result; or all sites.

    All, where the model has no part of Transformers; and with a warning, where the config expresses none of them.

    Warns:
        UniformWarning: sites are left out, or the stock class will not load the result.
    """
    chosen, left = sites, dict[str, str]()
    while chosen and (found := _inexpressible(model, chosen)):
        left |= dict.fromkeys(found, _REASON)
        chosen = sites.only(site for site in sites if site.name not in left)
    if not left:
        return sites
    if not chosen:
        warnings.warn(
            f"no stock class will load the result, but `load` of this library will: {_REASON.replace('its', 'the')} "
            f"at {listing(left, 4)}",
            UniformWarning,
            stacklevel=4,
        )
        return sites
    warnings.warn(
        f"these sites keep their width, so that the stock class loads the result: {listing(left, 4)} ({_REASON}). "
        "Without uniform=True they are squeezed too",
        UniformWarning,
        stacklevel=4,
    )
    return chosen.only(chosen, left)


def _inexpressible(model: nn.Module, sites: Sites) -> set[str]:
    """Names of sites that have another size in the stock class than after surgery, if all of these are narrowed."""
    trial = detached_copy(model, weightless([*model.parameters(), *model.buffers()]))
    todo = steps([stand_in(site, site.width // 2) for site in sites if site.width > 1])
    for step in todo:
        operate(trial, step)
    follow(trial)
    wrong: set[str] = set()
    for owner in owners(trial):
        stock = owner.built(owner.config.to_dict())
        if stock is None:
            continue  # a class that cannot be built without weights is not judged
        prefix = f"{owner.name}." * (owner.name != "")
        differing = {prefix + name for name, _ in stock.gaps(Structure.of(owner.model))}
        wrong.update(site.name for site in sites if any(f"{m.name}.weight" in differing for m in site.maps))
    return wrong

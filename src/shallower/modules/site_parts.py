"""The modules that a site consists of, and a hash of all their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from torch import nn

from shallower.core.tensors import content, has_no_numbers
from shallower.errors import PlanError
from shallower.modules import attachment
from shallower.sites import Site


def parts_of(model: nn.Module, sites: Iterable[Site]) -> dict[str, nn.Module]:
    """Every module that some sites consist of, by name: maps, BatchNorms, activations, dropouts.

        parts = parts_of(model, [site])
        parts["encoder.layer.0.intermediate.dense"]

    Where a method is attached, the module is the one that it took the place of.

    Raises:
        PlanError: the model has no such module.
    """
    replaced = dict(attachment.originals(model))
    parts: dict[str, nn.Module] = {}
    for site in sites:
        for name in _module_names(site):
            if name not in parts:
                parts[name] = replaced[name] if name in replaced else _found(model, site, name)
    return parts


def fingerprint(model: nn.Module, sites: Iterable[Site]) -> str:
    """SHA-256 over every tensor of some sites, independent of their order and device.

        sh.Plan(entries, fingerprint(model, [entry.site for entry in entries]))

    Returns:
        64 hexadecimal digits; "" where a tensor has no numbers (a meta or fake tensor).
    """
    digest = hashlib.sha256()
    for name, module in sorted(parts_of(model, sites).items()):
        for key, tensor in sorted(module.state_dict().items()):
            if has_no_numbers(tensor):
                return ""
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(content(tensor))
    return digest.hexdigest()


def _module_names(site: Site) -> Iterator[str]:
    """Dotted names of a site's modules."""
    for place in (*site.bridge.activations, *site.dropouts):
        yield from place.modules
    for m in site.maps:
        yield m.name
    yield from site.bridge.norms
    for slot in site.slots:
        yield slot.module
    for listed in site.lists:
        yield listed.module
    if site.branch is not None:
        for gone in site.branch.emptied:
            yield gone.module
    if site.residual is not None and site.residual.norm:
        yield site.residual.norm


def _found(model: nn.Module, site: Site, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise PlanError(
            f"{site.name}: the model has no module `{name}`. Is this the model that the plan was made for?"
        ) from None

"""A hash that tells whether two models have the same weights at some sites."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import nn

from shallower.core.tensors import content, has_no_numbers
from shallower.sites import Site


def fingerprint(model: nn.Module, sites: Iterable[Site]) -> str:
    """SHA-256 over the weights, biases and BatchNorm vectors of these sites, independent of their order and device.

    Returns:
        64 hexadecimal digits; "" where a weight has no numbers (a meta or fake tensor).
    """
    names = {m.name for site in sites for m in site.maps}
    names |= {norm for site in sites for norm in (site.norm_before, site.norm_after) if norm}
    digest = hashlib.sha256()
    for name in sorted(names):
        for key, tensor in sorted(model.get_submodule(name).state_dict().items()):
            if has_no_numbers(tensor):
                return ""
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(content(tensor))
    return digest.hexdigest()

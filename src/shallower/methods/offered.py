"""Which methods use which sites.

offered(sites)["layer1.0"]      # ("squeeze", "layer-collapse", "tlc", "structural-dropout")
"""

from __future__ import annotations

from shallower.methods.dropout.prefix import not_computed
from shallower.methods.squeezing.coupled.readers import not_squeezed
from shallower.planning.paying import paying
from shallower.sites import Sites

OFFERED = ("squeeze", "layer-collapse", "tlc", "structural-dropout")
LETTERS = "SLTD"
LEGEND = "methods: S squeeze, L layer-collapse, T tlc, D structural-dropout, - by hand (Entry.narrow, Entry.drop)"


def offered(sites: Sites) -> dict[str, tuple[str, ...]]:
    """For each site, by name, the methods that use it; none where only a plan by hand can narrow or drop it.

    Layer collapse uses those that get cheaper, and of sites that share a layer one plan may have to leave some out.
    """
    cheaper = {site.name for site in paying(sites)[0]}
    found: dict[str, tuple[str, ...]] = {}
    for site in sites:
        uses = (
            not_squeezed(site) is None,
            site.name in cheaper,
            site.bridge.not_linear is None,
            site.width > 1 and not_computed(site) is None,
        )
        found[site.name] = tuple(name for name, used in zip(OFFERED, uses, strict=True) if used)
    return found


def lettered(sites: Sites) -> dict[str, str]:
    """The same as letters: "SLTD"."""
    found: dict[str, str] = {}
    for name, methods in offered(sites).items():
        found[name] = "".join(LETTERS[OFFERED.index(method)] for method in methods)
    return found

"""The sites of a model: a sequence that is also reached by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from textwrap import wrap
from typing import overload

from shallower.core.text import amount, listing
from shallower.errors import Refusal, ShallowerError, SiteError
from shallower.sites.showing import params_of_halves, table_of_sites
from shallower.sites.site import Site


@dataclass(frozen=True, repr=False)
class Sites(Sequence[Site]):
    """The sites of a model, in order of execution, and what looked like one but is not usable.

        sites = sh.find_sites(model, example_inputs)
        print(sites)
        sites["encoder.layer.3"]; sites[0]; sites[2:]; len(sites); [site.width for site in sites]
        sites.select("encoder.layer.*")
        sites.skipped["pooler"]             # the reason

    Attributes:
        ordered: the sites.
        skipped: name -> reason.
        params: parameters of the whole model.
        macs: MACs of the whole model on the example inputs.
        arguments: how many arguments the model was found with; 0 where that is not known.
        kv: bytes for each token of the KV cache that the model returned; None where it returned none.
    """

    ordered: tuple[Site, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    params: int = 0
    macs: int = 0
    arguments: int = 0
    kv: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ordered", tuple(self.ordered))

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names."""
        return tuple(site.name for site in self.ordered)

    def __len__(self) -> int:
        return len(self.ordered)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.ordered)

    @overload
    def __getitem__(self, key: str | int) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> Sites: ...
    def __getitem__(self, key: str | int | slice) -> Site | Sites:
        """The site of that name or position, or a slice of them.

        Raises:
            SiteError: there is no such site.
        """
        if isinstance(key, slice):
            return self.only(self.ordered[key])
        if isinstance(key, int):
            try:
                return self.ordered[key]
            except IndexError:
                raise SiteError(f"there is no site number {key}; the model has {len(self)}") from None
        for site in self.ordered:
            if site.name == key:
                return site
        # an error that says why is worth more than one that lists the others
        if key in self.skipped:
            raise SiteError(f"{key}: skipped when the sites were found: {self.skipped[key]}")
        raise SiteError(f"there is no site {key!r}; the sites are {listing(list(self.names))}")

    def __contains__(self, key: object) -> bool:
        return any(key is site or key == site.name for site in self.ordered)

    def select(self, which: str | Callable[[Site], bool]) -> Sites:
        """The subset whose names match a glob pattern, or for which a predicate holds, in the same order.

        sites.select("encoder.layer.*")
        sites.select(lambda site: site.kind == "gated")
        """
        if isinstance(which, str):
            return self.only(site for site in self.ordered if fnmatchcase(site.name, which))
        return self.only(filter(which, self.ordered))

    def only(self, chosen: Iterable[Site], skipped: Mapping[str, str] | None = None) -> Sites:
        """These sites in this order, with what is known of the model; further reasons go to `skipped`."""
        return dataclasses.replace(self, ordered=tuple(chosen), skipped={**self.skipped, **(skipped or {})})

    def partition(self, refusal: Callable[[Site], Refusal | None]) -> tuple[Sites, dict[str, str]]:
        """The sites that a method can use, and name -> reason for the others.

            usable, refused = sites.partition(lambda site: site.bridge.not_linear)

        Args:
            refusal: None for a site that can be used, else why not.
        """
        usable: list[Site] = []
        refused: dict[str, str] = {}
        for site in self.ordered:
            reason = refusal(site)
            if reason is None:
                usable.append(site)
            else:
                refused[site.name] = str(reason)
        return self.only(usable), refused

    def usable(
        self, refusal: Callable[[Site], Refusal | None], nothing: str, error: type[ShallowerError] = SiteError
    ) -> Sites:
        """The sites that a method can use; the reasons of the others go to `skipped`.

            sites.usable(lambda site: site.bridge.not_linear, "no site may become linear", sh.MethodError)

        Args:
            refusal: None for a site that can be used, else why not.
            nothing: what to say where none can be used.
            error: what to raise then.

        Raises:
            ShallowerError: (of the kind `error`) no site can be used; it names the first reasons.
        """
        usable, refused = self.partition(refusal)
        if not usable:
            reasons = [f"{name}: {reason}" for name, reason in {**refused, **self.skipped}.items()]
            if reasons:
                nothing = f"{nothing}: {'; '.join(reasons[:4])}"
            raise error(nothing)
        return usable.only(usable, refused)

    def apart(self) -> Sites:
        """Those that one plan can change, whatever is fitted in it; the reasons of the others go to `skipped`.

            sites.apart()

        A layer that is fitted for one site is not cut for another in the same plan: of sites that are cut wherever
        their channels stand, those are left out that share a layer with one before them, or with one that has layers
        by name.
        """
        holding: dict[str, str] = {}
        for site in self.ordered:
            if not site.followed:
                holding |= dict.fromkeys(site.layers, site.name)
        left: dict[str, str] = {}
        chosen: list[Site] = []
        for site in self.ordered:
            others = holding.keys() & site.layers
            if site.followed and others:
                other = holding[min(others)]
                left[site.name] = f"it shares a layer with {other}; narrow it by itself, before or after"
                continue
            chosen.append(site)
            holding |= dict.fromkeys(site.layers, site.name)
        return self.only(chosen, left)

    @property
    def params_held(self) -> int:
        """Parameters of all layers that some site can make smaller or take away, each counted once."""
        gone = [f"{name}." for site in self.ordered if site.branch is not None for name in site.layers]

        def goes(name: str, itself: bool = True) -> bool:
            """Whether a module is in a branch, or, where `itself` is false, in a larger one."""
            return any(f"{name}.".startswith(prefix) and (itself or f"{name}." != prefix) for prefix in gone)

        held: dict[str, int] = {}
        for site in self.ordered:
            for m in site.maps:
                held[m.name] = m.params * (not goes(m.name))
        followed: dict[str, int] = {}
        for site in self.ordered:
            if site.branch is not None and not goes(site.layers[0], itself=False):
                followed[site.name] = site.branch.params
            for slot in site.tensors.values():
                if slot.trained and slot.module not in held and not goes(slot.module):
                    followed[slot.tensor] = prod(slot.shape)
        return sum(held.values()) + sum(followed.values())

    def __str__(self) -> str:
        """A table: site, kind, activation, width, what its channels may become, params and MACs.

        Then how much of the model the sites' layers hold and would keep, why followed channels may not become linear,
        and what was skipped.
        """
        return self.described()

    __repr__ = __str__

    def described(self, methods: Mapping[str, str] | None = None, legend: str = "") -> str:
        """The same, with letters for the methods that use each site, by its name, and what they mean."""
        lines = [f"{len(self)} sites; the model has {amount(self.params)} params and {amount(self.macs)} MACs"]
        if self.ordered:
            lines.append(table_of_sites(self, methods))
            if legend:
                lines.append(legend)
            share = self.params_held / max(1, self.params)
            lines.append(f"their layers hold {amount(self.params_held)} params ({share:.0%})")
            left = params_of_halves(self, self.params)
            if left < self.params:
                lines[-1] += f"; with half of every width {amount(left)} params remain ({left / self.params:.0%})"
        lines += _by_reason("not linear:", {s.name: s.not_linear for s in self.ordered if s.followed and s.not_linear})
        lines += _by_reason("skipped:", self.skipped)
        return "\n".join(lines)


def _by_reason(title: str, reasons: Mapping[str, str]) -> list[str]:
    """Reasons under a title, each once with the names that it is of."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines: list[str] = []
    for reason, own in names.items():
        lines += [f"  {name}: {reason}" for name in own] if len(own) < 3 else [f"  {reason}:"]
        if len(own) > 2:
            lines += wrap(" ".join(own), 96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return [title, *lines] if lines else []


def overlapping(sites: Iterable[Site]) -> list[list[Site]]:
    """The sites in groups that share no layer, each in the order given.

    Union-find over the names of layers: near-linear in the number of layers.
    """
    given = list(sites)
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            # halving the path keeps the trees flat
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    keys: list[str] = []
    for i, site in enumerate(given):
        key = f"\0{i}"  # stands for a site without layers too
        parent[key] = key
        for m in site.maps:
            parent.setdefault(m.name, m.name)
            parent[root(m.name)] = root(key)
        keys.append(key)
    groups: dict[str, list[Site]] = {}
    for key, site in zip(keys, given, strict=True):
        groups.setdefault(root(key), []).append(site)
    return list(groups.values())

"""The widths of networks as their sources show them, and as they are found: no width missing, none besides.

Each file of `expected/` is one family of `benchmarks.families`, written by hand from the classes that it names:

    [[space]]                           channels that have to be cut together
    kind = "hidden"                     or "heads", "stream", "experts"
    width = 37                          parts that can go one by one: channels, heads, experts
    each = "encoder.layer.*"            one space for each of these modules, "@" below
    axes = '''
    @.intermediate.dense.*[0]           the axes of parameters and buffers; "*" is any one name, {a,b} is a or b
    @.output.dense.weight[1]
    '''

`each` may also be a list of tables, of which each gives a space where <key> stands for the value. `lists` are lists of
modules whose entries the parts are. [[out_of_reach]] is a width that the source shows and that is refused, with the
reason. What heads are made of is no width of its own.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shallower as sh
from benchmarks.families import Family, Headed, families
from shallower.finding.kinds import SiteKind
from shallower.modules.layers import is_conv1d
from shallower.saving.vision import import_torchvision
from shallower.sites import Site

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILES = sorted((Path(__file__).parent / "expected").glob("*.toml"))

WIDTHS: tuple[SiteKind, ...] = ("hidden", "heads", "stream", "experts", "activation")
Axis = tuple[str, int]
Space = tuple[str, int, frozenset[Axis]]


@pytest.fixture(scope="module")
def known() -> dict[str, Family]:
    import_torchvision()
    return {family.name: family for family in families()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_widths_are_those_of_the_source(file: Path, known: dict[str, Family]) -> None:
    data = tomllib.loads(file.read_text())
    model, inputs = known[data["family"]].build()
    names = _Names(model)
    expected = Counter(_expected(data["space"], names))
    refused = Counter(_expected(data.get("out_of_reach", []), names))
    found = Counter(_found(sh.find_sites(model, inputs, kinds=WIDTHS), names))
    said = _differences("missing", expected - found)
    said += _differences("reached, though out of reach", found & refused)
    said += _differences("not expected", found - expected - refused)
    assert not said, "\n".join(said)


def test_what_is_out_of_reach_says_why() -> None:
    for file in FILES:
        for space in tomllib.loads(file.read_text()).get("out_of_reach", []):
            assert len(space["reason"]) > 20, file.stem


class _Names:
    """The tensors and modules of a network, by their names in its own class.

    A tensor with several names is known by the first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.prefix = "model." if isinstance(model, Headed) else ""
        self.modules = [self.short(name) for name, _ in model.named_modules()]
        self.tensors: dict[str, tuple[str, int]] = {}
        first: dict[int, str] = {}
        everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in everything:
            name = self.short(name)
            self.tensors[name] = first.setdefault(id(tensor), name), tensor.dim()

    def short(self, name: str) -> str:
        """A name without that of what the benchmark puts around the network."""
        return name.removeprefix(self.prefix)

    def axes(self, line: str) -> set[Axis]:
        """The axes that a line means: of every tensor of such a name that has so many dimensions."""
        pattern, _, axis = line.removesuffix("]").rpartition("[")
        names = [name for name in self.tensors if re.fullmatch(_regular(pattern), name)]
        found = {(self.tensors[name][0], int(axis)) for name in names if int(axis) < self.tensors[name][1]}
        assert found, f"there is no {line}"
        return found


def _regular(pattern: str) -> str:
    """The regular expression of a pattern in which "*" is any one name, or the rest of one, and {a,b} is a or b."""
    text = re.escape(pattern).replace(r"\*", "[^.]*")
    return text.replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")


def _expected(spaces: Iterable[Mapping[str, Any]], names: _Names) -> Iterator[Space]:
    """The spaces of a file."""
    for space in spaces:
        for turn in _turns(space.get("each", [{}]), names):
            axes: set[Axis] = set()
            for line in _filled(space.get("axes", ""), turn).split():
                axes |= names.axes(line)
            axes |= {(_filled(name, turn), -1) for name in space.get("lists", ())}
            yield space["kind"], int(_filled(str(space["width"]), turn)), frozenset(axes)


def _turns(each: str | list[dict[str, Any]], names: _Names) -> Iterable[Mapping[str, Any]]:
    """What stands for what, for each of the spaces."""
    if not isinstance(each, str):
        return [{f"<{key}>": value for key, value in turn.items()} for turn in each]
    modules = [name for name in names.modules if re.fullmatch(_regular(each), name)]
    assert modules, f"there is no {each}"
    return [{"@": name} for name in modules]


def _filled(text: str, turn: Mapping[str, Any]) -> str:
    for mark, value in turn.items():
        text = text.replace(mark, str(value))
    return text


def _found(sites: Iterable[Site], names: _Names) -> Iterator[Space]:
    """The spaces of the sites that channels can be taken from."""
    for site in sites:
        if site.bridge.not_narrow is None:
            axes = {(names.tensors[names.short(tensor)][0], axis) for tensor, axis in _axes(site, names.model)}
            axes |= {(names.short(listed.module), -1) for listed in site.lists}
            kind = site.kind if site.kind in ("heads", "stream", "experts") else "hidden"
            yield kind, site.width, frozenset(axes)


def _axes(site: Site, model: nn.Module) -> Iterator[Axis]:
    """Where the channels of a site stand."""
    if site.followed:
        for slot in site.slots:
            yield slot.tensor, slot.axis
        return
    held = [*site.bridge.norms]
    made = [m.name for m in (site.producer, site.gate, *site.bridge.depthwise) if m is not None]
    if site.activation_params > 1:
        held.append(site.activation_origin)
    for name in [*made, *held]:
        module = model.get_submodule(name)
        for attribute, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim():
                yield f"{name}.{attribute}", int(is_conv1d(module) and attribute == "weight")
    for m in site.consumers:
        yield f"{m.name}.weight", 1 - is_conv1d(model.get_submodule(m.name))


def _differences(what: str, spaces: Counter[Space]) -> list[str]:
    """Spaces, for people."""
    found: list[str] = []
    for kind, width, axes in spaces.elements():
        listed = " ".join(f"{name}[{axis}]" for name, axis in sorted(axes))
        found.append(f"{what}: {kind} of {width}: {listed}")
    return found

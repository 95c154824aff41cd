"""What can a network lose as a whole? A layer, a branch and a quarter of its stream, in all families of the zoo.

Each family of the zoo loses, one at a time, a layer (a module of a list whose output has the form of its input), a
branch in one (F of x + F(x)) and a quarter of its widest stream. Each result is proven, compared with the simulated
network on inputs of other shapes, saved and loaded; where a class of Transformers can say it, that loads it, too.

    python -m benchmarks zoo_branches                   # a row for each family; it goes on where it was stopped
    python -m benchmarks zoo_branches --family llama    # those whose names begin like this
    python -m benchmarks zoo_branches --quick           # a few families
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import shallower as sh
from benchmarks.families import Family, families
from benchmarks.families.axes import numbers
from benchmarks.record import markdown, write_json
from benchmarks.zoo import (
    LOADS,
    MOST_PARAMS,
    MOST_SECONDS,
    at_most,
    cell,
    commit,
    compared,
    digest,
    general,
    in_short,
    loaded_as_stock,
)
from shallower.core.inputs import Inputs
from shallower.errors import ShallowerError
from shallower.saving.vision import repair_torchvision

PARTS = ("layer", "branch", "stream")
QUICK = ("llama", "cifar_resnet", "hand_unet")


@dataclass
class Row:
    """What one family lost.

    Attributes:
        name, group: of the family.
        found: how many layers, branches and streams there are.
        lost: those of `PARTS` that went as simulated, each with the share of the parameters that went.
        refused: those that did not, each with the reason.
        foreign: those whose reason is no `ShallowerError`.
        stock: whether the class of Transformers loads the network without a layer: as in the zoo.
        error: what went wrong before anything was lost.
        planned: whether that is a `ShallowerError`.
        seconds: of the CPU.
    """

    name: str
    group: str
    found: dict[str, int] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    stock: str = ""
    error: str = ""
    planned: bool = False
    seconds: float = 0.0


def examined(family: Family) -> Row:
    """Everything that is measured of one family; errors are kept in the row."""
    row = Row(family.name, family.group)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with at_most(MOST_SECONDS):
                _examine(family, row)
        except Exception as error:  # one family must not end the others
            row.error = in_short(error)
            row.planned = isinstance(error, ShallowerError)
    row.seconds = time.process_time() - started
    return row


def _examine(family: Family, row: Row) -> None:
    model, inputs = family.build()
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMS:
        raise MemoryError("it is not tiny")
    sites = sh.find_sites(model, inputs, kinds=("branch", "stream"))
    for what, entry in chosen(sites, row).items():
        try:
            row.lost[what] = _without(family, model, inputs, entry, row)
        except Exception as error:
            row.refused[what] = in_short(error)
            if not isinstance(error, ShallowerError):
                row.foreign.append(what)


def chosen(sites: sh.Sites, row: Row) -> dict[str, sh.Entry]:
    """The largest layer, the first branch, and three quarters of the widest stream."""
    layers, branches, streams = [], [], []
    for site in sites:
        if site.branch is None:
            streams += [site] * (site.width >= 4)
        elif site.branch.layer:
            layers.append(site)
        else:
            branches.append(site)
    row.found = {"layer": len(layers), "branch": len(branches), "stream": len(streams)}
    entries: dict[str, sh.Entry] = {}
    if layers:
        entries["layer"] = sh.Entry.drop(max(layers, key=lambda site: site.params))
    if branches:
        # the first, on which most of what comes later depends
        entries["branch"] = sh.Entry.drop(branches[0])
    if streams:
        widest = max(streams, key=lambda site: (site.width, len(site.slots)))
        drawn = torch.randperm(widest.width, generator=torch.Generator().manual_seed(0))
        entries["stream"] = sh.Entry.narrow(widest, drawn[: widest.width - widest.width // 4].sort().values)
    return entries


def _without(family: Family, model: nn.Module, inputs: Inputs, entry: sh.Entry, row: Row) -> float:
    """The share of the parameters that goes with an entry, after everything was compared."""
    plan = sh.Plan((entry,))
    small = sh.apply(model, plan, inputs)
    compared(model, small, plan, inputs)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    if before - after != plan.params_saved:
        raise ArithmeticError(f"{before - after} parameters went, and the plan counts {plan.params_saved}")
    with tempfile.TemporaryDirectory() as folder:
        sh.save(small, Path(folder) / "out")
        again = sh.load(Path(folder) / "out", model=family.build()[0]).eval()
    with torch.no_grad():
        for here, there in zip(numbers(small, inputs), numbers(again, inputs), strict=True):
            if not torch.equal(here.nan_to_num(), there.nan_to_num()):
                raise ArithmeticError("the loaded network gives other numbers")
    if entry.site.branch is not None and entry.site.branch.layer:
        try:
            row.stock = loaded_as_stock(small, inputs)
        except ZeroDivisionError as error:  # the class of RWKV divides by the number of layers less one
            row.stock = in_short(error)
    return (before - after) / before


# --------------------------------------------------------------------------------------------------------- all of them


def run(data: Path, quick: bool, cache: Path, only: str = "") -> dict[str, Any]:
    """Examine every family, or those whose names begin with `only`; the rows of this code are kept in the cache."""
    del data
    repair_torchvision()
    listed = families()
    if only:
        listed = [family for family in listed if family.name.startswith(only)]
    elif quick:
        listed = [family for family in listed if family.name in QUICK]
    path = cache / f"rows-{digest()}.json"
    done: dict[str, Any] = {}
    if path.exists():
        done = json.loads(path.read_text())
    for family in tqdm(listed, "families", disable=None):
        if family.name not in done:
            row = examined(family)
            tqdm.write(line(row), sys.stderr)
            done[family.name] = asdict(row)
            write_json(path, done)
    return {"code": digest(), "commit": commit(), "rows": [done[family.name] for family in listed]}


def line(row: Row) -> str:
    """What one family lost, in a line."""
    lost = ", ".join(f"{what} ({100 * share:.0f} %)" for what, share in row.lost.items())
    why = "; ".join([*filter(None, [row.error]), *(f"{what}: {reason}" for what, reason in row.refused.items())])
    return f"{row.name}: {lost or 'nothing'}, {row.seconds:.1f} s{'; ' * bool(why)}{why}"


def table(found: Mapping[str, Any]) -> str:
    """A row for each group, and what was refused."""
    rows = [Row(**row) for row in found["rows"]]
    counted = [row for row in rows if row.found]
    measured = f"Measured at commit {found['commit']}." if found.get("commit") else ""
    if found.get("not_run"):
        measured += f" {found['not_run']} of the families were not run."
    return "\n\n".join(filter(None, [measured, _totals(counted), _refused(counted), _not_made(rows)]))


def _totals(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    lines = []
    for name, own in [*groups.items(), ("all", list(rows))]:
        cells = [name, str(len(own))]
        for what in PARTS:
            possible = sum(row.found[what] > 0 for row in own)
            cells.append(f"{sum(what in row.lost for row in own)} of {possible}")
        cells.append(str(sum(set(row.lost) == set(PARTS) for row in own)))
        cells.append(f"{sum(row.stock == LOADS for row in own)} of {sum(bool(row.stock) for row in own)}")
        cells.append(str(sum(len(row.foreign) for row in own)))
        lines.append(cells)
    header = ["families", "number", "lose a layer", "a branch", "a quarter of the stream", "all three"]
    return markdown([*header, "stock class loads it without the layer", "errors that are no `ShallowerError`"], lines)


def _refused(rows: Sequence[Row]) -> str:
    reasons: Counter[tuple[str, str]] = Counter()
    named: dict[tuple[str, str], str] = {}
    for row in rows:
        for what, reason in row.refused.items():
            key = (what, general(reason))
            reasons[key] += 1
            named.setdefault(key, row.name)
    if not reasons:
        return ""
    lines = [[what, str(count), named[what, why], cell(why)] for (what, why), count in reasons.most_common(20)]
    return "What was found and then refused, and why:\n\n" + markdown(["what", "families", "such as", "why"], lines)


def _not_made(rows: Sequence[Row]) -> str:
    missing = sum(not row.found for row in rows)
    if not missing:
        return ""
    return f"{missing} more could not be made tiny, or run on no inputs known here; they do not count."

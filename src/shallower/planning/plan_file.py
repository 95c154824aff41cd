"""Plans as files: plan.json says what happens where, plan.safetensors holds the numbers.

The reader trusts nothing: every key, type, bound, shape and hash is checked, and anything odd is a `PlanError`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from shallower.core.codec import Bounds, decode, encode
from shallower.core.files import read_json, read_tensors, write_json, write_tensors
from shallower.core.tensors import content
from shallower.errors import PlanError
from shallower.planning.entries import MOST_NOTE, Becomes, Entry, Family, Fate
from shallower.planning.fits import Fit
from shallower.sites import Site
from shallower.sites.parts import MOST_CHANNELS
from shallower.sites.slots import hold

SCHEMA = "shallower.plan"
VERSION = 7
_EARLIER = (1, 2, 3, 4, 5, 6)
"""The versions before, whose plans are read too: they had fewer fields."""

_MOST_PLAN_BYTES = 1 << 28
_MOST_ENTRIES = 20_000
_MOST_POSITIONS = 1 << 26
_MOST_SEEN = 1 << 20

_TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FateRun = tuple[Literal["keep", "linear", "drop"], Annotated[int, Bounds(1, MOST_CHANNELS)]]
"""A fate, and of how many channels in a row."""


@dataclass(frozen=True)
class Saves:
    """What a plan saves of the model, counted.

    Attributes:
        params, macs: how many fewer.
    """

    params: int
    macs: int


@dataclass(frozen=True, eq=False)
class Contents:
    """What the two files of a plan hold; `Plan` has the meaning of the fields."""

    entries: tuple[Entry, ...]
    fingerprint: str = ""
    method: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    saves: Saves = Saves(0, 0)
    seen: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Reference:
    """A tensor of plan.safetensors, by its name, with what it has to be."""

    tensor: Annotated[str, Bounds(1, 200)]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    shape: Annotated[tuple[int, ...], Bounds(0, 8)]
    sha256: Annotated[str, Bounds(64, 64)]


@dataclass(frozen=True, eq=False)
class StoredEntry:
    """An `Entry`, its fates as runs."""

    site: Site
    fates: tuple[FateRun, ...]
    slopes: Tensor
    offsets: Tensor
    alphas: Tensor | None = None
    family: Family = "blend"
    fit: Fit | None = None
    becomes: Becomes = ""
    fold_skip: bool = False
    note: Annotated[str, Bounds(0, MOST_NOTE)] = ""
    error: float | None = None


@dataclass(frozen=True, eq=False)
class StoredPlan:
    """The whole of plan.json."""

    schema: str
    version: int
    method: Annotated[str, Bounds(0, 1000)]
    fingerprint: Annotated[str, Bounds(0, 64)]
    saves: Saves
    entries: tuple[StoredEntry, ...]
    left_out: Mapping[Annotated[str, Bounds(0, 1000)], Annotated[str, Bounds(0, 2000)]] = field(default_factory=dict)
    seen: Annotated[tuple[Annotated[str, Bounds(16, 16)], ...], Bounds(0, _MOST_SEEN)] = ()


def to_json(contents: Contents) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A plan as plain data, and the tensors that it names."""
    tensors: dict[str, Tensor] = {}

    def write(tensor: Tensor, at: str) -> dict[str, Any]:
        name = at.removeprefix("entries.").replace(".fit.", ".")
        tensors[name] = tensor.detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"tensor": name, "dtype": dtype, "shape": list(tensor.shape), "sha256": _sha256(tensor)}

    stored = StoredPlan(
        SCHEMA,
        VERSION,
        contents.method,
        contents.fingerprint,
        contents.saves,
        tuple(map(_stored, contents.entries)),
        contents.left_out,
        contents.seen,
    )
    return encode(stored, special={Tensor: write}), tensors


def from_json(data: object, tensors: Mapping[str, Tensor]) -> Contents:
    """The plan that `to_json` described.

    Raises:
        PlanError: it is not the description of a plan, or a tensor is missing or another one.
    """
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        raise PlanError(f"this is not a plan: it is no object with the schema {SCHEMA!r}")
    if type(data.get("version")) is not int or data["version"] not in (*_EARLIER, VERSION):
        raise PlanError(
            f"the plan has version {data.get('version')!r:.20} of the format and this is version {VERSION}; "
            "read it with the release of Shallower that wrote it"
        )
    if data["version"] in _EARLIER:
        data = _renewed(data)
    entries = data.get("entries")
    if isinstance(entries, list) and len(entries) > _MOST_ENTRIES:
        raise PlanError(f"plan.entries: {len(entries)} entries are more than any model has sites ({_MOST_ENTRIES})")
    named: set[str] = set()

    def read(data: Any, at: str) -> Tensor:
        reference = decode(Reference, data, at=at, error=PlanError)
        named.add(reference.tensor)
        return _tensor(reference, tensors, at)

    stored = decode(StoredPlan, data, at="plan", error=PlanError, special={Tensor: read})
    if stored.fingerprint.strip("0123456789abcdef") or len(stored.fingerprint) not in (0, 64):
        raise PlanError("the plan's fingerprint is not a SHA-256 in hexadecimal digits")
    made = tuple(_entry(entry, f"plan.entries[{i}]") for i, entry in enumerate(stored.entries))
    if sum(slot.shape[slot.axis] for entry in made for slot in entry.site.slots) > _MOST_POSITIONS:
        raise PlanError("plan: the tensors that its sites name are too large together")
    if left := sorted(set(tensors) - named):
        raise PlanError(f"the plan does not name the tensor {left[0]!r}")
    return Contents(made, stored.fingerprint, stored.method, stored.left_out, stored.saves, stored.seen)


def _renewed(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """An earlier version's plan without the projections of attention heads, which it named for other sites as null.

    Raises:
        PlanError: it names some, or norms as modules.
    """
    data = copy.deepcopy(dict(data))
    entries = data.get("entries")
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        site = entry.get("site") if isinstance(entry, dict) else None
        if isinstance(site, dict) and site.pop("heads", None) is not None:
            raise PlanError(
                f"plan.entries[{i}]: attention heads are described otherwise since version {VERSION} of the format; "
                'find the sites again with kinds="heads" and make the plan anew'
            )
        norms = site.get("averages") if isinstance(site, dict) else None
        if isinstance(norms, list) and any(isinstance(norm, dict) and "function" not in norm for norm in norms):
            raise PlanError(
                f"plan.entries[{i}]: norms are described otherwise since version {VERSION} of the format; find the "
                "sites again and make the plan anew"
            )
    return data


def save_contents(contents: Contents, directory: Path) -> None:
    """Write plan.safetensors and then plan.json, each whole or not at all.

    Raises:
        PlanError: they cannot be written.
    """
    data, tensors = to_json(contents)
    write_tensors(directory / "plan.safetensors", tensors, error=PlanError)
    write_json(directory / "plan.json", data, error=PlanError)


def load_contents(directory: Path) -> Contents:
    """Read plan.json and plan.safetensors.

    Raises:
        PlanError: there is no plan, or it is damaged, of an unknown version or not a plan at all.
    """
    for name in ("plan.json", "plan.safetensors"):
        if not (directory / name).exists():
            raise PlanError(f"{directory} holds no plan: {name} is missing")
    data = read_json(directory / "plan.json", error=PlanError, most=_MOST_PLAN_BYTES)
    return from_json(data, read_tensors(directory / "plan.safetensors", error=PlanError))


def _stored(entry: Entry) -> StoredEntry:
    """An entry as it is written."""
    runs: list[Any] = []
    for fate, run in groupby(entry.fates.tolist()):
        runs.append((Fate(fate).name.lower(), len(list(run))))
    return StoredEntry(
        entry.site,
        tuple(runs),
        entry.slopes,
        entry.offsets,
        entry.alphas,
        entry.family,
        entry.fit,
        entry.becomes,
        entry.fold_skip,
        entry.note,
        entry.error,
    )


def _entry(stored: StoredEntry, what: str) -> Entry:
    """An entry as it was written, once its site and its fates agree."""
    _check_widths(stored.site, what)
    if sum(count for _, count in stored.fates) != stored.site.width:
        raise PlanError(f"{what}: the fates do not count {stored.site.width} channels")
    runs = [torch.zeros(0, dtype=torch.int8)]  # an activation place has no channels, and torch.cat needs a tensor
    for name, count in stored.fates:
        runs.append(torch.full((count,), int(Fate[name.upper()]), dtype=torch.int8))
    return Entry(
        site=stored.site,
        fates=torch.cat(runs),
        slopes=stored.slopes,
        offsets=stored.offsets,
        alphas=stored.alphas,
        family=stored.family,
        fit=stored.fit,
        becomes=stored.becomes,
        fold_skip=stored.fold_skip,
        note=stored.note,
        error=stored.error,
    )


def _tensor(reference: Reference, tensors: Mapping[str, Tensor], at: str) -> Tensor:
    """The tensor of that name, if it is the one that the plan was written with."""
    name = reference.tensor
    if name not in tensors:
        raise PlanError(f"{at}: the tensor {name!r:.80} is missing from plan.safetensors")
    tensor = tensors[name]
    if tensor.dtype != _TYPES[reference.dtype]:
        raise PlanError(f"{at}: the tensor {name!r} is {tensor.dtype}, and the plan says {reference.dtype!r}")
    if reference.shape != tuple(tensor.shape):
        raise PlanError(
            f"{at}: the tensor {name!r} has shape {list(tensor.shape)}, and the plan says {list(reference.shape)}"
        )
    if reference.sha256 != _sha256(tensor):
        raise PlanError(f"{at}: the tensor {name!r} holds other numbers than the plan was written with")
    return tensor


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(content(tensor)).hexdigest()


def _slots_fit(site: Site) -> bool:
    """Whether a followed site's channels lie where its slots and norms say, and in all columns of its consumers."""
    read = {slot.tensor for slot in site.slots if slot.side == "columns"}
    if any(c.d_in != site.width * site.block or f"{c.name}.weight" not in read for c in site.consumers):
        return False
    lengths = sum(slot.shape[slot.axis] for slot in site.slots if slot.axis < len(slot.shape))
    if len({(slot.tensor, slot.axis) for slot in site.slots}) < len(site.slots):
        return False
    places = all(slot.holds(site.width) for slot in site.slots)
    calls = all(hold(call.spans, site.width, call.size) for call in (*site.averages, *site.choices))
    return lengths <= _MOST_POSITIONS and places and calls


def _check_widths(site: Site, what: str) -> None:
    """Check that a site's maps are of the sizes that its width says."""
    if site.followed or site.kind in ("hidden", "heads", "stream"):
        fitting = site.followed and site.producer is None and site.gate is None and _slots_fit(site)
    elif site.branch is not None:
        fitting = site.width == 1 and not site.maps and site.kind == "branch"
    elif site.producer is None:
        fitting = site.width == 0 and not site.consumers and site.gate is None
    else:
        fitting = _maps_fit(site)
    if (site.branch is not None) != (site.kind == "branch"):
        fitting = False
    if not site.followed and (site.followers or site.averages or site.choices or site.lists):
        fitting = False  # these are of channels that stand in slots
    whole = all(m.d_in % m.groups == 0 and m.d_out % m.groups == 0 for m in site.maps)
    if not (fitting and whole):
        raise PlanError(
            f"{what}: the layers of the site {site.name!r:.80} do not fit its width of {site.width} channels"
        )


def _maps_fit(site: Site) -> bool:
    producer, gate, width = site.producer, site.gate, site.width
    if producer is None or site.activation is None or width == 0 or not site.consumers:
        return False
    if producer.d_out != width * (1 + site.bridge.packed) or (gate is not None and site.bridge.packed):
        return False
    if gate is not None and (gate.d_out, gate.d_in) != (width, producer.d_in):
        return False
    read = all(c.d_in == width * site.bridge.block for c in site.consumers)
    return read and all((m.d_in, m.d_out, m.groups) == (width,) * 3 for m in site.bridge.depthwise)

"""Plans as files: plan.json says what happens where, plan.safetensors holds the numbers.

The reader trusts nothing: every key, type, shape and hash is checked, and anything odd is a `PlanError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shallower.core.tensors import content
from shallower.errors import PlanError, SiteError
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.sites import Between, Heads, LinearMap, Place, Residual, Site

SCHEMA = "shallower.plan"
VERSION = 4
_EARLIER = (1, 2, 3)
"""The versions before, whose plans are read too: they had fewer fields."""

_MOST_CHANNELS = 2**24
_MOST_COUNT = 2**53
_MOST_BYTES = 2**30
_TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LISTS = ("consumers", "biases", "ups")
_SINGLES = ("down", "down_bias", "producer", "producer_bias", "gate", "gate_bias")
_HASH = re.compile(r"[0-9a-f]{64}")


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


def to_json(contents: Contents) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A plan as plain data, and the tensors that it names."""
    tensors: dict[str, Tensor] = {}

    def named(name: str, tensor: Tensor | None) -> dict[str, Any] | None:
        if tensor is None:
            return None
        tensors[name] = tensor.detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        return {"tensor": name, "dtype": kind, "shape": list(tensor.shape), "sha256": _sha256(tensor)}

    entries = []
    for i, entry in enumerate(contents.entries):
        fit = entry.fit
        entries.append(
            {
                "site": entry.site.to_json(),
                "fates": [[Fate(fate).name.lower(), len(list(run))] for fate, run in groupby(entry.fates.tolist())],
                "slopes": named(f"{i}.slopes", entry.slopes),
                "offsets": named(f"{i}.offsets", entry.offsets),
                "alphas": named(f"{i}.alphas", entry.alphas),
                "family": entry.family,
                "fit": None
                if fit is None
                else {
                    **{key: [named(f"{i}.{key}.{j}", t) for j, t in enumerate(getattr(fit, key))] for key in _LISTS},
                    **{key: named(f"{i}.{key}", getattr(fit, key)) for key in _SINGLES},
                },
                "becomes": entry.becomes,
                "fold_skip": entry.fold_skip,
                "note": entry.note,
            }
        )
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "method": contents.method,
        "fingerprint": contents.fingerprint,
        "left_out": dict(contents.left_out),
        "saves": asdict(contents.saves),
        "entries": entries,
    }
    return json.loads(json.dumps(data)), tensors


def from_json(data: object, tensors: Mapping[str, Tensor]) -> Contents:
    """The plan that `to_json` described.

    Raises:
        PlanError: it is not the description of a plan, or a tensor is missing or another one.
    """
    if isinstance(data, Mapping) and data.get("version") in _EARLIER:
        data = {"left_out": {}, **data}
    keys = {"schema", "version", "method", "fingerprint", "left_out", "saves", "entries"}
    top = _object(data, "the plan", keys, first="schema")
    if top["schema"] != SCHEMA:
        raise PlanError(f"this is not a plan: its schema is {top['schema']!r:.60}, not {SCHEMA!r}")
    if type(top["version"]) is not int or top["version"] not in (*_EARLIER, VERSION):
        raise PlanError(
            f"the plan has version {top['version']!r:.20} of the format and this is version {VERSION}; "
            "read it with the release of Shallower that wrote it"
        )
    fingerprint, method, left_out = top["fingerprint"], top["method"], top["left_out"]
    if not isinstance(method, str) or len(method) > 1000:
        raise PlanError("the plan's method is not a short text")
    if not isinstance(fingerprint, str) or not (fingerprint == "" or _HASH.fullmatch(fingerprint)):
        raise PlanError("the plan's fingerprint is not a SHA-256 in hexadecimal digits")
    if not isinstance(top["entries"], list):
        raise PlanError("the plan's entries are not a list")
    if not isinstance(left_out, Mapping) or not all(isinstance(reason, str) for reason in left_out.values()):
        raise PlanError("the plan's sites that are left out are not names with reasons")
    reader = _Reader(tensors)
    items = [_of_earlier_version(item) if top["version"] in _EARLIER else item for item in top["entries"]]
    entries = tuple(reader.entry(i, item) for i, item in enumerate(items))
    if left := sorted(set(tensors) - reader.read):
        raise PlanError(f"the plan does not name the tensor {left[0]!r}")
    saves = _object(top["saves"], "the plan's savings", {"params", "macs"})
    if not all(type(count) is int for count in saves.values()):
        raise PlanError("the plan's savings are not whole numbers")
    return Contents(entries, fingerprint, method, dict(left_out), Saves(saves["params"], saves["macs"]))


def save(contents: Contents, directory: Path) -> None:
    """Write plan.safetensors and then plan.json, each under a temporary name first."""
    data, tensors = to_json(contents)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "plan.safetensors", lambda path: save_file(tensors, path))
        text = json.dumps(data, indent=1, allow_nan=False)
        _write(directory / "plan.json", lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise PlanError(f"the plan cannot be written to {directory}: {error}") from error


def load(directory: Path) -> Contents:
    """Read plan.json and plan.safetensors.

    Raises:
        PlanError: there is no plan, or it is damaged, of an unknown version or not a plan at all.
    """
    description = directory / "plan.json"
    try:
        if description.stat().st_size > _MOST_BYTES:
            raise PlanError(f"{description} is too large to be a plan")
        data = json.loads(description.read_text(encoding="utf-8"), parse_constant=_no_constant)
        tensors = load_file(directory / "plan.safetensors")
    except FileNotFoundError as error:
        raise PlanError(f"{directory} holds no plan: {error.filename or error} is missing") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise PlanError(f"the plan in {directory} cannot be read: {error}") from error
    return from_json(data, tensors)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it, so that it is never half there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _of_earlier_version(entry: object) -> object:
    """An entry of an earlier version, with the fields that it did not have yet."""
    if not isinstance(entry, Mapping):
        return entry
    upgraded: dict[str, Any] = {"becomes": "", "fold_skip": False, "note": "", **entry}
    if isinstance(entry.get("fit"), Mapping):
        upgraded["fit"] = dict.fromkeys(_SINGLES) | dict(entry["fit"])
    if isinstance(entry.get("site"), Mapping):
        site = asdict(Site("", "head", 0, None, (), None)) | _with_sizes(entry["site"])
        if isinstance(site["heads"], Mapping):
            site["heads"] = {"products": 0, **site["heads"]}
        upgraded["site"] = site
    return upgraded


def _with_sizes(data: Any, depth: int = 4) -> Any:
    """A site's description in which every layer tells the size of images; what has a kernel is a layer."""
    if depth == 0:
        return data
    if isinstance(data, Mapping):
        parts = {key: _with_sizes(value, depth - 1) for key, value in data.items()}
        return {"size": [0, 0], **parts} if "kernel" in parts else parts
    return [_with_sizes(item, depth - 1) for item in data] if isinstance(data, (list, tuple)) else data


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(content(tensor)).hexdigest()


def _object(data: object, what: str, keys: set[str], first: str = "") -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or (first and first not in data):
        raise PlanError(f"{what} is not an object" + (f" with the key {first!r}" if first else ""))
    if set(data) != keys:
        odd = sorted(str(key) for key in set(data) ^ keys)
        raise PlanError(f"{what} has missing or unknown keys: {', '.join(odd)[:200]}")
    return data


class _Reader:
    """Reads entries, and remembers which tensors they named."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: set[str] = set()

    def entry(self, i: int, data: object) -> Entry:
        what = f"entry {i} of the plan"
        keys = {"site", "fates", "slopes", "offsets", "alphas", "family", "fit", "becomes", "fold_skip", "note"}
        fields = _object(data, what, keys)
        site = _site(fields["site"], what)
        fit = fields["fit"]
        return Entry(
            site=site,
            fates=_fates(fields["fates"], site.width, what),
            slopes=self.tensor(fields["slopes"], what),
            offsets=self.tensor(fields["offsets"], what),
            alphas=None if fields["alphas"] is None else self.tensor(fields["alphas"], what),
            family=fields["family"],
            fit=None if fit is None else self.fit(fit, f"the fit of {what}"),
            becomes=_text(fields["becomes"], f"what {what} becomes"),  # type: ignore[arg-type]
            fold_skip=fields["fold_skip"],
            note=_text(fields["note"], f"the note of {what}"),
        )

    def fit(self, data: object, what: str) -> Fit:
        fields = _object(data, what, {*_LISTS, *_SINGLES})
        lists = {}
        for key in _LISTS:
            if not isinstance(fields[key], list):
                raise PlanError(f"{what}: {key} is not a list")
            lists[key] = tuple(self.tensor(item, what) for item in fields[key])
        singles = {key: None if fields[key] is None else self.tensor(fields[key], what) for key in _SINGLES}
        return Fit(**lists, **singles)  # type: ignore[arg-type]

    def tensor(self, data: object, what: str) -> Tensor:
        fields = _object(data, f"a tensor of {what}", {"tensor", "dtype", "shape", "sha256"})
        name = fields["tensor"]
        if not isinstance(name, str) or name not in self.tensors:
            raise PlanError(f"{what}: the tensor {name!r:.80} is missing from plan.safetensors")
        tensor = self.tensors[name]
        if fields["dtype"] not in _TYPES or tensor.dtype != _TYPES[fields["dtype"]]:
            raise PlanError(f"{what}: the tensor {name!r} is {tensor.dtype}, and the plan says {fields['dtype']!r:.20}")
        if fields["shape"] != list(tensor.shape):
            raise PlanError(
                f"{what}: the tensor {name!r} has shape {list(tensor.shape)}, the plan says {fields['shape']!r:.60}"
            )
        if fields["sha256"] != _sha256(tensor):
            raise PlanError(f"{what}: the tensor {name!r} holds other numbers than the plan was written with")
        self.read.add(name)
        return tensor


def _fates(data: object, width: int, what: str) -> Tensor:
    if not isinstance(data, list):
        raise PlanError(f"{what}: the fates are not a list")
    values: list[Tensor] = []
    total = 0
    for run in data:
        if not isinstance(run, list) or len(run) != 2 or run[0] not in ("keep", "linear", "drop"):
            raise PlanError(f"{what}: {run!r:.60} is not a fate and a count, as in ['keep', 12]")
        if not _is_count(run[1], 1, width):
            raise PlanError(f"{what}: {run[1]!r:.30} is not a count of channels")
        total += run[1]
        if total > width:
            break
        values.append(torch.full((run[1],), int(Fate[run[0].upper()]), dtype=torch.int8))
    if total != width:
        raise PlanError(f"{what}: the fates do not count {width} channels")
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.int8)


def _text(data: object, what: str) -> str:
    if not isinstance(data, str):
        raise PlanError(f"{what} is not a text")
    return data


def _site(data: object, what: str) -> Site:
    example = asdict(Site("", "head", 0, None, (), None))
    fields = _object(data, f"the site of {what}", set(example))
    _check_layers([fields["producer"], fields["gate"], *_list(fields["consumers"])], what)
    _check_places([fields["activation"], *_list(fields["dropouts"])], what)
    for between in _list(fields["between"]):
        part = _object(between, f"a layer between of {what}", set(asdict(Between(_ANY_MAP))))
        _check_layers([part["map"]], what, needed=True)
        _check_places([part["activation"]], what)
        _check_texts(part, ("norm_before", "activation_name", "norm_after"), what)
        if not _is_count(part["activation_params"]):
            raise PlanError(f"{what}: the activation between has no count of parameters")
    if fields["residual"] is not None:
        residual = _object(fields["residual"], f"the residual of {what}", set(asdict(Residual(Place(""), 0))))
        _check_places([residual["place"]], what, needed=True)
        _check_texts(residual, tuple(key for key in residual if key not in ("place", "branch", "norm_params")), what)
        if residual["branch"] not in (0, 1) or isinstance(residual["branch"], bool):
            raise PlanError(f"{what}: {residual['branch']!r:.30} is not a summand of a residual, 0 or 1")
        if not _is_count(residual.get("norm_params", 0)):
            raise PlanError(f"{what}: the residual's BatchNorm has no count of parameters")
    if fields["heads"] is not None:
        _check_heads(fields["heads"], what)
    texts = tuple(key for key, value in example.items() if isinstance(value, str))
    _check_texts(fields, texts, what)
    kinds = ("feed-forward", "gated", "head", "position MLP", "convolution", "activation", "heads")
    if fields["kind"] not in kinds or fields["packed"] not in ("", "gate-first", "up-first"):
        raise PlanError(f"the site of {what} is of an unknown kind: {fields['kind']!r:.40} {fields['packed']!r:.40}")
    counts = tuple(key for key, value in example.items() if isinstance(value, int) and not isinstance(value, bool))
    flags = tuple(key for key, value in example.items() if isinstance(value, bool))
    if not all(_is_count(fields[key]) for key in counts) or not all(isinstance(fields[key], bool) for key in flags):
        raise PlanError(f"the site of {what}: {', '.join(counts + flags)} are not all what they should be")
    try:
        site = Site.from_json(fields)
    except SiteError as error:
        raise PlanError(f"{what}: {error}") from error
    _check_widths(site, what)
    return site


_ANY_MAP = LinearMap("", "linear", 0, 0, False, 0)


def _list(data: object) -> list[Any]:
    """The items of a list; something that is no layer or place where it is none."""
    return list(data) if isinstance(data, (list, tuple)) else [0]


def _check_texts(fields: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    if any(not isinstance(fields[key], str) or len(fields[key]) > 2000 for key in keys):
        raise PlanError(f"the site of {what}: {', '.join(keys)} are not all short texts")


def _check_layers(maps: Sequence[Any], what: str, needed: bool = False) -> None:
    for m in maps:
        if m is not None or needed:
            _check_map(_object(m, f"a layer of the site of {what}", set(asdict(_ANY_MAP))), what)


def _check_places(places: Sequence[Any], what: str, needed: bool = False) -> None:
    for place in places:
        if place is not None or needed:
            _check_place(_object(place, f"a place of the site of {what}", {"module", "calls"}), what)


def _check_heads(data: object, what: str) -> None:
    names = {field.name for field in dataclass_fields(Heads)}
    heads = _object(data, f"the heads of the site of {what}", names)
    _check_layers([heads["query"], heads["key"], heads["value"]], what, needed=True)
    _check_texts(heads, ("module", "packed"), what)
    sizes = ("head_dim", "value_dim", "queries_per_group")
    rows = [heads[key] for key in ("query_rows", "key_rows", "value_rows")]
    valid = _is_count(heads["products"], 0, _MOST_COUNT)
    valid = valid and all(_is_count(heads[key], 1) for key in sizes) and heads["packed"] in ("", "blocks", "heads")
    valid = valid and all(len(_list(row)) == 3 and all(map(_is_count, _list(row))) for row in rows)
    valid = valid and all(
        isinstance(count, (list, tuple)) and len(count) == 2 and isinstance(count[0], str) and _is_count(count[1])
        for count in _list(heads["counts"])
    )
    if not valid:
        raise PlanError(f"{what}: this is not the description of attention heads: {dict(heads)!s:.200}")


def _check_widths(site: Site, what: str) -> None:
    if site.heads is not None or site.kind == "heads":
        fitting = site.heads is not None and site.producer is None and site.gate is None and site.width > 0
        fitting = fitting and len(site.consumers) == 1 and _heads_fit(site)
    elif site.producer is None:
        fitting = site.width == 0 and not site.consumers and site.gate is None
    else:
        fitting = (
            site.width > 0
            and bool(site.consumers)
            and site.activation is not None
            and not (site.packed and site.gate is not None)
            and site.producer.d_out == site.width * (2 if site.packed else 1)
            and (site.gate is None or (site.gate.d_out, site.gate.d_in) == (site.width, site.producer.d_in))
            and all(c.d_in == site.width * site.block for c in site.consumers)
            and all((b.map.d_in, b.map.d_out, b.map.groups) == (site.width,) * 3 for b in site.between)
        )
    if not fitting:
        raise PlanError(
            f"{what}: the layers of the site {site.name!r:.80} do not fit its width of {site.width} channels"
        )


def _heads_fit(site: Site) -> bool:
    heads = cast("Heads", site.heads)
    rows = ((heads.query, heads.query_rows), (heads.key, heads.key_rows), (heads.value, heads.value_rows))
    ends = [start + step * (site.width - 1) + length <= m.d_out for m, (start, step, length) in rows]
    return all(ends) and site.consumers[0].d_in == site.width * heads.block


def _check_map(m: Mapping[str, Any], what: str) -> None:
    pairs = ("kernel", "stride", "padding", "dilation", "size")
    valid = isinstance(m["name"], str) and 0 < len(m["name"]) <= 1000 and m["kind"] in ("linear", "conv1d", "conv2d")
    valid = valid and isinstance(m["bias"], bool) and _is_count(m["positions"], 0, _MOST_COUNT)
    valid = valid and all(_is_count(m[key], 1) for key in ("d_in", "d_out", "groups"))
    for key in pairs:
        least = 0 if key in ("padding", "size") else 1
        pair = m[key]
        valid = valid and isinstance(pair, (list, tuple)) and len(pair) == 2
        valid = valid and all(_is_count(v, least, 2**16) for v in pair)
    if not valid or m["d_in"] % m["groups"] or m["d_out"] % m["groups"]:
        raise PlanError(f"{what}: this is not the description of a layer: {dict(m)!s:.200}")


def _check_place(place: Mapping[str, Any], what: str) -> None:
    calls = place["calls"]
    valid = isinstance(place["module"], str) and len(place["module"]) <= 1000 and isinstance(calls, (list, tuple))
    valid = valid and all(
        isinstance(call, (list, tuple)) and len(call) == 2 and isinstance(call[0], str) and _is_count(call[1])
        for call in calls
    )
    if not valid:
        raise PlanError(f"{what}: this is not the description of a place: {dict(place)!s:.200}")


def _is_count(value: object, least: int = 0, most: int = _MOST_CHANNELS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

"""What a squeezing has found so far, in a folder, so that it goes on where it was interrupted.

    progress = Progress("out.progress/squeeze", identity_of(model, sites, batches.digest, options))
    entries = progress.entries(key)     # of the sites that were done under this key, in order; [] at first
    progress.keep(key, 4, entry)        # the fifth: written once, beside the others

    identity.json       what the results depend on; a folder with another one is refused
    curves.json         the sites' curves of error
    <key>-0004/         the plan of one site

A file or folder appears whole or not at all. Of several processes the first reads and writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from shallower import __version__
from shallower.core.files import read_json, replacing, write_json
from shallower.core.processes import from_first_process, gathered
from shallower.core.tensors import hash_of_weights, told_apart
from shallower.errors import CheckpointError, PlanError
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Site

Curves = dict[str, dict[int, float]]
"""Site name -> width -> error; at width 0, of one linear map in the place of the site."""

T = TypeVar("T")

_IDENTITY = "identity.json"
_CURVES = "curves.json"


class Progress:
    """Entries of plans by key, and curves of error.

    Attributes:
        folder: where they are kept; made with the first of them.
        identity: what the results depend on, plain JSON data.

    Raises:
        CheckpointError: the folder cannot be read, or holds another computation; the error says what differs.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.identity = dict(identity)
        from_first_process(lambda: self._guarded("read", self._check))

    def entries(self, key: str) -> list[Entry]:
        """Those kept under this key, in order; none at first.

        Raises:
            CheckpointError: they are damaged.
        """
        return from_first_process(lambda: self._guarded("read", lambda: self._read_entries(key)))

    def keep(self, key: str, index: int, entry: Entry) -> None:
        """Keep the entry with this index.

        Raises:
            CheckpointError: it cannot be written.
        """

        def write() -> None:
            self._begin()
            with replacing(self.folder / f"{_hashed(key)}-{index:04}", error=PlanError) as unfinished:
                Plan((entry,)).save(unfinished)

        from_first_process(lambda: self._guarded("written", write))

    def curves(self) -> Curves | None:
        """The curves that were kept, or None.

        Raises:
            CheckpointError: they are damaged.
        """
        return from_first_process(lambda: self._guarded("read", self._read_curves))

    def keep_curves(self, curves: Curves) -> None:
        """Keep these curves.

        Raises:
            CheckpointError: they cannot be written.
        """

        def write() -> None:
            self._begin()
            write_json(self.folder / _CURVES, curves, error=PlanError)

        from_first_process(lambda: self._guarded("written", write))

    def _check(self) -> None:
        """That the folder holds this computation, or nothing."""
        if self.folder.is_file():
            raise CheckpointError(f"{self.folder} is a file, and a checkpoint is a folder; delete it or give another")
        if not self.folder.is_dir():
            return
        path = self.folder / _IDENTITY
        if not path.exists():
            # what a killed run left unfinished has a name that begins with a dot
            if any(not left.name.startswith(".") for left in self.folder.iterdir()):
                raise CheckpointError(f"{self.folder} holds something else than a checkpoint; give another folder")
            return
        found = read_json(path, error=PlanError)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} is damaged; delete the folder to start again")
        if other := differences(found, self.identity):
            raise CheckpointError(
                f"{self.folder} is the checkpoint of another computation ({', '.join(other)} differ); delete it to "
                "start again, or give another folder"
            )

    def _begin(self) -> None:
        """Make the folder, with its identity, where there is none yet."""
        if not (self.folder / _IDENTITY).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / _IDENTITY, self.identity, error=PlanError)

    def _read_entries(self, key: str) -> list[Entry]:
        found: list[Entry] = []
        while (place := self.folder / f"{_hashed(key)}-{len(found):04}").is_dir():
            found += Plan.load(place).entries
        return found

    def _read_curves(self) -> Curves | None:
        path = self.folder / _CURVES
        if not path.exists():
            return None
        curves: Curves = {}
        for name, curve in read_json(path, error=PlanError).items():
            curves[str(name)] = {int(width): float(error) for width, error in curve.items()}
        return curves

    def _guarded(self, what: str, action: Callable[[], T]) -> T:
        """What `action` returns; whatever goes wrong with files in it is told in one sentence."""
        try:
            return action()
        except CheckpointError:
            raise
        except (PlanError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{str(self.folder)!r:.200}: the checkpoint cannot be {what}: {error}; delete it to start again, or "
                "give another folder"
            ) from error


def identity_of(model: nn.Module, sites: Iterable[Site], data: str, options: SqueezeOptions) -> dict[str, Any]:
    """What the result of a squeezing to given widths depends on, as plain data.

        identity_of(model, sites, batches.digest, sh.SqueezeOptions())["weights"]

    Args:
        model: whose weights are hashed, all of them, and whose modules' names, classes and sizes.
        sites: that are squeezed.
        data: hash of the calibration set as read by this process.
        options: with their functions, which are told apart by their code and by what they have enclosed.
    """
    chosen = {field.name: told_apart(getattr(options, field.name)) for field in fields(options)}
    return {
        "version": f"{__version__}, torch {torch.__version__}",
        "modules": _hashed(*map(_module_text, model.named_modules())),
        "weights": hash_of_weights(model),
        "sites": _hashed(*(site.to_json() for site in sites)),
        "data": _hashed(*gathered(data)),
        "options": chosen,
    }


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    names: list[str] = []
    for key in sorted({*found, *wanted}):
        here, there = found.get(key), wanted.get(key)
        if here == there:
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            names += differences(here, there)
        else:
            names.append(key)
    return names


def _module_text(named: tuple[str, nn.Module]) -> str:
    name, module = named
    return f"{name} {type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"


def _hashed(*values: Any) -> str:
    """The first half of the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]

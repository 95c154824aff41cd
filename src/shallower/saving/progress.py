"""What a long computation has found so far, in one file, so that it goes on where it was interrupted.

    progress = Progress(path, identity={"weights": fingerprint, "data": digest})
    entries = progress.entries(key)     # those done before; [] at first
    progress.keep(key, entries)

The file appears whole or not at all; of several processes the first writes it. A file of another computation is an
error, not a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shallower.core.inputs import tensors
from shallower.core.processes import is_first
from shallower.core.tensors import content
from shallower.errors import CheckpointError, PlanError
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.planning.plan_file import plan_from_json, plan_to_json

SCHEMA = 1
"""Version of the file."""


class Progress:
    """Entries of plans and plain values, by key.

    Attributes:
        path: of the file (.safetensors).
        identity: what the results depend on, plain JSON data.

    Raises:
        CheckpointError: the file is damaged, or holds another computation.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)
        self._plans: dict[str, Any] = {}
        self._values: dict[str, Any] = {}
        if self.path.exists():
            self._read()

    def entries(self, key: str) -> list[Entry]:
        """Those kept under this key; none at first.

        Raises:
            CheckpointError: they are damaged.
        """
        if key not in self._plans:
            return []
        try:
            return list(plan_from_json(self._plans[key]["plan"], self._plans[key]["tensors"]).entries)
        except (PlanError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path}: {error}; delete it to start again") from error

    def keep(self, key: str, entries: Sequence[Entry]) -> None:
        """Keep these entries, instead of what was kept under this key before."""
        data, found = plan_to_json(Plan(tuple(entries)))
        self._plans[key] = {"plan": data, "tensors": found}
        self._write()

    def value(self, key: str) -> Any:
        """The value kept under this key, or None."""
        return self._values.get(key)

    def keep_value(self, key: str, value: Any) -> None:
        """Keep nested dicts, lists, numbers, texts and tensors under this key."""
        self._values[key] = value
        self._write()

    def _read(self) -> None:
        from shallower.core.files import read_state

        state = read_state(self.path, error=CheckpointError)
        if not isinstance(state, dict) or not {"schema", "identity", "plans", "values"} <= set(state):
            raise CheckpointError(f"{self.path} holds something else than this computation; give another path")
        other = sorted(
            k for k in {*state["identity"], *self.identity} if state["identity"].get(k) != self.identity.get(k)
        )
        if state["schema"] != SCHEMA or other:
            told = f" ({', '.join(other)} differ)" if other else ""
            raise CheckpointError(f"{self.path} holds another computation{told}; delete it, or give another path")
        self._plans, self._values = state["plans"], state["values"]

    def _write(self) -> None:
        from shallower.core.files import write_state

        if not is_first():
            return
        state = {"schema": SCHEMA, "identity": self.identity, "plans": self._plans, "values": self._values}
        write_state(self.path, state, error=CheckpointError)


def digest(batches: Iterable[Any], most: int = 4) -> str:
    """SHA-256 of the first batches' tensors and of how many batches there are."""
    found = hashlib.sha256()
    count = 0
    for batch in batches:
        if count < most:
            for tensor in tensors(batch):
                found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(content(tensor))
        count += 1
    found.update(str(count).encode())
    return found.hexdigest()

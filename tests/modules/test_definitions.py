"""Definitions are read from files, and what is read is what runs."""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import shallower as sh
from shallower.errors import Refusal
from shallower.modules.definitions import Source, code_with, definition_of
from shallower.modules.written import _path_along

NETWORK = '''
import math
import torch
from torch import nn
from torch.nn import functional as F

class Network(nn.Module):
    """Sizes are written out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        """Two layers."""
        if x.dim() == 2:
            y = F.relu(self.a(x))[:, :8]
        z = torch.cat([part.view(len(x), -1) for part in y.split(4, 1)], dim=1)
        return self.b(z * math.sqrt(1.0) + 0.0)
'''


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Path]]:
    path = tmp_path / "a_network_of_a_test.py"
    path.write_text(NETWORK)
    # functions that are alike are one to these, in whichever file they stand
    for known in (definition_of, code_with, _path_along):
        known.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(path.stem), path
    del sys.modules[path.stem]
    linecache.clearcache()


def test_the_definition_of_what_runs_is_read(written: tuple[Any, Path]) -> None:
    source = definition_of(written[0].Network.forward.__code__)
    assert isinstance(source, Source)
    assert [call.text for call in source.calls][:2] == ["x.dim()", "self.a(x)"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dim=1", "dim=-1"),
        ("[:, :8]", "[:, :7]"),
        ("F.relu", "F.silu"),
        ("1.0) + 0.0", "1) + 0.0"),
        ("        z = torch", "            z = torch"),
    ],
)
def test_a_file_that_was_edited_after_it_was_imported_is_refused(written: tuple[Any, Path], old: str, new: str) -> None:
    module, path = written
    assert NETWORK.count(old) == 1
    path.write_text(NETWORK.replace(old, new))
    linecache.checkcache()
    refusal = definition_of(module.Network.forward.__code__)
    assert isinstance(refusal, Refusal)
    assert "changed since it was imported" in str(refusal)


def test_what_does_not_matter_may_be_edited(written: tuple[Any, Path]) -> None:
    module, path = written
    path.write_text(NETWORK.replace("dim=1)", "dim=1)  # side by side"))
    linecache.checkcache()
    assert isinstance(definition_of(module.Network.forward.__code__), Source)


def test_no_site_that_needs_another_forward_is_offered_from_an_edited_file(written: tuple[Any, Path]) -> None:
    module, path = written
    path.write_text(NETWORK.replace("y.split(4, 1)", "y.split(2, 1)"))
    linecache.checkcache()
    sites = sh.find_sites(module.Network().eval(), torch.randn(3, 6))
    assert "a" not in sites.names
    assert "changed since it was imported" in str(sites)


def test_what_was_compiled_again_is_changed_at_its_definition_again(written: tuple[Any, Path]) -> None:
    function: FunctionType = written[0].Network.forward
    once = code_with(function.__code__, (("y.split(4, 1)", 0),))
    assert not isinstance(once, Refusal)
    assert isinstance(definition_of(once), Source)

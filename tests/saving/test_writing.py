"""Weights in files of a given size, and directories that are nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from shallower.errors import CheckpointError
from shallower.saving.writing import bytes_of, check_as_written, check_replaceable, write_weights


def test_sizes_are_numbers_or_texts() -> None:
    assert [bytes_of(100), bytes_of("5GB"), bytes_of("1.5 kb")] == [100, 5_000_000_000, 1500]


@pytest.mark.parametrize("size", [0, -5, True, 2.5, None, "", "5", "0GB", "-1GB", "GB", "1e9GB", "5PB"])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(CheckpointError, match="not the size of a file"):
        bytes_of(size)


def test_weights_are_split_into_files_that_others_may_read(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": torch.ones(100), "b": torch.ones(100)}, 500)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_what_is_read_back_is_compared_byte_by_byte() -> None:
    value = torch.tensor([1.0, float("nan"), -0.0])
    check_as_written({"a": value}, {"a": value.clone()})
    with pytest.raises(CheckpointError, match="tensor a: the file does not hold what was written"):
        check_as_written({"a": value}, {"a": value.abs()})


def test_a_directory_of_other_things_is_found_out_by_its_first_file(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    walk = Path.rglob

    def counted(self: Path, pattern: str) -> Any:
        for path in walk(self, pattern):
            seen.append(path)
            yield path

    monkeypatch.setattr(Path, "rglob", counted)
    with pytest.raises(CheckpointError, match="not empty, and not the result of an earlier save"):
        check_replaceable(Path("/"))
    assert len(seen) < 10_000


def test_an_empty_or_missing_directory_may_be_written(tmp_path: Path) -> None:
    check_replaceable(tmp_path)
    check_replaceable(tmp_path / "new")

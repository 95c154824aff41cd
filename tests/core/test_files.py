"""Files appear whole or not at all, and hostile ones are one sentence."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from shallower.core.files import (
    atomic,
    folder_beside,
    read_bytes,
    read_json,
    read_state,
    read_tensors,
    replacing,
    write_json,
    write_state,
    write_tensors,
    write_text,
)
from shallower.errors import CheckpointError, DataError


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "é", error=DataError),
    "json": lambda path: write_json(path, {"a": [1]}, error=DataError),
    "tensors": lambda path: write_tensors(path, {"a": torch.ones(3)}, error=DataError),
    "state": lambda path: write_state(path, {"a": torch.ones(3)}, error=DataError),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_who_may_read_a_file_is_for_the_umask_to_say(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "new" / "file")
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == 0o640
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_cannot_be_written_is_one_sentence(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/below: cannot be written: (File exists|Not a directory)$"):
        write(tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to write to")
def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No space left"), atomic(tmp_path / "x", error=DataError):
        Path("/dev/full").write_text("x" * 100_000)


def interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def test_after_an_error_the_earlier_file_is_still_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, 1, error=DataError)
    with pytest.raises(DataError, match="not JSON compliant"):
        write_json(path, float("nan"), error=DataError)
    with pytest.raises(KeyboardInterrupt), atomic(path, error=DataError) as partial:
        interrupted(partial)
    assert read_json(path, error=DataError) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    for content in ("first", "second"):
        with replacing(directory, error=CheckpointError) as partial:
            (partial / content).write_text(content)
    assert [path.name for path in directory.iterdir()] == ["second"]
    with pytest.raises(KeyboardInterrupt), replacing(directory, error=CheckpointError) as partial:
        interrupted(partial / "third")
    assert [path.name for path in directory.iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys
from pathlib import Path
from shallower.core.files import {function}
from shallower.errors import CheckpointError
with {function}(Path(sys.argv[1]), error=CheckpointError) as partial:
    (partial / "a" if partial.is_dir() else partial).write_text("half")
    os._exit(1)
"""


@pytest.mark.parametrize("function", ["atomic", "replacing"])
def test_what_a_killed_run_left_is_removed_by_the_next(function: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED.format(function=function), path], check=False)
    old, recent = tmp_path / ".out.partial-0123abcd", tmp_path / ".out.partial-4567abcd"
    for left in (old, recent):
        left.mkdir()
    os.utime(old, (time.time() - 1e6,) * 2)
    assert len(list(tmp_path.iterdir())) == 3
    with {"atomic": atomic, "replacing": replacing}[function](path, error=CheckpointError):
        # another process that is still writing is left alone
        assert len(list(tmp_path.iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [recent.name, "out"]
    subprocess.run([sys.executable, "-c", KILLED.format(function=function), path], check=False)
    with folder_beside(path, error=CheckpointError) as folder:
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([recent.name, folder.name, "out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [recent.name, "out"]


def test_tensors_that_share_memory_are_written_once_each(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"a": weight, "b": weight, "c": weight.t(), "d": nn.Parameter(weight[0]), "e": weight[:, 1]}
    write_tensors(tmp_path / "x", tensors, error=DataError)
    found = read_tensors(tmp_path / "x", error=DataError)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_state_keeps_its_nesting(tmp_path: Path) -> None:
    shared = torch.arange(4)
    state = {"a": [1, None, "text", 2.5], "b": (shared, {3: shared[:2]}), "c": {}}
    write_state(tmp_path / "x", state, error=DataError)
    found = read_state(tmp_path / "x", error=DataError)
    assert found["a"] == state["a"]
    assert torch.equal(found["b"][0], shared)
    assert torch.equal(found["b"][1][3], shared[:2])
    assert isinstance(found["b"], tuple)


READERS = {
    "bytes": lambda path: read_bytes(path, error=DataError),
    "json": lambda path: read_json(path, error=DataError),
    "tensors": lambda path: read_tensors(path, error=DataError),
    "state": lambda path: read_state(path, error=DataError),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.timeout(20)
def test_only_regular_files_are_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "directory").mkdir()
    for name, reason in {
        "pipe": "not a regular file",
        "link": "this is a link",
        "zero": "this is a link",
        "directory": "not a regular file",
        "absent": "No such file or directory",
        "a\0b": "null",
    }.items():
        with pytest.raises(DataError, match=reason):
            read(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        read(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("[NaN]", "not a finite number"),
        ("[1e400]", "not a finite number"),
        ("[-Infinity]", "not a finite number"),
        ("9" * 5000, "ValueError"),
        ("[" * 200 + "]" * 200, "nested too deeply"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("\udcff", "UnicodeDecodeError"),
    ],
)
def test_odd_json_is_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=reason):
        read_json(tmp_path / "x.json", error=DataError)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(["a" * 100]))
    with pytest.raises(DataError, match="too large"):
        read_json(tmp_path / "x.json", error=DataError, most=50)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.parametrize("name", ["tensors", "state"])
def test_damaged_tensors_are_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    if (name, content[:1]) == ("tensors", b"\x08"):
        assert read_tensors(tmp_path / "x", error=DataError) == {}
        return
    with pytest.raises(DataError, match=r"damaged|not a readable checkpoint"):
        READERS[name](tmp_path / "x")


def test_a_state_nested_too_deeply_is_one_sentence(tmp_path: Path) -> None:
    nested = "[" * 50_000 + "]" * 50_000
    write_tensors(tmp_path / "x", {}, error=DataError, metadata={"state": nested})
    with pytest.raises(DataError, match="nested too deeply"):
        read_state(tmp_path / "x", error=DataError)

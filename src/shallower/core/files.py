"""Files and directories that are written whole or not at all, and read without trust.

    write_json(path, {"points": 3}, error=CheckpointError)
    data = read_json(path, error=CheckpointError)

Whatever goes wrong is one sentence of the class `error`. Only regular files are read: a link, a pipe or a device is an
error, since it may lead elsewhere, block or never end.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shallower.core.failures import failing
from shallower.errors import ShallowerError

_MOST_JSON = 64 << 20
_MOST_DEPTH = 100
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_ABANDONED = 24 * 3600
"""Seconds after which something half-written by an unknown process belongs to nobody."""

# ---------------------------------------------------------------------- writing


@contextmanager
def atomic(path: Path, *, error: type[ShallowerError]) -> Iterator[Path]:
    """A temporary path beside `path`, whose file takes the place of `path` at the end, or leaves no trace.

        with atomic(path, error=ReportError) as partial:
            figure.savefig(partial, format="png")       # a partial name has no ending

    The file is on the disk before it takes its name, and everybody may read it whom the umask allows to. What killed
    runs left half-written is removed.
    """
    with failing(error, f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path, "partial")
        partial = _partial_name(path, "partial")
        try:
            # a library that replaces this file may give its own one other permissions
            with partial.open("xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield partial
            partial.chmod(mode)
            _to_disk(partial)
            partial.replace(path)
            _to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing(directory: Path, *, error: type[ShallowerError]) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` at the end, or leaves no trace.

        with replacing(directory, error=CheckpointError) as partial:
            write_json(partial / "config.json", config, error=CheckpointError)

    What killed runs left half-written beside it is removed.
    """
    with failing(error, f"{directory}: cannot be written"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory, "partial")
        partial, previous = _partial_name(directory, "partial"), _partial_name(directory, "previous")
        try:
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                _to_disk(path)
            if directory.exists():
                directory.rename(previous)
            try:
                partial.rename(directory)
            except BaseException:
                if previous.exists():
                    previous.rename(directory)
                raise
            _to_disk(directory.parent)
            _remove_leftovers(directory, "previous")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if directory.exists():
                shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def folder_beside(path: Path, *, error: type[ShallowerError]) -> Iterator[Path]:
    """A new folder in the directory of `path`, gone at the end: for files that take their places one by one.

        with folder_beside(path, error=ExportError) as folder:
            session.save(folder / path.name)
            (folder / path.name).replace(path)

    What killed runs left there is removed.
    """
    with failing(error, f"{path}: cannot be written"):
        _remove_leftovers(path, "partial")
        folder = _partial_name(path, "partial")
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def temporary_folder(owner: object, *, error: type[ShallowerError]) -> Path:
    """A new folder for files that are removed together with `owner`, or by the next run where this one is killed."""
    place = Path(tempfile.gettempdir()) / "shallower"
    with failing(error, f"{place.parent}: no temporary folder can be made"):
        _remove_leftovers(place, "temporary")
        folder = _partial_name(place, "temporary")
        folder.mkdir()
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def write_text(path: Path, text: str, *, error: type[ShallowerError]) -> None:
    """Write a text, as UTF-8."""
    with atomic(path, error=error) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any, *, error: type[ShallowerError]) -> None:
    """Write plain data; numbers that are not finite are an error."""
    with atomic(path, error=error) as partial:
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, error: type[ShallowerError], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file; they may be anywhere and share memory.

    write_tensors(path, {"weight": layer.weight}, error=CheckpointError)
    """
    with atomic(path, error=error) as partial:
        storages: set[int] = set()
        plain = {}
        for name, tensor in tensors.items():
            value = tensor.detach().cpu().contiguous()
            storage = value.untyped_storage()
            if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:
                value = value.clone()
            storages.add(value.untyped_storage().data_ptr())
            plain[name] = value
        save_file(plain, partial, metadata=dict(metadata or {}))


def write_state(path: Path, state: Mapping[str, Any], *, error: type[ShallowerError]) -> None:
    """Write nested dicts, lists, tuples, numbers, texts and tensors as one safetensors file, without pickle.

        write_state(path, {"step": 3, "optimizer": optimizer.state_dict()}, error=TrainingError)

    The tensors are the file's tensors; the rest is JSON in its header.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": list(map(encode, value))}
        if isinstance(value, list):
            return list(map(encode, value))
        return value

    with failing(error, f"{path}: cannot be written"):
        text = json.dumps(encode(state))
    write_tensors(path, tensors, error=error, metadata={"state": text})


# ---------------------------------------------------------------------- reading


def read_bytes(path: Path, *, error: type[ShallowerError], most: int = _MOST_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes."""
    with failing(error, f"{path}: cannot be read"):
        _check_regular(path, error)
        # not to wait for a pipe, or follow a link, that has taken the file's place since
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path}: larger than {most >> 20} MiB, too large to be what it should be")
    return content


def read_json(path: Path, *, error: type[ShallowerError], most: int = _MOST_JSON) -> Any:
    """The plain data of a JSON file, in which no key is given twice and every number is finite.

    description = read_json(directory / "shallower.json", error=CheckpointError)
    """
    content = read_bytes(path, error=error, most=most)
    with failing(error, f"{path}: not readable as JSON"):
        data = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_finite_number,
            parse_constant=_finite_number,
        )
        if _depth(data) > _MOST_DEPTH:
            raise RecursionError
        return data


def read_tensors(path: Path, *, error: type[ShallowerError]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it."""
    with failing(error, f"{path}: damaged, or not a safetensors file"):
        _check_regular(path, error)
        return dict(load_file(path))


def read_state(path: Path, *, error: type[ShallowerError]) -> Any:
    """What `write_state` wrote."""
    with failing(error, f"{path}: not a readable checkpoint (delete it to start again)"):
        _check_regular(path, error)
        with safe_open(path, framework="pt") as file:

            def decode(value: Any) -> Any:
                if isinstance(value, list):
                    return list(map(decode, value))
                if not isinstance(value, dict):
                    return value
                ((kind, content),) = value.items()
                if kind == "tensor":
                    return file.get_tensor(content)
                if kind == "tuple":
                    return tuple(map(decode, content))
                return {decode(key): decode(item) for key, item in content}

            return decode(json.loads((file.metadata() or {})["state"]))


def _check_regular(path: Path, error: type[ShallowerError]) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise error(f"{path}: this is a link; put the file itself there")
    if not stat.S_ISREG(mode):
        raise error(f"{path}: not a regular file")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is given twice")
    return result


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _depth(data: Any) -> int:
    depth, level = 0, [data]
    while level:
        depth += 1
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = inner
    return depth


# ---------------------------------------------------------------------- names of what is half-written


def _partial_name(path: Path, kind: str) -> Path:
    """A new name in the same directory that says which process writes there."""
    return path.with_name(f".{path.name}.{kind}-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_leftovers(path: Path, kind: str) -> None:
    prefix = f".{path.name}.{kind}-"
    for left in path.parent.iterdir():
        if left.name.startswith(prefix) and _is_abandoned(left, left.name[len(prefix) :]):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _is_abandoned(left: Path, token: str) -> bool:
    """Whether nobody will go on with what is half-written: its process has ended, or it is old."""
    host, _, rest = token.partition("-")
    pid = rest.partition("-")[0]
    if host == _HOST and pid.isdecimal():
        return not _is_alive(int(pid))
    with suppress(OSError):
        return time.time() - left.lstat().st_mtime > _ABANDONED
    return False


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _to_disk(path: Path) -> None:
    if os.name == "nt":  # where directories cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

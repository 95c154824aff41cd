"""Any change of any file of a saved directory: it loads, or is refused, soon, in little memory and without network."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import shallower as sh
from tests.attacks.harness import outcome
from tests.attacks.models import Own, detr, llama, own, timm_vit

SOURCES = {"timm_vit": "timm:test_vit?num_classes=3&img_size=32"}
MAKERS: tuple[Callable[[], nn.Module], ...] = (own, llama, detr, timm_vit)
NUMBERS = (0, 1, -1, 2, 3, 7, 1000, 2**16, 2**20, 2**24, 2**31, 2**40, 2**63, 10**30, 0.5, -1.5, 1e300)
VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "model",
    "__class__",
    "float32",
    "identity",
    [],
    {},
    [[]],
    [{}],
    {"": 0},
    *NUMBERS,
)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved directory of each model, whole and in several files."""
    folder = tmp_path_factory.mktemp("honest")
    for make in MAKERS:
        model = make().eval()
        sh.save(model, folder / make.__name__, SOURCES.get(make.__name__))
        sh.save(model, folder / f"{make.__name__}_split", SOURCES.get(make.__name__), max_shard_size=4000)
    return folder


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in nested data, but the whole."""
    if isinstance(data, dict):
        inner: Any = data.items()
    else:
        inner = enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate_json(path: Path, chance: random.Random) -> str:
    data = json.loads(path.read_text())
    found = list(places(data))
    if not found:
        return "nothing"
    *above, last = chance.choice(found)
    holder = data
    for key in above:
        holder = holder[key]
    kind = chance.choice(["value", "number", "elsewhere", "gone", "key", "twice", "deep"])
    if kind == "value":
        holder[last] = chance.choice(VALUES)
    elif kind == "number":
        holder[last] = chance.choice(NUMBERS)
    elif kind == "elsewhere":
        other = data
        for key in chance.choice(found):
            other = other[key]
        holder[last] = other
    elif kind == "gone":
        del holder[last]
    elif kind == "key" and isinstance(holder, dict):
        holder[chance.choice(["", "x", "__class__", "a" * 5000, "auto_map", "backbone", "groups"])] = holder.pop(last)
    elif kind == "twice" and isinstance(holder, list):
        holder.append(holder[last])
    else:
        holder[last] = "here"
        inside = "[" * (depth := chance.choice([50, 200, 5000])) + "]" * depth
        path.write_text(json.dumps(data).replace('"here"', inside, 1))
        return f"{path.name}: {depth} deep at {above}, {last}"
    path.write_text(json.dumps(data))
    return f"{path.name}: {kind} at {[*above, last]}"


def mutate_bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = chance.choice(["byte", "cut", "more", "zeros", "header"])
    if kind == "byte":
        for _ in range(chance.choice([1, 1, 10])):
            content[chance.randrange(min(len(content), 4000))] = chance.randrange(256)
    elif kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "more":
        content += os.urandom(100)
    elif kind == "zeros":
        content = bytearray(len(content))
    else:
        content[:8] = chance.randrange(1 << 40).to_bytes(8, "little")
    path.write_bytes(bytes(content))
    return f"{path.name}: {kind}"


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def mutate_file(path: Path, chance: random.Random) -> str:
    kind = chance.choice(["gone", "pipe", "directory", "link", "endless", "swap"])
    outside = path.parent.with_name("outside")
    shutil.copy(path, outside)
    # Regular files only: a pipe or /dev/zero, put there by an earlier mutation, would never be copied to its end.
    other = chance.choice(sorted(file for file in path.parent.iterdir() if _is_plain(file)))
    if kind == "swap":
        shutil.copy(other, path) if other != path else path.unlink()
        return f"{path.name}: {other.name} in its place"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(outside)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    return f"{path.name}: {kind}"


def mutate(directory: Path, chance: random.Random) -> str:
    done = []
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        files = sorted(path for path in directory.iterdir() if _is_plain(path) and path.suffix != ".md")
        if not files:
            break
        path = chance.choice([*files, *(path for path in files if path.name == "shallower.json")])
        change = chance.choice([mutate_json, mutate_json, mutate_json, mutate_bytes, mutate_file])
        if change is mutate_json and path.suffix != ".json":
            change = mutate_bytes
        try:
            done.append(change(path, chance))
        except (ValueError, RecursionError):  # its JSON is damaged already
            continue
    return "; ".join(done)


def check(seed: int, honest: Path, tmp_path: Path) -> None:
    chance = random.Random(seed)
    name = chance.choice(sorted(path.name for path in honest.iterdir()))
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        directory = Path(shutil.copytree(honest / name, Path(folder) / "out"))
        done = mutate(directory, chance)
        fresh = Own() if name.startswith("own") else None
        found = outcome(lambda: sh.load(directory, model=fresh))
    assert found.harmless, f"{name}: {done}: {found}"
    assert len(found.text) < 1500


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_any_mutation_is_refused_or_harmless(seed: int, honest: Path, tmp_path: Path) -> None:
    check(seed, honest, tmp_path)


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_two_thousand_mutations_are_refused_or_harmless(seed: int, honest: Path, tmp_path: Path) -> None:
    check(seed, honest, tmp_path)

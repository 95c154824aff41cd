"""The public names: what they are, that they are a closed set, and that they cost nothing until they are used."""

from __future__ import annotations

import builtins
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import shallower as sh

NAMES = sorted(sh.__all__)


def functions_of(value: Any) -> Iterator[Any]:
    """A public function, or the public methods of a public class and its constructor."""
    if inspect.isfunction(value):
        yield value
    if not inspect.isclass(value):
        return
    for name, member in inspect.getmembers(value):
        if name == "__init__" or not name.startswith("_"):
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member) and member.__module__.startswith("shallower."):
                yield member


def classes_in(hint: Any) -> Iterator[type]:
    """Every class of ours in an annotation."""
    if inspect.isclass(hint) and hint.__module__.startswith("shallower."):
        yield hint
    for part in typing.get_args(hint):
        if not isinstance(part, str):
            yield from classes_in(part)


def test_a_public_name_is_what_it_says() -> None:
    for name in NAMES:
        assert getattr(getattr(sh, name), "__name__", name) == name


@pytest.mark.parametrize("name", NAMES)
def test_what_a_public_signature_takes_and_returns_is_public(name: str) -> None:
    missing = set()
    for function in functions_of(getattr(sh, name)):
        for hint in typing.get_type_hints(function).values():
            missing |= {found.__name__ for found in classes_in(hint) if found.__name__ not in NAMES}
    assert missing == set()


@pytest.mark.parametrize("name", NAMES)
def test_what_a_public_docstring_says_is_raised_or_warned_is_public(name: str) -> None:
    value = getattr(sh, name)
    known = {*NAMES, *dir(builtins)}
    for documented in (value, *functions_of(value)):
        text = inspect.getdoc(documented) or ""
        found = set(re.findall(r"^ +(\w+(?:Error|Warning)): ", text, re.MULTILINE))
        assert found <= known, documented


def test_every_error_is_public_and_also_one_that_python_has() -> None:
    from shallower import errors

    raised = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    for error in raised:
        assert error.__name__ in NAMES
        assert issubclass(error, sh.ShallowerError)
        if error is not sh.ShallowerError:
            assert issubclass(error, (ValueError, RuntimeError, OSError, MemoryError)), error


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = sh.nothing


def test_names_are_listed() -> None:
    assert set(NAMES) <= set(dir(sh))


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, shallower, shallower.app.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

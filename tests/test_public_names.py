from __future__ import annotations

import subprocess
import sys

import pytest

import shallower as sh


@pytest.mark.parametrize("name", sh.__all__)
def test_public_name_is_what_it_says(name: str) -> None:
    assert getattr(sh, name).__name__ == name if name != "Inputs" else sh.Inputs


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="attribute nothing"):
        _ = sh.nothing


def test_names_are_listed() -> None:
    assert set(sh.__all__) <= set(dir(sh))


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, shallower, shallower.app.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

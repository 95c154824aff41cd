"""Commands made of dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from shallower.app.parameters import with_options
from shallower.core.options import Options, option


@dataclass(frozen=True)
class Colours(Options):
    title: ClassVar = "Colours"

    shade: Literal["light", "dark"] = option("light", "How bright.")
    count: int = option(2, "How many.", least=1)
    mix: bool = option(False, "Whether they mix.")


@dataclass(frozen=True)
class Tool(Options):
    about: ClassVar = "What to paint with."
    short: ClassVar = ("-t",)


@dataclass(frozen=True)
class Brush(Tool):
    width: float = option(1.0, "Width of the brush.")


@dataclass(frozen=True)
class Pen(Tool):
    ink: str = option("black", "What is in it.")


@pytest.fixture
def run() -> Any:
    """Runs a command, and returns what it was called with, or what it printed."""
    app = typer.Typer()
    seen: list[Any] = []

    @app.command()
    @with_options(variants={Tool: {"brush": Brush, "pen": Pen}})
    def paint(context: typer.Context, what: str, colours: Colours, tool: Tool) -> None:  # noqa: ARG001
        seen.append((what, colours, tool))

    def invoke(*arguments: str) -> Any:
        seen.clear()
        result = CliRunner().invoke(app, arguments)
        plain = re.sub(r"\x1b\[[\d;]*m", "", result.output)
        return (result.exit_code, seen[0] if seen else " ".join(plain.split()))

    return invoke


def test_the_function_gets_whole_objects(run: Any) -> None:
    assert run("door") == (0, ("door", Colours(), Brush()))
    given = ("--shade", "dark", "--count", "3", "--mix", "--tool", "pen", "--ink", "blue")
    assert run("door", *given) == (0, ("door", Colours("dark", 3, True), Pen("blue")))


def test_the_options_of_what_was_not_chosen_are_wrong_usage(run: Any) -> None:
    status, text = run("door", "--ink", "blue")
    assert status == 2
    assert "--tool brush has no such option" in text


@pytest.mark.parametrize("options", [("--count", "0"), ("--width", "nan"), ("--shade", "green"), ("--tool", "axe")])
def test_values_out_of_range_are_wrong_usage(run: Any, options: tuple[str, ...]) -> None:
    assert run("door", *options)[0] == 2

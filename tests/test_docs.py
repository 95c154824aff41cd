"""The documentation: its Python runs, its numbers are measured, and the site builds."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import shallower as sh

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
WITH_CODE = [name for name in PAGES if "```python\n" in (DOCS / name).read_text()]


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL):
        exec(compile(block, name, "exec"), names)


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("methods/")])
def test_a_methods_page_says_when_it_fails_and_takes_its_numbers_from_the_results(name: str) -> None:
    text = (DOCS / name).read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[:2] + headings[-2:] == ["Idea", "Formula", "When it fails", "Our numbers"]
    assert re.search(r"<!-- results: \w+ -->", text.partition("## Our numbers")[2])


def test_every_page_is_in_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text().partition("nav:")[2]
    assert [name for name in PAGES if name not in navigation] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=DOCS.parent, check=True)
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert fetched == [], page
    reference = (tmp_path / "site" / "reference" / "index.html").read_text()
    for name in ("find_sites", "squeeze", "StructuralDropout", "export"):
        assert 'id="shallower.' in reference
        assert name in reference


def examples_of(thing: object) -> list[str]:
    """The indented code of a docstring, before its sections."""
    text = re.split(r"^\w+:$", inspect.getdoc(thing) or "", maxsplit=1, flags=re.MULTILINE)[0]
    return [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", f"{text}\n", re.MULTILINE)]


def documented() -> Iterator[tuple[str, object]]:
    """Everything public, and the public methods of it, by name."""
    for name in sh.__all__:
        thing = getattr(sh, name)
        yield name, thing
        for key, part in vars(thing).items() if isinstance(thing, type) else ():
            if not key.startswith("_"):
                yield f"{name}.{key}", getattr(part, "__func__", part)


def test_examples_say_where_their_names_come_from() -> None:
    bare = {}
    for name, thing in documented():
        for example in examples_of(thing):
            try:
                nodes = list(ast.walk(ast.parse(example)))
            except SyntaxError:  # a formula
                continue
            named, imported = set(), set()
            for node in nodes:
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    named.add(node.id)
                elif isinstance(node, ast.alias):
                    imported.add(node.name)
            if (named - imported) & set(sh.__all__):
                bare[name] = example
    assert bare == {}

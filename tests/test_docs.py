"""The documentation: its Python runs, its numbers are measured, and the site builds."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

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


def examples_in(text: str) -> Iterator[str]:
    """The code in a docstring, before its sections: paragraphs that are indented, or that are nothing but code."""
    before = re.split(r"^\w+:$", text, maxsplit=1, flags=re.MULTILINE)[0]
    for paragraph in re.split(r"\n\s*\n", before):
        code = textwrap.dedent(paragraph).strip("\n")
        if re.search(r"\w\(", code) and (paragraph.startswith("    ") or is_python(code)):
            yield code


def is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def examples() -> Iterator[tuple[ModuleType, str, str]]:
    """Every example of the package: its module, what it is of, and its code."""
    for found in pkgutil.walk_packages(sh.__path__, "shallower."):
        module = importlib.import_module(found.name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for code in examples_in(ast.get_docstring(node) or ""):
                    yield module, f"{found.name}.{getattr(node, 'name', '')}", code


def public_examples() -> Iterator[tuple[str, str]]:
    """The examples of everything public, and of the public methods of it."""
    for name in sh.__all__:
        thing = getattr(sh, name)
        parts = {name: thing}
        if isinstance(thing, type):
            for key, part in vars(thing).items():
                if not key.startswith("_"):
                    parts[f"{name}.{key}"] = getattr(part, "__func__", part)
        for title, part in parts.items():
            for code in examples_in(inspect.getdoc(part) or ""):
                yield title, code


def test_public_examples_say_where_their_names_come_from() -> None:
    bare = {}
    for title, code in public_examples():
        named, imported = set(), set()
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                named.add(node.id)
            elif isinstance(node, ast.alias):
                imported.add(node.name)
        if (named - imported) & set(sh.__all__):
            bare[title] = code
    assert bare == {}


def test_examples_are_python_and_call_what_there_is_with_parameters_that_it_has() -> None:
    wrong = []
    for module, title, code in examples():
        if not is_python(code):
            wrong.append(f"{title}: no Python: {code}")
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sh" and not hasattr(sh, node.attr):
                wrong.append(f"{title}: there is no sh.{node.attr}")
            if isinstance(node, ast.Call) and (called := own(module, node.func)) is not None:
                try:
                    inspect.signature(called).bind_partial(
                        *node.args, **{k.arg: k.value for k in node.keywords if k.arg}
                    )
                except TypeError as error:
                    wrong.append(f"{title}: {ast.unparse(node)}: {error}")
    assert wrong == []


def own(module: ModuleType, called: ast.expr) -> Callable[..., object] | None:
    """What of this library an example calls, by its name in the module or in `sh`."""
    found: object = None
    if isinstance(called, ast.Name):
        found = vars(module).get(called.id)
    elif isinstance(called, ast.Attribute) and ast.unparse(called.value) == "sh":
        found = getattr(sh, called.attr, None)
    if callable(found) and str(getattr(found, "__module__", "")).startswith("shallower"):
        return found
    return None

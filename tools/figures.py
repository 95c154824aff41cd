"""How the code reads, in figures: sizes, density, copies, tests. A folder of rooms, or `src/shallower` alone.

    python tools/figures.py                     # this tree
    python tools/figures.py --tree ../other     # another checkout
    python tools/figures.py --list functions    # what is over a limit: modules, functions, signatures, tests, examples
    python tools/figures.py --check             # exit with 1 where a limit is broken

The finder is left out of sizes, density and tests where it stands in its rooms: it is to be rewritten.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FINDER = {
    "tracing", "pointwise", "units", "ways", "passages", "placing", "describing", "attention", "counting", "sums",
}  # fmt: skip

MOST_LINES = 500
MOST_FILES = 16
MOST_FUNCTION = 80
MOST_PARAMETERS = 10
MOST_CONDITIONALS = 10.0
MOST_COMPREHENSIONS = 20.0
MOST_SHARED_NAMES = 3.0

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One file and what was counted in it."""

    path: Path
    tree: ast.Module
    lines: int
    comments: int

    @property
    def finder(self) -> bool:
        """Whether it belongs to the finder."""
        return self.path.stem in FINDER


@dataclass
class Figures:
    """All figures of a tree, and the places behind them."""

    values: dict[str, float] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, key: str, value: float, limit: float | None = None, places: list[str] | None = None) -> None:
        """Keep a figure, and that it is over its limit."""
        self.values[key] = value
        if limit is not None and value > limit:
            self.broken.append(f"{key}: {value:g}, at most {limit:g}")
        if places is not None:
            self.places[key.split()[0]] = places


def modules_of(package: Path) -> list[Module]:
    """Every module of the package, parsed."""
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = sum(1 for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith("# noqa"))
        found.append(Module(path, ast.parse(text), text.count("\n"), comments))
    return found


def functions_of(module: Module) -> list[tuple[str, Function]]:
    """Functions and methods with their dotted names."""
    found: list[tuple[str, Function]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.append((prefix + child.name, child))
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")
            else:
                visit(child, prefix)

    visit(module.tree, "")
    return found


def parameters_of(function: Function) -> int:
    """Parameters of a signature, without `self` and `cls`."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def top_level_names(module: Module) -> list[str]:
    """Functions, classes and constants that a module defines."""
    names: list[str] = []
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names.extend(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("__")]


def without_example(tree: Path, package: Path) -> list[str]:
    """Public names but errors and warnings whose docstring has no indented example near its beginning."""
    stub = package / "__init__.pyi"
    door = ast.parse((stub if stub.exists() else package / "__init__.py").read_text(encoding="utf-8"))
    public: dict[str, str] = {}
    for node in ast.walk(door):
        if isinstance(node, ast.ImportFrom) and node.module:
            public |= {alias.name: node.module.removeprefix("shallower.") for alias in node.names}
    missing = []
    for module in modules_of(package):
        dotted = ".".join(module.path.relative_to(package).with_suffix("").parts)
        for node in module.tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or public.get(node.name) != dotted:
                continue
            if not node.name.endswith(("Error", "Warning")):
                text = ast.get_docstring(node) or ""
                if not any(line.startswith("    ") for line in text.splitlines()[:8]):
                    missing.append(f"{module.path.relative_to(tree)}: {node.name}")
    return missing


def figures_of(tree: Path) -> Figures:
    """Count everything.

    Args:
        tree: a checkout of the project.
    """
    package = tree / "src" / "shallower"
    everything = modules_of(package)
    ours = [m for m in everything if not m.finder]
    figures = Figures()

    def place(module: Module, name: str = "") -> str:
        return f"{module.path.relative_to(package)}{':' * bool(name)}{name}"

    figures.add("modules", len(everything))
    figures.add("lines", sum(m.lines for m in everything))
    folders = Counter(m.path.parent for m in everything)
    crowded = [f"{folder.relative_to(tree)}: {n}" for folder, n in folders.items() if n > MOST_FILES]
    figures.add("files in the largest folder", max(folders.values()), MOST_FILES, crowded)
    figures.add(
        "modules over 500 lines",
        len([m for m in ours if m.lines > MOST_LINES]),
        0,
        [f"{place(m)}: {m.lines}" for m in ours if m.lines > MOST_LINES],
    )
    long, wide = [], []
    for module in ours:
        for name, function in functions_of(module):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > MOST_FUNCTION:
                long.append(f"{place(module, name)}: {length} lines")
            if parameters_of(function) > MOST_PARAMETERS:
                wide.append(f"{place(module, name)}: {parameters_of(function)} parameters")
    figures.add("functions over 80 lines", len(long), 0, long)
    figures.add("signatures over 10 parameters", len(wide), 0, wide)

    lines = sum(m.lines for m in ours) / 1000
    density: dict[str, list[tuple[float, str]]] = {"conditionals": [], "comprehensions": []}
    totals = Counter[str]()
    for module in ours:
        nodes = list(ast.walk(module.tree))
        counts = {
            "conditionals": sum(isinstance(n, ast.IfExp) for n in nodes),
            "comprehensions": sum(isinstance(n, COMPREHENSIONS) for n in nodes),
        }
        for kind, count in counts.items():
            totals[kind] += count
            density[kind].append((count, place(module)))
    for kind, title, limit in (
        ("conditionals", "conditionals (expressions) per 1,000 lines", MOST_CONDITIONALS),
        ("comprehensions", "comprehensions per 1,000 lines", MOST_COMPREHENSIONS),
    ):
        most = [f"{name}: {count:g}" for count, name in sorted(density[kind], reverse=True)[:40]]
        figures.add(title, round(totals[kind] / lines, 1), limit, most)
    figures.add("comment lines per 1,000 lines", round(sum(m.comments for m in ours) / lines, 1))

    owners: dict[str, list[str]] = {}
    for module in everything:
        for name in set(top_level_names(module)):
            owners.setdefault(name, []).append(place(module))
    shared = {name: where for name, where in owners.items() if len(where) > 1}
    share = 100 * len(shared) / len(owners)
    names = [f"{name}: {', '.join(where)}" for name, where in sorted(shared.items())]
    figures.add("names defined in two modules, per cent", round(share, 1), MOST_SHARED_NAMES, names)

    tests = {path.stem.removeprefix("test_") for path in (tree / "tests").rglob("test_*.py")}
    outside = ("__init__.py", "__main__.py")
    untested = [place(m) for m in ours if m.path.name not in outside and m.path.stem not in tests]
    figures.add("tests missing (modules without a test file)", len(untested), 0, untested)
    missing = without_example(tree, package)
    figures.add("examples missing (public docstrings without one)", len(missing), 0, missing)
    return figures


def main() -> int:
    """Print the figures of one or two trees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--list", default="", help="show the places behind a figure, by its first word")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a limit is broken")
    arguments = parser.parse_args()
    figures = figures_of(arguments.tree.resolve())
    if arguments.list:
        print("\n".join(figures.places.get(arguments.list, [f"no figure begins with {arguments.list!r}"])))
        return 0
    for key, value in figures.values.items():
        print(f"{key:55} {value:g}")
    if arguments.check and figures.broken:
        print("\nover the limit:\n  " + "\n  ".join(figures.broken))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

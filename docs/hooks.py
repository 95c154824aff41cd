"""What pages of the documentation take from elsewhere when they are built, so that nothing is typed twice.

<!-- results: NAME -->      the section of results.md that `python -m benchmarks NAME` made
<!-- help: COMMAND -->      what `shallower COMMAND --help` prints
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by mkdocs for every page."""
    markdown = re.sub(r"<!-- results: (\w+) -->", lambda match: results(match[1]), markdown)
    return re.sub(r"<!-- help: ?([\w-]*) -->", lambda match: help_of(match[1]), markdown)


def results(name: str) -> str:
    """The section of a benchmark, one heading deeper; a line that says so where it has not been run."""
    for section in (DOCS / "results.md").read_text().split("\n## ")[1:]:
        if re.search(rf"^    python -m benchmarks {name}\b", section, re.MULTILINE):
            return f"### {section.strip()}\n"
    return f"*Not measured yet: `python -m benchmarks {name}`.*\n"


def help_of(command: str) -> str:
    """The help of a command, as it stands in a terminal of 80 columns."""
    words = [sys.executable, "-m", "shallower", *filter(None, [command]), "--help"]
    told = subprocess.run(words, capture_output=True, text=True, check=True)
    return f"```text\n{told.stdout.rstrip()}\n```\n"

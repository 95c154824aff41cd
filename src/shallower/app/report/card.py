"""README.md of a saved model: what it was made from, how, what it costs, and how to load it.

    write_card("small/")

The front matter is what model hubs read; the numbers are those of result.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from shallower.app.report.data import METHODS, RESULT, Report, read_report, source_of
from shallower.app.report.page import summary, usage
from shallower.core.files import write_text
from shallower.core.text import amount
from shallower.errors import ReportError
from shallower.saving.card import NAME, plain_card

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def write_card(directory: str | Path, *, at: str | Path | None = None) -> Path:
    """Write README.md into a saved directory, whole or not at all.

    Without result.json (a plain `save`) the card says only how the model is built and loaded.

    Args:
        directory: what `save` or a command here wrote, or is writing.
        at: what the card shall call the directory, if it is to be moved.

    Raises:
        ReportError: a file is damaged, or the card cannot be written.
    """
    directory = Path(directory).expanduser()
    name = str(at or directory)
    if (directory / RESULT).is_file():
        text = card(read_report(directory, at=at))
    else:
        text = plain_card(name, source_of(directory, ""))
    path = directory / NAME
    write_text(path, text, error=ReportError)
    return path


def card(report: Report) -> str:
    """The card of a result with numbers."""
    before, after = report.before, report.after
    method = METHODS.get(report.method, report.method)
    rows = [
        (report.quality, report.told(before.score), report.told(after.score)),
        ("parameters", amount(before.params), amount(after.params)),
        ("MACs", amount(before.macs), amount(after.macs)),
        ("memory", f"{amount(before.memory)}B", f"{amount(after.memory)}B"),
    ]
    if before.latency is not None and after.latency is not None:
        rows.append(("latency", f"{before.latency * 1e3:.3g} ms", f"{after.latency * 1e3:.3g} ms"))
    table = "\n".join(f"| {name} | {old} | {new} |" for name, old, new in rows)
    measured = "\n".join(f"- {what}: {how}" for what, how in report.measured)
    code = "\n\n".join(f"{s.title}:\n\n```{s.language}\n{s.code}\n```" for s in usage(report))
    name = Path(report.model.partition("?")[0]).name
    made_from = name if Path(report.model).expanduser().exists() else report.model
    notes = "".join(f"\n> {warning}\n" for warning in report.warnings)
    return f"""{_front_matter(report)}
# {name}, squeezed

`{made_from}` made smaller by {method}{f" (target `{report.target}`)" if report.target else ""}. {summary(report)}
{notes}
| | before | after |
|---|---:|---:|
{table}

## How to load it

{code}

## How it was measured

{measured}

The whole story is in `report.html`, the plan in `plan.json`, all numbers in `result.json`.
"""


def _front_matter(report: Report) -> str:
    lines = [f"library_name: {'transformers' if report.stock else 'shallower'}"]
    local = Path(report.model).expanduser().exists()
    if not local and _HUB_NAME.fullmatch(report.model):
        lines.append(f"base_model: {json.dumps(report.model)}")
    if _HUB_NAME.fullmatch(report.data) and not Path(report.data).expanduser().exists():
        lines += ["datasets:", f"- {json.dumps(report.data)}"]
    lines += ["tags:", "- shallower", "- compressed"]
    if report.method:
        lines.append(f"- {json.dumps(report.method)}")
    return "\n".join(["---", *lines, "---"])

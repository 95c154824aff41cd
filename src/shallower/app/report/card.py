"""README.md of a saved model: what it was made from, how, what it costs, and how to load it.

    write_card("small/")

The front matter is what model hubs read; the numbers are those of result.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from shallower.app import quality as qualities
from shallower.app.options import HUB_NAME
from shallower.app.report.data import Report, read_report, source_in
from shallower.app.report.page import headline, title, usage
from shallower.app.results import RESULT
from shallower.core.files import write_text
from shallower.core.text import amount
from shallower.errors import ReportError
from shallower.saving.card import NAME, plain_card


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
        text = plain_card(name, source_in(directory, ""))
    path = directory / NAME
    write_text(path, text, error=ReportError)
    return path


def card(report: Report) -> str:
    """The card of a result with numbers."""
    before, after, record = report.before, report.after, report.record
    rows = [
        (report.quality, report.shown(before.score), report.shown(after.score)),
        ("parameters", amount(before.params), amount(after.params)),
        ("MACs", amount(before.macs), amount(after.macs)),
        ("size", f"{amount(before.size)}B", f"{amount(after.size)}B"),
    ]
    if before.latency is not None and after.latency is not None:
        rows.append(("latency", qualities.seconds(before.latency), qualities.seconds(after.latency)))
    table = "\n".join(f"| {name} | {old} | {new} |" for name, old, new in rows)
    measured = "\n".join(f"- {what}: {how}" for what, how in report.measured)
    code = "\n\n".join(f"{s.title}:\n\n```{s.language}\n{s.code}\n```" for s in usage(report))
    if report.not_stock:
        code += f"\n\nTransformers alone does not load it (`from_pretrained`): {report.not_stock}"
    made_from = record.model
    if Path(record.model).expanduser().exists():
        made_from = Path(record.model.partition("?")[0]).name
    target = ""
    if record.target:
        target = f" (target `{record.target}`)"
    answers = ""
    if record.certificate is not None:
        answers = "\n" + " ".join(record.certificate.sentences) + "\n"
    notes = "".join(f"\n> {warning}\n" for warning in record.warnings)
    alarms = "".join(f"\n> [!CAUTION]\n> {alarm}\n" for alarm in record.alarms)
    summary = f"\n{record.summary}\n" if record.summary else ""
    return f"""{_front_matter(report)}
# {title(report)}

`{made_from}` made smaller by {report.method}{target}. {headline(report)}
{alarms}{summary}{notes}
| | before | after |
|---|---:|---:|
{table}
{answers}
## How to load it

{code}

## How it was measured

{measured}

The report is `report.html`, the plan `plan.json`; all numbers are in `result.json`.
"""


def _front_matter(report: Report) -> str:
    library, record = "shallower", report.record
    if report.stock:
        library = "transformers"
    lines = [f"library_name: {library}"]
    if _is_on_hub(record.model):
        lines.append(f"base_model: {json.dumps(record.model)}")
    if _is_on_hub(record.data):
        lines += ["datasets:", f"- {json.dumps(record.data)}"]
    lines += ["tags:", "- shallower", "- compressed"]
    if record.method:
        lines.append(f"- {json.dumps(record.method)}")
    return "\n".join(["---", *lines, "---"])


def _is_on_hub(name: str) -> bool:
    """Whether a name is one of a hub, not of a folder here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).expanduser().exists()

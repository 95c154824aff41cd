"""What a report says, as plain data, made of the files of a result.

report = read_report("small/")
report.verdict.small, report.sites
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shallower.app import quality as qualities
from shallower.app.options import METHODS
from shallower.app.report.stock import read_object, stock_class
from shallower.app.results import CURVE, CurvePoint, Measured, Record, SiteRow, Speed, read_points, read_record
from shallower.certifying.certificate import Certificate
from shallower.errors import ReportError

_PICK = "shallower pick {directory} --target {target} --output {output}"
_LIBRARIES = ("timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    Attributes:
        directory: as commands and code on the page name it.
        record: what result.json says.
        curve: other models that the same training or calibration gives, with those two or without.
        measured: how the numbers came about: (what, how).
        source: how the architecture is built again; "" where only the user can.
        stock: the class in Transformers that loads the result as it is, or "".
        not_stock: for a Transformers model that no class loads as it is, the reason.
        command: what makes a smaller or larger model of the curve, with {directory}, {target} and {output}; "" if none.
    """

    directory: str
    record: Record
    curve: tuple[CurvePoint, ...] = ()
    measured: tuple[tuple[str, str], ...] = ()
    source: str = ""
    stock: str = ""
    not_stock: str = ""
    command: str = ""

    @property
    def quality(self) -> str:
        """What the score is."""
        return self.record.quality

    @property
    def before(self) -> Measured:
        """The model as it was."""
        return self.record.dense

    @property
    def after(self) -> Measured:
        """The model that was saved."""
        return self.record.small

    @property
    def speedup(self) -> float | None:
        """How many times faster the second was; None where that was not measured."""
        if self.record.speed is None:
            return None
        return self.record.speed.measured

    @property
    def sites(self) -> tuple[SiteRow, ...]:
        """What became of each site."""
        return self.record.sites

    @property
    def method(self) -> str:
        """What a sentence calls the method."""
        known = METHODS.get(self.record.method)
        if known is None:
            return self.record.method
        if self.record.options.get("heal"):
            return f"{known.spoken} and distillation"
        return known.spoken

    @property
    def version(self) -> str:
        """Of this library, when the result was made."""
        return str(self.record.machine.get("shallower", ""))

    @property
    def again(self) -> bool:
        """Whether loading needs a fresh instance of the user's own class."""
        return self.source.partition(":")[0] not in _LIBRARIES

    def shown(self, score: float) -> str:
        """A score as people read it."""
        return qualities.shown(self.quality, score)

    def difference(self) -> str:
        """How the quality changed."""
        return qualities.difference(self.quality, self.before.score, self.after.score)


def read_report(directory: str | Path, *, at: str | Path | None = None) -> Report:
    """The report on a saved directory, from its result.json, config.json and, where there is one, curve.json.

        read_report("small/").before.params

    Args:
        directory: what a command here wrote.
        at: what the page shall call the directory, if it is to be moved.

    Raises:
        ReportError: a file is missing, damaged or not what it should be; the error names it and the key.
    """
    directory = Path(directory).expanduser()
    record = read_record(directory, ReportError)
    curve: tuple[CurvePoint, ...] = ()
    command = ""
    if (directory / CURVE).is_file():
        curve = read_points(directory, ReportError)
        command = _PICK
    stock, not_stock = stock_class(directory)
    return Report(
        str(at or directory),
        record,
        curve,
        tuple(_measured(record)),
        source_in(directory, record.model),
        stock,
        not_stock,
        command,
    )


def source_in(directory: Path, model: str) -> str:
    """How the architecture of a saved directory is built again, as far as it says; "" where only the user can.

    Raises:
        ReportError: a file cannot be read.
    """
    folders = [directory]
    if model:
        folders.append(Path(model).expanduser())
    for folder in folders:
        description = folder / "shallower.json"
        if description.is_file():
            return str(read_object(description).get("source", ""))
    if model.partition(":")[0] in _LIBRARIES[:2]:
        return model
    config = directory / "config.json"
    if not config.is_file():
        return ""
    names = read_object(config).get("architectures")
    if not isinstance(names, list) or not names:
        return ""
    return f"transformers:{names[0]}"


def _measured(record: Record) -> list[tuple[str, str]]:
    """How the numbers came about, one paragraph each."""
    found = []
    if record.rows:
        found.append((f"Quality ({record.quality})", _quality_measured(record)))
    if record.certificate is not None:
        found.append(("Changed answers", _answers_counted(record.certificate)))
    elif record.details.get("uncertified"):
        found.append(("Changed answers", f"Not certified: {record.details['uncertified']}."))
    if record.speed is not None:
        found.append(("Latency", _latency_measured(record, record.speed)))
    found += [
        (
            "MACs and parameters",
            "Counted: multiply-accumulates of one forward pass on those inputs; tied parameters once.",
        ),
        ("Size", "Bytes of parameters and buffers."),
    ]
    if record.details.get("tried"):
        found.append(("Settings tried", str(record.details["tried"])))
    if record.options.get("seed") is not None:
        found.append(("Seed", str(record.options["seed"])))
    if record.seconds:
        found.append(("Time taken", _duration(record.seconds)))
    versions = [f"{key} {record.machine[key]}" for key in ("shallower", "torch", "python") if record.machine.get(key)]
    if versions:
        found.append(("Versions", ", ".join(versions)))
    return found


def _quality_measured(record: Record) -> str:
    tested, chosen, used = (record.rows.get(name) or 0 for name in ("test", "validation", "train"))
    rows = qualities.rows_of(record.quality)
    where = (
        f"Measured on the {chosen:,} validation {rows}: the data has no test set, and the same {rows} were used to "
        "make choices, so this may be optimistic."
    )
    if tested:
        where = f"Measured on {tested:,} test {rows} that no choice was based on; choices used {chosen:,} others."
    calibrated = record.details.get("calibrated")
    if isinstance(calibrated, int):
        where = f"{where} {calibrated:,} of {used:,} training {rows} were calibrated on."
    if not isinstance(calibrated, int) or record.options.get("heal") or record.options.get("dense_epochs"):
        where = f"{where} {used:,} {rows} were trained on."
    return where


def _answers_counted(certificate: Certificate) -> str:
    text = f"Both models on {certificate.rows:,} test rows, on which nothing was calibrated, trained or chosen"
    if certificate.kind == "answers":
        text += "; the bound is one-sided (Clopper-Pearson) and counts rows"
        if certificate.tokens is not None:
            text += ", one position of each drawn at random"
    return f"{text}. Intervals hold 95 % of bootstrap samples of the rows."


def _latency_measured(record: Record, speed: Speed) -> str:
    machine = record.machine
    inputs = ""
    if record.example:
        inputs = f" on inputs of {' x '.join(map(str, record.example))}"
    threads = ""
    if machine.get("threads") == 1:
        threads = ", 1 thread"
    elif machine.get("threads"):
        threads = f", {machine['threads']} threads"
    device = machine.get("device") or machine.get("processor", "")
    return (
        f"Median forward pass{inputs}, the two models timed alternately, so that background load affects both; "
        f"{device}{threads}. The ratio of the times varied by {speed.spread:.1%} between its quartiles."
    )


def _duration(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"

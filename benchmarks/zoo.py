"""How much of a network can be reached? All sites of all families of networks cut in half at once.

Families of Transformers, timm, torchvision and hand-written networks in tiny random configurations. In each, every site
that channels can be taken from loses half of them, all in one plan. The result is proven, compared with the simulated
network on inputs of other shapes, saved and loaded. A width is an output axis of a weight of two or more dimensions,
without those of the model's own outputs; they are counted without the finder. It is reached where half of it went.

    python -m benchmarks zoo                    # a row for each family; it goes on where it was stopped
    python -m benchmarks zoo --family llama     # one family, with the reasons in full
    python -m benchmarks zoo --quick            # a few families
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import shallower as sh
from benchmarks.families import Family, Headed, families
from benchmarks.families.axes import Width, called, numbers, widths
from benchmarks.record import markdown, write_json
from shallower.core.inputs import Inputs
from shallower.errors import PlanError, ShallowerError
from shallower.finding.channels.following import Following
from shallower.finding.channels.layout import ONE, runs
from shallower.finding.channels.spaces import followed_sites
from shallower.finding.kinds import SiteKind
from shallower.recording.tracing import trace_forward
from shallower.saving.reading import read_description
from shallower.saving.sources import import_transformers, source_of
from shallower.saving.vision import repair_torchvision
from shallower.surgery.paths import affine

KINDS: tuple[SiteKind, ...] = ("hidden", "heads", "stream", "experts")
MOST_SECONDS = 90
MOST_PARAMS = 60_000_000
CLOSE = 1e-4
FLOOR = 0.95
SILENT = "nothing is said"
LOADS = "loads"
QUICK = ("bert", "llama", "cifar_resnet", "hand_unet", "hand_qkv_packed", "hand_moe_tensors", "tv_fpn")


@dataclass
class Row:
    """What was found for one family.

    Attributes:
        name, group: of the family.
        widths, reached: how many there are, and how many were cut in half.
        remaining: share of the parameters that is left.
        find, apply: seconds of the CPU.
        closed: reason -> how many widths.
        left: the widths that were not reached, each with the reason.
        error: what went wrong, "" where nothing did: the type and what it says.
        stage: during what: "build" where the network could not be made, which is no fault of the surgery.
        planned: whether the error is a `ShallowerError`.
        refused: what the proof refused of the whole plan, while parts of it were proven.
        shapes: how many inputs of other shapes were compared.
        stock: of a model of Transformers: "loads" where its class loads the result and gives the same, or why not.
    """

    name: str
    group: str
    widths: int = 0
    reached: int = 0
    remaining: float = 1.0
    find: float = 0.0
    apply: float = 0.0
    closed: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    error: str = ""
    stage: str = ""
    planned: bool = False
    refused: str = ""
    shapes: int = 0
    stock: str = ""

    def note(self, left: list[str]) -> None:
        """Keep what was not reached, and count the reasons."""
        if self.refused:
            left = [line.replace(SILENT, "the surgery of a part of the plan was refused") for line in left]
        self.left = left
        self.closed = dict(Counter(general(line.partition(": ")[2]) for line in left).most_common())

    @property
    def counts(self) -> bool:
        """Whether it is a family of the zoo: it could be made and run."""
        return self.stage != "build" and self.widths > 0


# ------------------------------------------------------------------------------------------------------- one family


def examined(family: Family) -> Row:
    """Everything that is measured of one family; errors are kept in the row."""
    row = Row(family.name, family.group, stage="build")
    try:
        with at_most(MOST_SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(family, row)
    except Exception as error:  # one family must not end the others
        row.error = in_short(error)
        row.planned = isinstance(error, ShallowerError)
    return row


def _examine(family: Family, row: Row) -> None:
    model, inputs = family.build()
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMS:
        raise MemoryError("it is not tiny")
    counted = widths(model, inputs)
    row.widths = len(counted)
    row.stage = "find"
    started = time.process_time()
    sites = sh.find_sites(model, inputs, kinds=KINDS)
    row.find = time.process_time() - started
    said = reasons(model, inputs, sites)
    row.note(unreached(counted, (), said))
    row.stage = "apply"
    started = time.process_time()
    entries, small, refused = proven_together(model, inputs, together(model, sites))
    row.apply = time.process_time() - started
    row.refused = refused
    params = [sum(p.numel() for p in each.parameters()) for each in (small, model)]
    row.remaining = params[0] / max(1, params[1])
    cut = reached(counted, small)
    row.reached = len(cut)
    row.note(unreached(counted, cut, said))
    if not entries:
        row.stage = ""
        return
    row.stage = "other shapes"
    row.shapes = compared(model, small, sh.Plan(tuple(entries)), inputs)
    row.stage = "save"
    with tempfile.TemporaryDirectory() as folder:
        sh.save(small, Path(folder) / "out")
        row.stage = "load"
        again = sh.load(Path(folder) / "out", model=family.build()[0]).eval()
    with torch.no_grad():
        for here, there in zip(numbers(small, inputs), numbers(again, inputs), strict=True):
            if not torch.equal(here, there) and not torch.equal(here.isnan(), there.isnan()):
                raise ArithmeticError("the loaded network gives other numbers")
    row.stage = "stock"
    row.stock = loaded_as_stock(small, inputs)
    row.stage = ""


def loaded_as_stock(small: nn.Module, inputs: Inputs) -> str:
    """Whether the class of Transformers loads the network: "loads", or why not; "" of other networks.

    Raises:
        ArithmeticError: what it loads gives other numbers.
    """
    part: Any = small
    if isinstance(small, Headed):
        part = small.model
    if not source_of(part):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        sh.save(part, Path(folder) / "part")
        stock = read_description(Path(folder) / "part").stock
        if stock.why:
            return stock.why
        import_transformers().utils.logging.disable_progress_bar()
        attention = part.config._attn_implementation
        again = type(part).from_pretrained(Path(folder) / "part", attn_implementation=attention).eval()
    if isinstance(small, Headed):
        whole = copy.deepcopy(small)
        whole.model = again
        again = whole
    with torch.no_grad():
        for here, there in zip(numbers(small, inputs), numbers(again, inputs), strict=True):
            if not torch.allclose(here, there, rtol=CLOSE, atol=CLOSE, equal_nan=True):
                raise ArithmeticError("the stock class loads the network and gives other numbers")
    return LOADS


def together(model: nn.Module, sites: Iterable[sh.Site]) -> list[sh.Entry]:
    """Half of every site, the followed ones first, without those that cut what another has cut."""
    ordered = sorted(sites, key=lambda site: not site.followed)
    usable = [site for site in ordered if site.width > 1 and site.bridge.not_narrow is None]
    wanted = [narrowed(model, site) for site in usable]
    if _fits(wanted):
        return wanted
    entries: list[sh.Entry] = []
    for entry in wanted:
        if _fits([*entries, entry]):
            entries.append(entry)
    return entries


def _fits(entries: Sequence[sh.Entry]) -> bool:
    """Whether no two of them cut the same."""
    try:
        sh.Plan(tuple(entries))
    except PlanError:
        return False
    return True


def narrowed(model: nn.Module, site: sh.Site, seed: int = 0) -> sh.Entry:
    """Half of a site's channels, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(site.width, generator=generator)[: (site.width + 1) // 2].sort().values
    if not site.norm_after:
        return sh.Entry.narrow(site, kept)
    # what a BatchNorm makes zero, so that a padded convolution may read it
    scale, shift = affine(model, site.norm_after) or (torch.ones(1), torch.zeros(1))
    return sh.Entry.narrow(site, kept, -shift.double() / scale.double())


def proven_together(
    model: nn.Module, inputs: Inputs, entries: Sequence[sh.Entry]
) -> tuple[list[sh.Entry], nn.Module, str]:
    """The entries that can be applied together, the result, and why not all of them can: "" where they can."""
    if not entries:
        return [], model, ""
    try:
        return list(entries), sh.apply(model, sh.Plan(tuple(entries)), inputs), ""
    except ShallowerError as error:
        reason = in_short(error)
    if len(entries) == 1:
        return [], model, reason
    half = len(entries) // 2
    first, small, _ = proven_together(model, inputs, entries[:half])
    second, other, _ = proven_together(model, inputs, entries[half:])
    try:
        both = [*first, *second]
        return both, sh.apply(model, sh.Plan(tuple(both)), inputs), reason
    except ShallowerError:
        if len(first) >= len(second):
            return first, small, reason
        return second, other, reason


def in_short(error: Exception) -> str:
    """The type of an error and what it says, on one line: where that is long, how it begins and how it ends."""
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = f"{text[:150]} ... {text[-240:]}"
    return f"{type(error).__name__}: {text}"


def compared(model: nn.Module, small: nn.Module, plan: sh.Plan, inputs: Inputs) -> int:
    """On how many inputs of other shapes the network and the simulated one agree.

    Raises:
        ArithmeticError: they do not.
    """
    simulated = sh.simulate(model, plan)
    count = 0
    for other in other_inputs(inputs):
        with torch.no_grad():
            try:
                called(model, other)
            except Exception:  # the network itself does not take this shape
                continue
            expected, given = numbers(simulated, other), numbers(small, other)
        for one, two in zip(expected, given, strict=True):
            difference = float((one - two).nan_to_num().abs().max() / one.nan_to_num().abs().max().clamp(min=1e-6))
            if difference > CLOSE:
                raise ArithmeticError(f"on inputs of another shape the result differs by {difference:.1e}")
        count += 1
    return count


def other_inputs(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with another batch size, and with another length or resolution."""
    tensors = (
        [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    )
    batch = next((t.shape[0] for t in tensors if isinstance(t, Tensor) and t.dim() > 0), 0)

    def larger(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.shape[0] != batch:
            return tensor
        return torch.cat((tensor, tensor.flip(0)[:1]))

    def longer(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            return tensor
        if tensor.dim() >= 4:
            return torch.cat((tensor, tensor.flip(-1)), -1)
        if tensor.dim() == 3 and tensor.shape[1] <= 16:
            return torch.cat((tensor, tensor.flip(1)[:, :2]), 1)
        return torch.cat((tensor, tensor.flip(-1)[..., : max(1, tensor.shape[-1] // 4)]), -1)

    for change in (larger, longer):
        if isinstance(inputs, Tensor):
            yield change(inputs)
        elif isinstance(inputs, Mapping):
            yield {key: change(value) for key, value in inputs.items()}
        else:
            yield tuple(change(value) for value in inputs)


def reached(counted: Iterable[Width], small: nn.Module) -> set[Width]:
    """The widths half of which went."""
    left = dict(small.named_parameters())
    found = set()
    for width in counted:
        parameter = left.get(width.tensor)
        if parameter is None:
            found.add(width)
            continue
        if width.is_halved(parameter):
            found.add(width)
    return found


def unreached(counted: Iterable[Width], cut: Iterable[Width], said: Mapping[str, str]) -> list[str]:
    """The widths that were not reached, each with the reason."""
    done = set(cut)
    found = []
    for width in counted:
        if width not in done:
            reason = said.get(f"{width.tensor}[{width.axis}]", "")
            found.append(f"{width.tensor}[{width.axis}] of {width.size}: {reason[:200] or SILENT}")
    return found


def reasons(model: nn.Module, inputs: Inputs, sites: sh.Sites) -> dict[str, str]:
    """Of every axis of every weight, why its channels stay: what was followed says it, or else what was skipped."""
    f = Following(trace_forward(model, inputs))
    spaces, _ = followed_sites(f, [site for site in sites if not site.followed])
    refused = {each.run: sites.skipped.get(each.site.name, "") for each in spaces}
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for (module, attribute), value in f.trace.weights.items():
        for axis, layout in enumerate(f.axes(value)):
            inside = dict.fromkeys(runs(layout))
            said = [refused.get(run, "") for run in inside]
            said += [run.closed for run in inside if run.closed != ONE]
            said.append(sites.skipped.get(names[module], ""))
            said += [run.closed for run in inside]
            text = next((reason for reason in said if reason), "")
            found[f"{names[module]}.{attribute}".lstrip(".") + f"[{axis}]"] = text
    return found


def general(reason: str) -> str:
    """A reason without the names and numbers of one network."""
    reason = re.sub(r"(in|of|at|by|weight) (?:\w+\.)+\w+", r"\1 a layer", reason)
    reason = re.sub(r"` in (?!a layer)\w+", "` in a layer", reason)
    return re.sub(r"\d+", "N", reason)[:160]


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Ends what computes longer."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


# --------------------------------------------------------------------------------------------------------- all of them


def run(data: Path, quick: bool, cache: Path, only: str = "") -> dict[str, Any]:
    """Examine every family, or those whose names begin with `only`; the rows of this code are kept in the cache."""
    del data
    repair_torchvision()
    chosen = families()
    if only:
        chosen = [family for family in chosen if family.name.startswith(only)]
    elif quick:
        chosen = [family for family in chosen if family.name in QUICK]
    path = cache / f"rows-{digest()}.json"
    done: dict[str, Any] = {}
    if path.exists() and not only:
        done = json.loads(path.read_text())
    for family in tqdm(chosen, "families", disable=None):
        if family.name not in done:
            row = examined(family)
            tqdm.write(line(row), sys.stderr)
            done[family.name] = asdict(row)
            if not only:
                write_json(path, done)
    rows = [done[family.name] for family in chosen]
    if not only:
        # thousands of lines that the reasons sum up; the cache holds them
        rows = [{**row, "left": []} for row in rows]
    return {"code": digest(), "commit": commit(), "rows": rows}


def line(row: Row) -> str:
    """What was found for one family, in a line."""
    if not row.counts:
        return f"{row.name}: not made: {row.error}"
    why = row.error or row.refused or next(iter(row.closed), "")
    found = f"{row.reached} of {row.widths} widths, {100 * row.remaining:.0f} % of the parameters are left"
    return f"{row.name}: {found}, {row.find:.1f} and {row.apply:.1f} s{'; ' * bool(why)}{why[:120]}"


def digest() -> str:
    """Of the library's code: rows of another are measured anew."""
    whole = hashlib.sha256()
    folder = Path(sh.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        whole.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def commit() -> str:
    """The commit of this checkout, "" where it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def table(found: Mapping[str, Any]) -> str:
    """A row for each group, the families that are not reached well, and the reasons."""
    rows = [Row(**row) for row in found["rows"]]
    counted = [row for row in rows if row.counts]
    measured = f"Measured at commit {found['commit']}." if found.get("commit") else ""
    if found.get("not_run"):
        measured += f" {found['not_run']} of the families were not run."
    parts = [measured, _totals(counted), _short(counted), _why(counted), _in_full(counted), _not_made(rows)]
    return "\n\n".join(part for part in parts if part)


def _share(rows: Sequence[Row]) -> str:
    return f"{100 * sum(row.reached for row in rows) / max(1, sum(row.widths for row in rows)):.1f} %"


def _totals(rows: Sequence[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    lines = []
    for name, own in [*groups.items(), ("all", list(rows))]:
        remaining = sum(row.remaining for row in own) / max(1, len(own))
        wrong = [row for row in own if row.error]
        lines.append(
            [
                name,
                str(len(own)),
                str(sum(row.widths for row in own)),
                _share(own),
                str(sum(row.reached >= FLOOR * row.widths for row in own)),
                f"{100 * remaining:.0f} %",
                f"{sum(row.find for row in own) / max(1, len(own)):.1f}",
                f"{sum(row.apply for row in own) / max(1, len(own)):.1f}",
                f"{sum(row.stock == LOADS for row in own)} of {sum(bool(row.stock) for row in own)}",
                str(sum(bool(row.refused) for row in own)),
                str(len(wrong)),
                str(sum(not row.planned for row in wrong)),
            ]
        )
    header = ["families", "number", "widths", "reached", "95 % reached", "params left", "find (CPU s)", "apply (CPU s)"]
    return markdown(
        [*header, "stock class loads", "plans refused in part", "errors", "of these no `ShallowerError`"], lines
    )


def _short(rows: Sequence[Row]) -> str:
    """Every family of which less than the floor is reached, or that ends in an error."""
    lines = []
    for row in sorted(rows, key=lambda row: (row.reached / row.widths, row.name)):
        if row.reached >= FLOOR * row.widths and not row.error and not row.refused:
            continue
        why = row.error or row.refused or next(iter(row.closed), "")
        where = f" ({row.stage})" if row.stage else ""
        lines.append([f"{row.name}", f"{row.reached} of {row.widths}", cell(f"{why}{where}")])
    if not lines:
        return ""
    return "Families of which less is reached, or that end in an error:\n\n" + markdown(
        ["family", "reached", "most frequent reason"], lines
    )


def _why(rows: Sequence[Row]) -> str:
    reasons: Counter[str] = Counter()
    families_of: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.closed)
        families_of.update(row.closed.keys())
    if not reasons:
        return ""
    lines = [[cell(why), str(families_of[why]), str(count)] for why, count in reasons.most_common(20)]
    return "What stays closed, and why:\n\n" + markdown(["reason", "families", "widths"], lines)


def _in_full(rows: Sequence[Row]) -> str:
    lines = [f"    {row.name}: {left}" for row in rows for left in row.left]
    return "\n".join(lines)


def _not_made(rows: Sequence[Row]) -> str:
    missing = sum(not row.counts for row in rows)
    if not missing:
        return ""
    return f"{missing} more could not be made tiny, or run on no inputs known here; they do not count."


def cell(text: str) -> str:
    return text.replace("|", "/")[:150]

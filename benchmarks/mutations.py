"""Does the proof of surgery see what it must see? Surgery is altered at random, and `proven` has to refuse the result.

    python -m benchmarks mutations              # at least 1,000 alterations in each type, about 20 minutes
    python -m benchmarks mutations --quick      # 25 in each type

A step of a plan is a list of edits. An alteration changes a row or a column of a weight or shifts a vector in one edit,
leaves one edit out (of one that sets weights: they are zeros), or performs one twice. Those count that change the
output of the float64 network by more than 100 times the machine epsilon of the type in question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import markdown
from shallower.errors import ShallowerError
from shallower.finding.kinds import SiteKind, find_sites
from shallower.modules.attachment import detached_copy
from shallower.modules.edits import Edit, Weights, perform
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.forms import Step, steps
from shallower.sites import Site
from shallower.surgery.observing import relative_error
from shallower.surgery.operating import edits_of_step
from shallower.surgery.padding import move_padding
from shallower.surgery.proof import proven

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = ("linear", "gated", "packed", "convolution", "padding", "heads", "followed")
SITES: dict[str, tuple[SiteKind, ...]] = {"heads": ("heads",), "followed": ("hidden", "stream")}
"""Which kinds of sites are looked for in a network, where they are not hidden ones alone."""

OPERATIONS = ("row", "column", "shift", "left out", "twice")


# ------------------------------------------------------------------------------------------------------- the networks


class _Gated(nn.Module):
    def __init__(self, d: int, n: int, bias: bool) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, n, bias), nn.Linear(d, n, bias), nn.Linear(n, d, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class _Packed(nn.Module):
    def __init__(self, both: nn.Module, down: nn.Module, gate_first: bool, dim: int) -> None:
        super().__init__()
        self.both, self.down, self.gate_first, self.dim = both, down, gate_first, dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, self.dim)
        y: Tensor = self.down(F.gelu(a) * b if self.gate_first else a * F.gelu(b))
        return y


class _Attention(nn.Module):
    def __init__(self, d: int, heads: int, packed: bool) -> None:
        super().__init__()
        self.heads, self.packed = heads, packed
        self.qkv = nn.ModuleList([nn.Linear(d, 3 * 2 * heads)] if packed else [nn.Linear(d, 2 * heads) for _ in "qkv"])
        self.o = nn.Linear(2 * heads, d)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv[0](x).chunk(3, -1) if self.packed else [m(x) for m in self.qkv]
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1).transpose(1, 2) for t in made)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y: Tensor = self.o(z.reshape(*x.shape[:2], -1))
        return y


class _Excited(nn.Module):
    """A residual block with squeeze and excitation, between two maps of its stream, and a norm over the channels."""

    def __init__(self, d: int, n: int, bias: bool, norm: bool) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, d, 1), nn.Linear(d, 3)
        self.expand, self.project = nn.Conv2d(d, n, 1, bias=bias), nn.Conv2d(n, d, 1, bias=bias)
        self.depthwise, self.norm = nn.Conv2d(n, n, 3, padding=1, groups=n), nn.BatchNorm2d(n)
        self.reduce, self.excite = nn.Conv2d(n, 2, 1), nn.Conv2d(2, n, 1)
        self.last = nn.LayerNorm(d) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = F.silu(self.norm(self.depthwise(F.silu(self.expand(x)))))
        scale = self.excite(F.relu(self.reduce(h.mean((2, 3), keepdim=True)))).sigmoid()
        y: Tensor = self.out(self.last((x + self.project(h * scale)).mean((2, 3))))
        return y


class _Random:
    """Small random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    def one_of(self, choices: Sequence[Any]) -> Any:
        return choices[self.number(0, len(choices) - 1)]

    def share(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A network, an input for it, and the steps of a random plan."""

    model: nn.Module
    x: Tensor
    todo: tuple[Step, ...]


def case(kind: str, dtype: torch.dtype, seed: int) -> Case:
    """A random network of a kind, and a random plan for all its sites."""
    choose = _Random(seed)
    torch.manual_seed(seed)
    model, x = _network(kind, choose)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_var is not None
            assert module.running_mean is not None
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    model, x = model.to(dtype).eval(), x.to(dtype)
    if kind == "padding" and choose.share() < 0.5:
        model = move_padding(model, find_sites(model, x))
    cut = kind in SITES
    sites = find_sites(model, x, kinds=SITES.get(kind, "hidden")).select(lambda site: site.followed == cut)
    return Case(model, x, tuple(steps([_entry(site, choose) for site in sites])))


def _network(kind: str, choose: _Random) -> tuple[nn.Module, Tensor]:
    d, n, bias = choose.number(2, 4), choose.number(3, 6), choose.share() < 0.6
    f = choose.one_of([nn.ReLU(), nn.GELU(), nn.SiLU(), nn.PReLU(n)])
    norm = choose.share() < 0.5
    if kind == "linear":
        after = nn.BatchNorm1d(n) if norm else nn.Identity()
        layers = [nn.Linear(d, n, bias), f, after, nn.Linear(n, n), nn.GELU(), nn.Linear(n, d, bias)]
        return nn.Sequential(*layers), torch.randn(4, d)
    if kind == "gated":
        return _Gated(d, n, bias), torch.randn(2, 3, d)
    if kind == "packed" and choose.share() < 0.7:
        packed = _Packed(nn.Linear(d, 2 * n, bias), nn.Linear(n, d, bias), norm, -1)
        return packed, torch.randn(2, 3, d)
    if kind == "packed":
        both, down = nn.Conv2d(d, 2 * n, 1, bias=bias), nn.Conv2d(n, d, 3, padding=1, bias=bias)
        return _Packed(both, down, norm, 1), torch.randn(2, d, 4, 4)
    if kind == "followed":
        return _Excited(2 * d, n, bias, norm), torch.randn(2, 3, 5, 5)
    if kind == "heads":
        return _Attention(2 * d, n, norm), torch.randn(2, 3, 2 * d)
    padding = 1 if kind == "padding" else 0
    kernel = 3 if kind == "padding" else choose.one_of([1, 2, 3])
    stride = choose.one_of([1, 2])
    before = nn.BatchNorm2d(n) if norm else nn.Identity()
    up = nn.Conv2d(d, n, kernel, stride=stride, padding=padding, bias=bias)
    return nn.Sequential(up, before, f, nn.Conv2d(n, d, kernel, padding=padding)), torch.randn(2, d, 9, 9)


def _entry(site: Site, choose: _Random) -> Entry:
    """Random fates, with slopes, constants, slopes of the activation or fitted maps."""
    n = site.width
    if site.followed and not site.consumers:
        staying = [c for c in range(n) if choose.share() < 0.6]
        return Entry.narrow(site, staying or [0])
    mixes: list[tuple[Fate, ...]] = [
        (Fate.KEEP, Fate.DROP),
        (Fate.KEEP, Fate.LINEAR, Fate.DROP),
        (Fate.LINEAR,),
        (Fate.LINEAR, Fate.DROP),
    ]
    if site.bridge.not_linear is not None or site.followed:
        mixes = mixes[:1]
    mix = choose.one_of(mixes)
    fates = torch.tensor([int(choose.one_of(mix)) for _ in range(n)])
    fates[choose.number(0, n - 1)] = int(mix[0])
    offsets = choose.normal(n)
    if site.followed or any(c.padding != (0, 0) for c in site.consumers):
        offsets = torch.zeros(n, dtype=torch.float64)
    kept = int((fates == Fate.KEEP).sum())
    alphas = None
    if kept and not site.followed and choose.share() < 0.3:
        alphas = choose.normal(choose.one_of([1, n])).abs()
    fit = None
    if kept and choose.share() < 0.3:
        shapes = [(c.d_out, kept * site.block, *(c.kernel if c.kind == "conv2d" else ())) for c in site.consumers]
        weights = tuple(choose.normal(*shape) for shape in shapes)
        fit = Fit(weights, tuple(choose.normal(c.d_out) for c in site.consumers))
    return Entry(site, fates, choose.normal(n), offsets, alphas, fit=fit)


# ----------------------------------------------------------------------------------------------------- the alterations


@dataclass(frozen=True)
class Mutation:
    """One alteration of the edits of one step.

    Attributes:
        step: whose edits.
        operation: what is done.
        index: to which of them.
        tensor: of an edit that sets weights, which.
        at: which row, column or element.
        size: by what a row or a column is multiplied, or what is added to a vector.
    """

    step: Step
    operation: str
    index: int
    tensor: str = ""
    at: int = 0
    size: float = 0.0

    def edits_of(self, step: Step, model: nn.Module) -> list[Edit]:
        """Surgery with this alteration."""
        edits = edits_of_step(step, model)
        if step is not self.step:
            return edits
        edit = edits[self.index]
        if self.operation == "twice":
            return [*edits[: self.index + 1], *edits[self.index :]]
        if self.operation != "left out":
            edits[self.index] = self._altered(edit)
        elif isinstance(edit, Weights):
            edits[self.index] = replace(edit, tensors={key: torch.zeros_like(t) for key, t in edit.tensors.items()})
        else:
            del edits[self.index]
        return edits

    def _altered(self, edit: Edit) -> Weights:
        assert isinstance(edit, Weights)
        numbers = edit.tensors[self.tensor].clone().double()
        if self.operation == "shift":
            numbers[self.at] += self.size
        else:
            line = numbers.select(0 if self.operation == "row" else 1, self.at)
            line.mul_(self.size)
        return replace(edit, tensors={**edit.tensors, self.tensor: numbers})


def mutations(case: Case, dtype: torch.dtype, choose: _Random, count: int) -> Iterator[Mutation]:
    """Random alterations of a case."""
    edits: dict[int, list[Edit]] = {}
    trial = detached_copy(case.model)
    for i, step in enumerate(case.todo):
        edits[i] = edits_of_step(step, trial)
        for edit in edits[i]:
            perform(trial, edit)
    places = [(i, j) for i, own in edits.items() for j in range(len(own))]
    for _ in range(count if places else 0):
        i, j = choose.one_of(places)
        edit, step = edits[i][j], case.todo[i]
        operation = choose.one_of(OPERATIONS)
        if operation in ("left out", "twice"):
            yield Mutation(step, operation, j)
            continue
        if not isinstance(edit, Weights):
            continue
        tensors = {key: t for key, t in edit.tensors.items() if (t.dim() == 1) == (operation == "shift") and t.numel()}
        if not tensors:
            continue
        name = choose.one_of(sorted(tensors))
        at = choose.number(0, tensors[name].shape[operation == "column"] - 1)
        # from what is just visible in this type to many times the weight itself
        smallest = math.log(100 * torch.finfo(dtype).eps)
        size = math.exp(smallest + choose.share() * (math.log(30) - smallest)) * choose.one_of([-1, 1])
        yield Mutation(step, operation, j, name, at, size if operation == "shift" else 1 + size)


# ----------------------------------------------------------------------------------------------------------- the trial


@dataclass
class Tally:
    """What became of the alterations in one type.

    Attributes:
        refused: how many of those that count, by kind of site and by operation.
        accepted: descriptions of those that count and were not refused.
        small: how many changed too little to count.
        broken: how many gave a network that does not run.
    """

    refused: Counter[str] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)
    small: int = 0
    broken: int = 0

    @property
    def counted(self) -> int:
        """All that count."""
        return sum(self.refused[kind] for kind in KINDS) + len(self.accepted)


def trial(dtype: torch.dtype, most: int, each: int, seed: int = 0) -> Tally:
    """Alter surgery at random until so many alterations count, and so many of each kind of site."""
    tally = Tally()
    threshold = 100 * torch.finfo(dtype).eps
    while tally.counted < most or any(tally.refused[kind] < each for kind in KINDS):
        kind = KINDS[seed % len(KINDS)]
        made = case(kind, dtype, seed)
        exact = replace(made, model=detached_copy(made.model).double(), x=made.x.double())
        right = _output(exact, edits_of_step)
        assert right is not None
        for mutation in mutations(made, dtype, _Random(seed), 10):
            wrong = _output(exact, mutation.edits_of)
            if wrong is None:
                tally.broken += 1
            elif wrong.shape == right.shape and relative_error(right, wrong) <= threshold:
                tally.small += 1
                continue
            try:
                proven(made.model, made.todo, made.x, mutation.edits_of)
            except ShallowerError:
                if wrong is not None:
                    tally.refused.update((kind, mutation.operation))
                continue
            name = mutation.step.entry.site.name
            tally.accepted.append(f"seed {seed}, {kind}, {name}: {mutation.operation} of edit {mutation.index}")
        seed += 1
    return tally


@torch.no_grad()
def _output(case: Case, edits_of: Any) -> Tensor | None:
    """What the network gives after (altered) surgery in float64; None where it does not run."""
    small = detached_copy(case.model)
    try:
        for step in case.todo:
            for edit in edits_of(step, small):
                perform(small, edit)
        y: Tensor = small(case.x)
    except (ShallowerError, RuntimeError, AttributeError, ValueError, TypeError, IndexError):
        return None
    return y


def run(data: Path, quick: bool, cache: Path) -> dict[str, Any]:  # noqa: ARG001
    """Alter surgery in every type; rows of the table."""
    most, each = (25, 1) if quick else (1000, 50)
    rows = []
    for dtype in DTYPES:
        tally = trial(dtype, most, each)
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "counted": tally.counted,
                "refused": {kind: tally.refused[kind] for kind in (*KINDS, *OPERATIONS)},
                "accepted": tally.accepted,
                "too_small": tally.small,
                "not_running": tally.broken,
            }
        )
    return {"rows": rows}


def table(found: dict[str, Any]) -> str:
    """The counts by type."""
    header = ["type", "count", *KINDS, *OPERATIONS, "accepted", "too small to count", "does not run"]
    lines = []
    for row in found["rows"]:
        counts = [row["counted"], *row["refused"].values(), len(row["accepted"]), row["too_small"], row["not_running"]]
        lines.append([row["dtype"], *map(str, counts)])
    accepted = [f"{row['dtype']}: {text}" for row in found["rows"] for text in row["accepted"]]
    return "\n".join([markdown(header, lines), *accepted])

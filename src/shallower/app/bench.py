"""How fast a result is beside the model it was made of, over batch sizes and threads.

    original, small = pair(Path("small"))
    examples = [example_of(original, Path("small"), batch=rows, length=32) for rows in (1, 8)]
    print(bench_table(bench(original.model, small, examples, threads=[1, 2])))

Everything is one run: at each setting the two models are timed in turn, and ratios are taken within a round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shallower.app.models import LoadedModel, load_model
from shallower.app.results import RESULT, read_record
from shallower.core.inputs import Inputs
from shallower.core.text import table
from shallower.core.trees import mapped, tensors
from shallower.errors import DataError, ModelError
from shallower.measuring.measurement import compare
from shallower.saving.checkpoint import load, read_source
from shallower.saving.description import DESCRIPTION

_MOST_NUMBERS = 2**28
"""In a row of an example."""


@dataclass(frozen=True)
class Timing:
    """One setting.

    Attributes:
        batch: rows of the inputs.
        threads: of torch.
        before, after: median seconds of one forward pass.
        speedup: how many times faster; from ratios within a round.
        spread: interquartile range of the ratio of the two times.
    """

    batch: int
    threads: int
    before: float
    after: float
    speedup: float
    spread: float


def pair(directory: Path, original: str = "") -> tuple[LoadedModel, nn.Module]:
    """The architecture a result was made of, and the result.

    Args:
        directory: written by a command of shallower.
        original: the MODEL it was made of; by default what its result.json says, unless that is code to be imported.

    Raises:
        ModelError, CheckpointError: one of the two cannot be loaded.
    """
    directory = directory.expanduser()
    source = read_source(directory)
    if not original:
        original = source
        if (directory / RESULT).is_file():
            original = read_record(directory).model
        if not source and not (original and Path(original).is_dir()):
            raise ModelError(
                f"{directory} was made of {original or 'a model of your own'}, which is only imported when you say so: "
                "add --original package.module:factory"
            )
    before = load_model(original, pretrained=False)
    if source:
        return before, load(directory)
    return before, load(directory, model=before.model)


def loaded_with(model: str, original: str = "") -> LoadedModel:
    """The MODEL, also where it is a result of a model of one's own class, which `original` then builds.

    Raises:
        ModelError, CheckpointError: it cannot be loaded.
    """
    path = Path(model).expanduser()
    if not (path / DESCRIPTION).is_file() or read_source(path):
        return load_model(model)
    if not original:
        raise ModelError(
            f"{model} holds a model of your own class, which is only imported when you say so: "
            "add --original package.module:factory"
        )
    before = load_model(original, pretrained=False)
    return LoadedModel(load(path, model=before.model), "", before.processor, before.example)


def example_of(model: LoadedModel, directory: Path, *, batch: int, length: int, shape: str = "") -> Inputs:
    """Random inputs of so many rows: of the given shape, as the model describes them, or as the run had them.

    Raises:
        DataError: the shape is none.
        ModelError: nothing says what the model takes.
    """
    if not shape and not model.source and model.example is None and (directory / RESULT).is_file():
        shape = ",".join(map(str, read_record(directory).example[1:]))
    if shape:
        return torch.zeros(batch, *_parsed_sizes(shape), dtype=model.dtype)
    example: Inputs = _with_rows(model.make_example_inputs(batch=batch, length=length), batch)
    return example


def _parsed_sizes(shape: str) -> list[int]:
    """The sizes in "3,32,32"."""
    sizes = shape.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes) or math.prod(map(int, sizes)) > _MOST_NUMBERS:
        raise DataError(f"--shape {shape!r}: give the sizes of one row, for example 3,32,32")
    return list(map(int, sizes))


def bench(
    before: nn.Module,
    after: nn.Module,
    examples: Sequence[Inputs],
    threads: Sequence[int],
    *,
    rounds: int = 30,
) -> list[Timing]:
    """Time both at each setting; the number of threads is what it was, afterwards.

    Args:
        before, after: the two models.
        examples: inputs, one for each batch size.
        threads: of torch.
        rounds: how often each is timed at each setting.
    """
    found = []
    own = torch.get_num_threads()
    settings = [(example, count) for count in threads for example in examples]
    try:
        for example, count in tqdm(settings, desc="timing", unit="setting", disable=None):
            torch.set_num_threads(count)
            times = compare({"before": before, "after": after}, example, rounds=rounds)
            rows = len(next(tensor for tensor in tensors(example) if tensor.dim()))
            a, b = times["before"], times["after"]
            found.append(Timing(rows, count, a.latency, b.latency, b.speedup, b.ratio_spread))
    finally:
        torch.set_num_threads(own)
    return found


def bench_table(timings: Sequence[Timing]) -> str:
    """The timings for people."""
    rows = [
        (
            str(t.batch),
            str(t.threads),
            f"{t.before * 1e3:.3g} ms",
            f"{t.after * 1e3:.3g} ms",
            f"{t.speedup:.2f}x",
            f"{1 / t.speedup:.3f} ± {t.spread / 2:.3f}",
        )
        for t in timings
    ]
    return table(("batch", "threads", "before", "after", "speed", "time ratio"), rows, right=range(6))


def bench_json(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The timings as plain data; seconds."""
    return [asdict(timing) for timing in timings]


def _with_rows(example: Any, batch: int) -> Any:
    """Inputs of a factory with the wanted number of rows: the first ones, again and again."""

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) == batch:
            return tensor
        return tensor[torch.arange(batch) % len(tensor)]

    return mapped(repeated, example)

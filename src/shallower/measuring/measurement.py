"""What a model costs: parameters, MACs, latency and peak memory.

    print(sh.measure(model, example_inputs))
    print(sh.compare({"dense": model, "small": small}, example_inputs)["small"].speedup)

Latencies of two models are worth comparing only when they were taken in turn on the same machine: `compare` does that.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import timer

from shallower.core.inputs import Inputs, bare_call, model_device
from shallower.core.modes import in_eval_mode, unchanged
from shallower.core.text import amount
from shallower.core.trees import tensors, to_device
from shallower.errors import ModelError
from shallower.measuring.cost import count_macs, count_params, peak_memory, running
from shallower.measuring.devices import device_name
from shallower.modules.attachment import attached_places, detached_copy

_BLOCK_SECONDS = 2e-3
_LEAST_ROUNDS = 5
"""Of a comparison, however long they take."""
_PASSES_IN_TIME = 40
"""Passes for which there is time where nothing is said of slow ones."""


@dataclass(frozen=True)
class Measurement:
    """What a model costs on given inputs.

    Attributes:
        params: parameters; tied ones count once.
        macs: multiply-accumulates of one forward pass: `FlopCounterMode` total // 2 (matrix products, convolutions and
            attention; pointwise work does not count).
        latency: median seconds of one forward pass; nan on the meta device.
        spread: interquartile range of it, seconds.
        runs: how many timed blocks the two are taken from.
        peak_memory: peak bytes of one forward pass: weights, inputs and activations.
        threads: of torch, within an operator.
        batch: first dimension of the first input.
        dtype: of the first floating-point parameter.
        device: where it ran, with the name of the processor.
        torch_version: which torch.
    """

    params: int
    macs: int
    latency: float
    spread: float
    runs: int
    peak_memory: int
    threads: int
    batch: int
    dtype: str
    device: str
    torch_version: str

    def __str__(self) -> str:
        """All of it in one line."""
        return (
            f"{amount(self.params)} params, {amount(self.macs)} MACs, {_milliseconds(self.latency, self.spread)}, peak "
            f"{amount(self.peak_memory)}B (batch {self.batch}, {self.dtype}, {self.threads} threads, {self.device}, "
            f"torch {self.torch_version})"
        )


@dataclass(frozen=True)
class Comparison:
    """The latency of one of several models that were timed in turn.

    Attributes:
        latency: median seconds of one forward pass.
        spread: interquartile range of it, seconds.
        ratio: median, over the rounds, of this model's time over the first model's time in the same round.
        ratio_spread: interquartile range of the ratio.
        rounds: how many.
    """

    latency: float
    spread: float
    ratio: float
    ratio_spread: float
    rounds: int

    @property
    def speedup(self) -> float:
        """How many times faster than the first model."""
        return 1 / self.ratio

    def __str__(self) -> str:
        """All of it in one line."""
        return (
            f"{_milliseconds(self.latency, self.spread)}, {self.speedup:.2f}x as fast "
            f"(ratio {self.ratio:.3f} ± {self.ratio_spread / 2:.3f}, {self.rounds} rounds)"
        )


def measure(
    model: nn.Module, example_inputs: Inputs, *, repeats: int = 30, warmup: int = 3, seconds: float = 1.0
) -> Measurement:
    """What `model` costs on the example inputs, in eval and inference mode.

        sh.measure(model, torch.randn(1, 3, 224, 224))

    The inputs are moved to the model's device. On the meta device counts and memory are right and nothing is timed. Of
    a compiled model the compiled passes are timed; what counts and memory are taken from is the module inside.

    Args:
        repeats: at least so many timed blocks of forward passes.
        warmup: forward passes before the first timed one.
        seconds: at least so long in total.

    Raises:
        ModelError: `repeats` or `warmup` is not positive.
    """
    if repeats < 1 or warmup < 1:
        raise ModelError(f"measure: repeats and warmup are at least 1, not {repeats} and {warmup}")
    device = model_device(model)
    inputs: Inputs = to_device(example_inputs, device)
    with _ready(model) as plain:
        eager: nn.Module = getattr(plain, "_orig_mod", plain)
        macs = count_macs(eager, inputs)
        memory = peak_memory(eager, inputs)
        times = [] if device.type == "meta" else _times(plain, inputs, repeats, warmup, seconds)
    first = next(tensors(inputs), None)
    return Measurement(
        params=count_params(plain),
        macs=macs,
        latency=statistics.median(times) if times else math.nan,
        spread=_interquartile(times),
        runs=len(times),
        peak_memory=memory,
        threads=torch.get_num_threads(),
        batch=len(first) if first is not None and first.dim() else 1,
        dtype=_dtype(plain),
        device=device_name(device),
        torch_version=torch.__version__,
    )


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Inputs,
    *,
    rounds: int = 30,
    warmup: int = 3,
    seconds: float = math.inf,
) -> dict[str, Comparison]:
    """Latencies of several models, timed in turn, and each one's ratio to the first.

        sh.compare({"dense": model, "small": small}, inputs)["small"].ratio

    Every round times each model once, so that what the machine does meanwhile falls on all of them alike; the ratios
    are taken within a round. The order stays the same: a model that follows itself finds its weights in the cache.

    Args:
        models: by name; the first is what the others are compared with.
        example_inputs: what they are called with; they are moved to each model's device.
        rounds: how often each is timed, at most.
        warmup: passes before the first that counts, at most.
        seconds: after about so long there are no more rounds; five of them are taken in any case, if so many are asked
            for. Passes long enough for the limit to matter get one pass to warm up.

    Raises:
        ModelError: there is no model, a model is on the meta device, or `rounds` or `warmup` is not positive.
    """
    if not models or rounds < 1 or warmup < 1:
        raise ModelError("compare: give at least one model, one round and one warm-up pass")
    for name, model in models.items():
        if model_device(model).type == "meta":
            raise ModelError(f"{name}: a model on the meta device cannot be timed")
    with ExitStack() as stack:
        passes: dict[str, Callable[[], Any]] = {}
        for name, model in models.items():
            plain = stack.enter_context(_ready(model))
            passes[name] = partial(bare_call, plain, to_device(example_inputs, model_device(model)))
        stack.enter_context(torch.inference_mode())
        numbers = {}
        for name, run in passes.items():
            with running(models[name]):
                numbers[name] = _block(run, warmup, seconds / _PASSES_IN_TIME)[0]
        times: defaultdict[str, list[float]] = defaultdict(list)
        start = timer()
        for done in range(rounds):
            if done >= _LEAST_ROUNDS and timer() - start >= seconds:
                break
            for name, run in passes.items():
                with running(models[name]):
                    times[name].append(_seconds(run, numbers[name]))
    result = {}
    firsts = next(iter(times.values()))
    for name in times:
        ratios = [own / first for own, first in zip(times[name], firsts, strict=True)]
        result[name] = Comparison(
            latency=statistics.median(times[name]),
            spread=_interquartile(times[name]),
            ratio=statistics.median(ratios),
            ratio_spread=_interquartile(ratios),
            rounds=len(ratios),
        )
    return result


@contextmanager
def _ready(model: nn.Module) -> Iterator[nn.Module]:
    """The model without what is attached to it, in eval mode; at the end nothing has changed it."""
    plain = model
    if any(map(attached_places, model.modules())):
        plain = detached_copy(model)
    with in_eval_mode(plain), unchanged(plain):
        yield plain


def _times(model: nn.Module, inputs: Inputs, repeats: int, warmup: int, seconds: float) -> list[float]:
    run = partial(bare_call, model, inputs)
    with torch.inference_mode(), running(model):
        number, block = _block(run, warmup)
        return [_seconds(run, number) for _ in range(max(repeats, math.ceil(seconds / block)))]


def _block(run: Callable[[], Any], warmup: int, long: float = math.inf) -> tuple[int, float]:
    """How many passes make a block so long that reading the clock does not matter, and its seconds; warms up first.

    A pass of so many seconds as `long` is the last one to warm up.
    """
    single = 0.0
    for _ in range(warmup + 1):
        single = _seconds(run, 1)
        if single >= long:
            break
    number = max(1, math.ceil(_BLOCK_SECONDS / single))
    return number, number * single


def _seconds(run: Callable[[], Any], number: int) -> float:
    start = timer()
    for _ in range(number):
        run()
    return (timer() - start) / number


def _interquartile(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _milliseconds(latency: float, spread: float) -> str:
    if math.isnan(latency):
        return "not timed"
    return f"{latency * 1e3:.3g} ms" + ("" if math.isnan(spread) else f" ± {spread * 5e2:.2g}")


def _dtype(model: nn.Module) -> str:
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return str(found).removeprefix("torch.")

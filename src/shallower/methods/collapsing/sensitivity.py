"""How much a change to a model alone changes its answers, or costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from shallower.core.algebra import wide
from shallower.core.inputs import InputsOf, call, default_inputs_of, model_device, reiterable
from shallower.core.modes import evaluating
from shallower.core.processes import agreed_result, raised_anywhere, summed_over_processes
from shallower.core.trees import tensors, to_device
from shallower.errors import MethodError, SiteError
from shallower.training.divergence import kl_divergence, relative_divergence
from shallower.training.loop import Loss, Score

Change = Callable[[], AbstractContextManager[object]]
"""Changes the model for the length of the context that it makes."""


def costs_of(
    model: nn.Module,
    changes: Mapping[str, Change],
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    score: Score | None = None,
    inputs_of: InputsOf = default_inputs_of,
) -> dict[str, float]:
    """What each change alone costs, the others not made.

        costs_of(model, {"half as wide": lambda: structural_dropout.at("50%")}, batches)

    The cost is the fall of the score if `score` is given, else the rise of the loss if `loss` is given, else the change
    of the model's output (see `output_change`); means over the batches. Of several processes all call it, each with
    batches of its own; the means are over all of them, the score is the first one's.

    Args:
        model: that the changes change.
        changes: by name.
        batches: a few; not read where `score` is given.
        loss: of the model and a batch.
        score: of the model, higher is better.
        inputs_of: picks the model's inputs out of a batch, where neither is given.

    Raises:
        MethodError: there are no batches.
    """
    with raised_anywhere(), evaluating(model):
        if score is not None:

            def scored() -> float:
                return agreed_result(score, model)

            base = scored()
            return {name: base - _under(change, scored) for name, change in changes.items()}
        totals, count = dict.fromkeys(changes, 0.0), 0
        device = model_device(model)
        for batch in tqdm(reiterable(batches), desc="sensitivity", delay=2):
            count += 1
            run, cost = _compared(model, to_device(batch, device), loss, inputs_of)
            base = run()
            for name, change in changes.items():
                totals[name] += float(cost(base, _under(change, run)))
    batches_seen, *sums = summed_over_processes(count, *totals.values())
    if not batches_seen:
        raise MethodError("sensitivity needs data: there are no batches")
    return {name: total / batches_seen for name, total in zip(totals, sums, strict=True)}


def output_change(reference: Any, output: Any) -> Tensor:
    """How far a model's output is from a reference, 0 where they are equal; a scalar.

    Logits (an output with a `logits` entry of several classes): the Kullback-Leibler divergence of the output's
    distribution from the reference's, sum over classes p log(p / q), mean over rows. Otherwise the relative squared
    error, sum (a - b)^2 / sum a^2, over all floating tensors of the output.

    Raises:
        SiteError: the output holds no floating tensor.
    """
    logits, changed = _logits(reference), _logits(output)
    if logits is not None and changed is not None:
        return kl_divergence(changed.double(), logits.double())
    wanted = _numbers(reference)
    if not wanted.numel():
        raise SiteError(
            "the model's output contains no floating-point tensor, so its change cannot be measured: pass score="
        )
    return relative_divergence(_numbers(output), wanted)


def _numbers(output: Any) -> Tensor:
    """All floating-point numbers of an output in one row, float64, where the first of them is."""
    rows: list[Tensor] = []
    for tensor in tensors(output):
        if tensor.is_floating_point():
            row = wide(tensor).flatten()
            rows.append(row.to((rows or [row])[0].device))
    if not rows:
        return torch.zeros(0)
    return torch.cat(rows)


def _compared(
    model: nn.Module, batch: Any, loss: Loss | None, inputs_of: InputsOf
) -> tuple[Callable[[], Any], Callable[[Any, Any], Any]]:
    """What to run on a batch, and how to compare two of its results."""
    if loss is not None:
        return lambda: float(loss(model, batch)), lambda before, after: after - before
    return lambda: call(model, inputs_of(batch)), output_change


def _under(change: Change, run: Callable[[], Any]) -> Any:
    with change():
        return run()


def _logits(output: Any) -> Tensor | None:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    # of one number, which a regression returns under that name, the distribution would always be the same
    return logits if isinstance(logits, Tensor) and logits.dim() and logits.shape[-1] > 1 else None

"""What every loop has to do for a method that is attached to its model, whoever owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shallower.core.inputs import Inputs, default_inputs_of, model_device, to_device
from shallower.errors import MethodError
from shallower.methods.base import Method
from shallower.planning.plan import Plan
from shallower.saving.checkpoint import save
from shallower.surgery.applying import apply


@dataclass
class Following:
    """Follows a foreign loop step by step, and makes the smaller model at its end.

    Attributes:
        method: attached to the model that is trained.
        arrive: part of the training after which slopes are at 1 for certain, of methods that have slopes; None leaves
            it to the penalty.
        directory: where the smaller model is saved at the end; None: nowhere.
        example_inputs: for surgery's proof; by default the first batch of training, without its labels.
        plan: makes the plan at the end; by default `method.plan()`.
        result: the smaller model, when training has ended.
    """

    method: Method
    arrive: float | None = 0.5
    directory: str | Path | None = None
    example_inputs: Inputs | None = None
    plan: Callable[[Any], Plan] = field(default=lambda method: method.plan())
    result: nn.Module | None = None

    def __post_init__(self) -> None:
        """Refuse what a loop of one pass a step cannot train.

        Raises:
            MethodError: the method takes several passes a step, or `arrive` is no part of a whole.
        """
        if type(self.method).loss is not Method.loss:
            raise MethodError(
                f"{type(self.method).__name__} takes several passes a step, and a callback sees one: train with "
                "shallower.training.train(..., method=method), or call method.loss(closure) in a loop of your own"
            )
        if self.arrive is not None and not 0 < self.arrive <= 1:
            raise MethodError(f"arrive={self.arrive}: give a part of the training, above 0 and at most 1, or None")

    def begin(self, model: nn.Module, steps: int) -> None:
        """Training of `model` begins, for so many steps of the optimizer.

        Raises:
            MethodError: the method is attached to another model.
        """
        if not any(module is self.method.model for module in model.modules()):
            raise MethodError(
                f"{type(self.method).__name__} is attached to another model than the one that is trained: construct it "
                "on the model, or a part of it, that you give to the trainer"
            )
        if self.arrive is not None and getattr(self.method, "arrive_in", 0) is None:
            vars(self.method)["arrive_in"] = max(1, round(self.arrive * steps))

    def check(self, groups: Iterable[dict[str, Any]]) -> None:
        """Refuse an optimizer that pulls slopes back to 0.

        Raises:
            MethodError: there is weight decay on them.
        """
        slopes = {id(m.slope) for m in getattr(self.method, "activations", {}).values() if hasattr(m, "slope")}
        for group in groups:
            if group.get("weight_decay") and any(id(parameter) in slopes for parameter in group["params"]):
                raise MethodError(
                    f"the optimizer has weight decay ({group['weight_decay']:g}) on slopes, which pulls them away from "
                    "1. Make it with AdamW(method.param_groups(weight_decay=...), lr=...)"
                )

    def metrics(self) -> dict[str, float]:
        """What loggers should show: the mean slope, and how many sites are linear."""
        slopes = getattr(self.method, "slopes", None)
        if not callable(slopes):
            return {}
        found = [torch.as_tensor(slope) for slope in slopes().values()]
        if not found:
            return {}
        linear = sum(bool((slope == 1).all()) for slope in found)
        return {"shallower/slope": float(torch.stack([s.mean() for s in found]).mean()), "shallower/linear": linear}

    def finish(self, batch: Any | None, processor: Any | None = None) -> None:
        """Training has ended: make the smaller model, and save it.

        Raises:
            MethodError: there are neither example inputs nor a batch.
            SurgeryError, CheckpointError: see `apply` and `save`.
        """
        example = self.example_inputs
        if example is None:
            if batch is None:
                raise MethodError("there is no batch to take example inputs from: give example_inputs=")
            example = default_inputs_of(batch)
        model = self.method.model
        example = to_device(example, model_device(model))
        self.result = apply(model, self.plan(self.method), example).eval()
        if self.directory is not None:
            save(self.result, self.directory, processor=processor)

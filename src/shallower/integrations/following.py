"""What every loop has to do for a method that is attached to its model, whoever owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shallower.core.inputs import Inputs, default_inputs_of, model_device
from shallower.core.trees import to_device
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
        arrive: part of the training within which the method completes what it does gradually (slopes are at 1 for
            certain); None leaves it to the method.
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
                "shallower.train(..., method=method), or call method.loss(closure) in a loop of your own"
            )
        if self.arrive is not None and not 0 < self.arrive <= 1:
            raise MethodError(f"arrive={self.arrive}: pass a part of the training, above 0 and at most 1, or None")

    def begin(self, model: nn.Module, steps: int, optimizers: Iterable[Any]) -> None:
        """Training of `model` begins, for so many steps of the optimizer.

        Raises:
            MethodError: the method is attached to another model, or an optimizer has weight decay on what it must not
                decay.
        """
        if not any(module is self.method.model for module in model.modules()):
            raise MethodError(
                f"{type(self.method).__name__} is attached to another model than the one that is trained: construct it "
                "on the model, or a part of it, that you pass to the trainer"
            )
        undecayed = set(map(id, self.method.undecayed()))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                decay = group.get("weight_decay")
                if decay and not undecayed.isdisjoint(map(id, group["params"])):
                    raise MethodError(
                        f"the optimizer has weight decay ({decay:g}) on parameters of the method (slopes), which pulls "
                        "them the wrong way. Make it with AdamW(method.param_groups(weight_decay=...), lr=...)"
                    )
            self.method.follow(optimizer)
        if self.arrive is not None:
            self.method.schedule(max(1, round(self.arrive * steps)))

    def finish(self, batch: Any | None, processor: Any | None = None) -> None:
        """Training has ended: make the smaller model, and save it.

        Raises:
            MethodError: there are neither example inputs nor a batch.
            SurgeryError, CheckpointError: see `apply` and `save`.
        """
        self.method.unfollow()
        example = self.example_inputs
        if example is None:
            if batch is None:
                raise MethodError("there is no batch to take example inputs from: pass example_inputs=")
            example = default_inputs_of(batch)
        model = self.method.model
        example = to_device(example, model_device(model))
        self.result = apply(model, self.plan(self.method), example).eval()
        if self.directory is not None:
            save(self.result, self.directory, processor=processor)

# ruff: noqa: ARG002 - the signatures are the library's
"""A method inside Transformers' Trainer.

method = sh.LayerCollapse(model, sites)
callback = ShallowerCallback(method, directory="small/")
trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
callback.log_through(trainer)
trainer.train()
small = callback.result                     # also sh.load("small/")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shallower.core.inputs import Inputs
from shallower.errors import MethodError
from shallower.integrations.following import Following
from shallower.methods.base import Method
from shallower.planning.plan import Plan
from shallower.saving.vision import repair_torchvision

repair_torchvision()

from transformers import TrainerCallback  # noqa: E402


class ShallowerCallback(TrainerCallback):  # type: ignore[misc]
    """Trains what a method added to the model, and makes the smaller model at the end.

    The penalty goes into the gradients after they were clipped, so that the loss that the trainer reports stays the
    task's own.

    Args:
        method: attached to the trainer's model. One that takes several passes a step is refused.
        arrive: part of the training after which slopes are at 1 for certain; None leaves it to the penalty.
        directory: where the smaller model is saved when training ends, with the trainer's tokenizer.
        example_inputs: for surgery's proof; by default the first batch of training.
        plan: makes the plan at the end, from the method; by default `method.plan()`.

    Raises:
        MethodError: see the arguments; and when training begins, if the method is attached to another model, if the
            optimizer has weight decay on slopes, or if fp16 gradients would reach the method still scaled.
    """

    def __init__(
        self,
        method: Method,
        *,
        arrive: float | None = 0.5,
        directory: str | Path | None = None,
        example_inputs: Inputs | None = None,
        plan: Callable[[Any], Plan] = lambda method: method.plan(),
    ) -> None:
        self._following = Following(method, arrive, directory, example_inputs, plan)

    @property
    def result(self) -> Any:
        """The smaller model; None before training has ended, and on processes other than the first."""
        return self._following.result

    def log_through(self, trainer: Any) -> None:
        """Put this callback before the trainer's loggers, so that all of them show its numbers."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that this can work, and set the schedule."""
        if args.fp16 and not args.max_grad_norm:
            raise MethodError("with fp16 and max_grad_norm=0 gradients are scaled when the penalty is added: use bf16")
        self._following.begin(kwargs["model"], state.max_steps, [kwargs["optimizer"]])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the forward pass."""
        self._following.method.before_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are there."""
        self._following.method.add_penalty_grad()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self._following.method.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the method's numbers to what is logged."""
        if logs is not None and "loss" in logs:
            metrics = self._following.method.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the smaller model."""
        if state.is_world_process_zero:
            batch = next(iter(kwargs["train_dataloader"]), None)
            if isinstance(batch, Mapping):
                batch = dict(batch)
            processor = kwargs.get("processing_class")
            self._following.finish(batch, processor if hasattr(processor, "save_pretrained") else None)

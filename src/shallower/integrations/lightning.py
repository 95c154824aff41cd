# ruff: noqa: ARG002 - the signatures are the library's
"""A method inside Lightning's Trainer.

method = sh.LayerCollapse(module.net, sites)
callback = ShallowerCallback(method, directory="small/")
Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)
small = callback.result                     # also sh.load("small/", model=MyNet())
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shallower.core.inputs import Inputs
from shallower.integrations.following import Following
from shallower.methods.base import Method
from shallower.planning.plan import Plan
from shallower.saving.vision import repair_torchvision

repair_torchvision()

from lightning.pytorch import Callback  # noqa: E402


class ShallowerCallback(Callback):  # type: ignore[misc]
    """Trains what a method added to a LightningModule or to a network in it, and makes the smaller model at the end.

    The penalty goes into the gradients before Lightning clips them. The numbers go through the module's `log_dict`, to
    whichever logger the trainer has.

    Args:
        method: attached to the module that is trained, or to a part of it. `configure_optimizers` should use
            `method.param_groups()`. One that takes several passes a step is refused.
        arrive: part of the training after which slopes are at 1 for certain; None leaves it to the penalty.
        directory: where the smaller model is saved when training ends.
        example_inputs: for surgery's proof; by default the first batch of training, without its labels.
        plan: makes the plan at the end, from the method; by default `method.plan()`.

    Raises:
        MethodError: see the arguments; and when training begins, if the method is attached to another model, or if the
            optimizer has weight decay on slopes.
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
        self._step = -1
        self._batch: Any = None

    @property
    def result(self) -> Any:
        """The smaller model; None before training has ended, and on processes other than the first."""
        return self._following.result

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that this can work, and set the schedule."""
        self._following.begin(pl_module, int(trainer.estimated_stepping_batches), trainer.optimizers)
        self._step = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the forward pass: a step begins, unless gradients are being accumulated."""
        if self._batch is None:
            self._batch = batch
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._following.method.before_step()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradients are there."""
        self._following.method.add_penalty_grad()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a batch, and if the optimizer has stepped, after a step."""
        if trainer.global_step != self._step:
            self._following.method.after_step()
            metrics = self._following.method.metrics()
            if metrics:
                pl_module.log_dict(metrics)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the smaller model."""
        if trainer.is_global_zero:
            self._following.finish(self._batch)

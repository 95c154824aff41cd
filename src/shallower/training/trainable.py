"""What a training loop, ours or another, asks of a method that is attached to the model it trains.

for batch in loader:
    method.before_step()
    loss = method.loss(lambda: task_loss(model, batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step()             # after method.follow(optimizer); else method.after_step(lr)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.inputs import model_device
from shallower.errors import MethodError


class Trainable:
    """A model in training with nothing added to it; methods override some of what a training loop calls.

        class Smaller(sh.Method):
            def penalty(self):
                return 1e-4 * sum(p.abs().sum() for p in self.model.parameters())

    What a method adds to the model is in the model's `state_dict`, so that a checkpoint of the model resumes it.

    Args:
        model: what is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._followed: list[Any] = []
        self._lr: float | None = None

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: weight decay on matrices and kernels, none on biases, norms and slopes.

        Only parameters that require a gradient are listed. A parameter of one dimension is taken for a bias, a norm's
        scale or a slope, as is common practice.
        """
        own = set(map(id, self.undecayed()))
        trained = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters of the method's own (slopes) that must not have weight decay."""
        return []

    def schedule(self, steps: int) -> None:
        """Finish gradual changes within so many steps; ignored where the method has a schedule of its own."""

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Read the learning rate of each step from this optimizer, so that `after_step()` needs no argument.

            method.follow(optimizer)
            ...
            optimizer.step(); scheduler.step(); method.after_step()

        The rate is that of the first group of the optimizer that stepped last; several can be followed. `detach` ends
        it.
        """
        # Accelerate wraps the optimizer in one without hooks.
        optimizer = getattr(optimizer, "optimizer", optimizer)

        def note(stepped: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            self._lr = float(stepped.param_groups[0]["lr"])

        self._followed.append(optimizer.register_step_post_hook(note))

    def unfollow(self) -> None:
        """Stop reading the optimizers that were given to `follow`."""
        while self._followed:
            self._followed.pop().remove()
        self._lr = None

    def rate(self, lr: float | None) -> float:
        """The learning rate of the step: `lr`, or that of the optimizer that is followed.

        Raises:
            MethodError: neither is known.
        """
        lr = self._lr if lr is None else lr
        if lr is None:
            raise MethodError(
                "the learning rate of the step is not known: call method.follow(optimizer) before the first step, or "
                "method.after_step(lr)"
            )
        return lr

    def before_step(self) -> None:
        """Before the forward pass of every step: draw random numbers, record what the step must not change."""

    def penalty(self) -> Tensor:
        """The term that is added to the loss, a scalar."""
        return torch.zeros((), device=model_device(self.model))

    def add_penalty_grad(self) -> None:
        """After `backward()`: add the gradient of `penalty()`, for loops whose loss should stay the task's own."""

    def loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """The loss to differentiate: `closure()`, the task's loss, plus the penalty.

        A method may call `closure` several times, for instance at several widths, and return the sum; all these passes
        see the same batch.
        """
        return closure() + self.penalty()

    def after_step(self, lr: float | None = None) -> None:
        """After `optimizer.step()`.

        Args:
            lr: the learning rate of the step; by default that of the optimizer given to `follow`.
        """

    def metrics(self) -> dict[str, float]:
        """Numbers that loggers should show."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the model's `state_dict`, for the training to continue exactly.

        Random generators, counters: dicts, lists, numbers, strings and tensors (`generator.get_state()` is one).
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""

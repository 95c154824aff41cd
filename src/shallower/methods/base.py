"""What every method has in common: how a training loop talks to it.

method = sh.LayerCollapse(model, sites)
optimizer = AdamW(method.param_groups(weight_decay=0.01))
for batch in loader:
    method.before_step()
    loss = method.loss(lambda: task_loss(model, batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(lr)
plan = method.plan()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shallower.core.inputs import model_device
from shallower.errors import MethodError
from shallower.modules import attachment
from shallower.planning.paying import cannot_be_linear
from shallower.planning.plan import Plan
from shallower.sites import Sites


class Method:
    """A way to decide what happens to the channels of a model's sites.

    Everything but `plan` is neutral unless a subclass needs it. What a method adds to the model is in the model's
    `state_dict`, so that a checkpoint of the model resumes the method too.

    Args:
        model: the model; methods may attach modules to it, until `detach`.
        sites: the sites to decide on, as `find_sites` gives them, or a selection.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model = model
        self.sites = sites

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: weight decay on matrices and kernels, none on biases, norms and slopes.

        Only parameters that require a gradient are listed. A parameter of one dimension is taken for a bias, a norm's
        scale or a slope, as is common practice.
        """
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def penalty(self) -> Tensor:
        """What is added to the loss, a scalar."""
        return torch.zeros((), device=model_device(self.model))

    def add_penalty_grad(self) -> None:
        """After `backward()`: adds the gradient of `penalty()`, for loops whose loss should stay the task's own."""

    def loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """The loss to differentiate: `closure()`, the task's loss, plus the penalty.

        A method may call `closure` several times, for instance at several widths, and give the sum; all these passes
        see the same batch.
        """
        return closure() + self.penalty()

    def before_step(self) -> None:
        """Before the forward pass of every step: draws what is random, notes what the step must not change."""

    def after_step(self, lr: float) -> None:
        """After `optimizer.step()`, with the learning rate of the step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the model's `state_dict`, for the training to go on exactly.

        Random generators, counters: dicts, lists, numbers, texts and tensors (`generator.get_state()` is one).
        """
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` gave."""

    def plan(self) -> Plan:
        """The fates that the method has arrived at; the model is not changed.

        Raises:
            MethodError: the method decides nothing.
        """
        raise MethodError(f"{type(self).__name__} decides nothing: it does not override plan()")

    def fit(self, *_args: Any, **_options: Any) -> Any:
        """Trains in the rounds that the method prescribes.

        Raises:
            MethodError: the method has no rounds of its own.
        """
        raise MethodError(
            f"{type(self).__name__} has no rounds of its own: train with shallower.training.train(..., method=method)"
        )

    def detach(self) -> None:
        """Removes what the method added to the model; the trained weights stay as they are."""
        attachment.detach(self.model)


def linearisable(sites: Sites) -> Sites:
    """Those sites that may become linear; the reasons of the others go to `skipped`.

    Raises:
        MethodError: there is none.
    """
    reasons = {site.name: reason for site in sites if (reason := cannot_be_linear(site))}
    if len(reasons) == len(sites):
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise MethodError(f"there is no site that may become linear{': ' if told else ''}{told}")
    chosen = tuple(site for site in sites if site.name not in reasons)
    return sites.only(chosen, reasons)

"""Layer Folding: LayerCollapse's slopes under another penalty.

    method = LayerFolding(model, sites, strength=0.1)
    method.fit(loader, task_loss, recipe, arrive=None)
    plan = method.plan()

Reference: Layer Folding, arXiv 2106.09309: f becomes a x + (1 - a) f(x), a from 0, and |1 - a^p| with p = 2 is added to
the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.methods.collapsing.layer_collapse import Granularity, LayerCollapse, _whole
from shallower.sites import Sites


class LayerFolding(LayerCollapse):
    """As `LayerCollapse`, but pulled by strength * sum over active sites of |1 - a^2|, with slopes of at least 0.

    At a = 0 the penalty does not pull at all: the task's gradient has to move a slope first. The pull grows with the
    slope, so that the slopes part into those that stay near 0 and those that go to 1.

    Args:
        model, sites, strength, granularity, slope_lr, arrive_in: see `LayerCollapse`.

    Raises:
        MethodError, SiteError: see `LayerCollapse`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        strength: float = 0.5,
        *,
        granularity: Granularity = "site",
        slope_lr: float | None = None,
        arrive_in: int | None = None,
    ) -> None:
        super().__init__(model, sites, strength, granularity=granularity, slope_lr=slope_lr, arrive_in=arrive_in)

    def penalty(self) -> Tensor:
        """strength * sum over active sites of |1 - a^2|, per channel the mean."""
        slopes = [_whole(self.activations[name].slope) for name in self.active]
        if not slopes:
            return super().penalty()
        return self.strength * torch.stack([(1 - a.square()).abs().mean() for a in slopes]).sum()

    def add_penalty_grad(self) -> None:
        """After `backward()`, adds the gradient of the penalty to that of each active slope."""
        for name in self.active:
            slope = self.activations[name].slope
            if slope.requires_grad:
                a = slope.detach()
                gradient = torch.sign(a.square() - 1) * a * (2 * self.strength / a.numel())
                slope.grad = gradient if slope.grad is None else slope.grad.add_(gradient)

    @torch.no_grad()
    def after_step(self, lr: float) -> None:
        """As `LayerCollapse.after_step`, and no slope is negative."""
        super().after_step(lr)
        for module in self.activations.values():
            module.slope.clamp_(min=0)

"""Layer Folding: LayerCollapse's slopes under another penalty.

    method = sh.LayerFolding(model, sites, strength=0.1)
    method.fit(loader, task_loss, recipe, sh.Stages(arrive=None))
    plan = method.plan()

Reference: Layer Folding, arXiv 2106.09309: f becomes a x + (1 - a) f(x), a from 0, and |1 - a^p| with p = 2 is added to
the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.methods.collapsing.layer_collapse import Granularity, LayerCollapse
from shallower.sites import Sites


class LayerFolding(LayerCollapse):
    """As `LayerCollapse`, but pulled by strength * sum over active sites of |1 - a^2|, with slopes of at least 0.

        method = sh.LayerFolding(model, sh.find_sites(model, example_inputs), strength=0.1)
        method.fit(loader, task_loss, sh.Recipe(epochs=3, lr=5e-5), sh.Stages(arrive=None))
        plan = method.plan()

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

    def distance(self, slope: Tensor) -> Tensor:
        """What the penalty measures of each slope: |1 - a^2|."""
        return (1 - slope.square()).abs()

    def gradient(self, slope: Tensor) -> Tensor:
        """The derivative of `distance`: 2 a sign(a^2 - 1)."""
        return 2 * slope * torch.sign(slope.square() - 1)

    @torch.no_grad()
    def after_step(self, lr: float | None = None) -> None:
        """As `LayerCollapse.after_step`, and no slope is negative."""
        super().after_step(lr)
        for module in self.activations.values():
            module.slope.clamp_(min=0)

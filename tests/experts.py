"""Small mixtures of experts as people write them: 3-d parameters, picked or multiplied in batches or stretches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

How = Literal["picked", "scattered", "stretches", "soft"]


class Mixture(nn.Module):
    """A residual mixture whose experts lie in 3-d parameters.

    Args:
        top: how many experts a token has.
        how: "picked": the matrices of the chosen experts are picked; "scattered": all experts run on all tokens, with
            weights that are scattered among zeros; "stretches": tokens in the order of their experts; "soft": all
            experts, weighted by a softmax.
        scores: what the router's outputs become before the choice.
        normed: whether the weights of the chosen add up to 1.
        shared: whether an expert more reads every token.
        corrected: whether a bias is added for the choice alone.
        groups: of this many groups of experts one is chosen first.
    """

    def __init__(
        self, top: int = 2, how: How = "picked", *, scores: str = "softmax", normed: bool = False, shared: bool = False,
        corrected: bool = False, groups: int = 1, experts: int = 8,
    ) -> None:  # fmt: skip
        super().__init__()
        self.top, self.how, self.scores, self.normed, self.groups = top, how, scores, normed, groups
        self.num_experts = experts
        self.into = nn.Linear(5, 8)
        self.router = nn.Linear(8, experts)
        self.up = nn.Parameter(torch.empty(experts, 8, 16))
        self.up_bias = nn.Parameter(torch.empty(experts, 16))
        self.down = nn.Parameter(torch.empty(experts, 16, 8))
        self.shared = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) if shared else None
        self.correction = nn.Parameter(torch.empty(experts)) if corrected else None
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.into(tokens).flatten(0, -2)
        scores = self.router(x)
        scores = scores.softmax(-1) if self.scores == "softmax" else scores.sigmoid()
        y: Tensor = x + getattr(self, f"_{self.how}")(x, scores)
        if self.shared is not None:
            y = y + self.shared(x)
        return self.out(y).unflatten(0, tokens.shape[:-1])

    def _chosen(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        choice = scores if self.correction is None else scores + self.correction
        if self.groups > 1:
            each = choice.view(-1, self.groups, self.num_experts // self.groups)
            of_group = each.topk(2, -1)[0].sum(-1)
            mask = torch.zeros_like(of_group).scatter_(1, of_group.topk(1, -1)[1], 1)
            choice = each.masked_fill(mask[..., None] == 0, -torch.inf).flatten(1)
        chosen = choice.argmax(-1)[:, None] if self.top == 1 else choice.topk(self.top, -1)[1]
        weights = scores.gather(1, chosen)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, chosen

    def _picked(self, x: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = self._chosen(scores)
        hidden = F.gelu((x[:, None, None] @ self.up[chosen])[:, :, 0] + self.up_bias[chosen])
        return ((hidden[:, :, None] @ self.down[chosen])[:, :, 0] * weights[..., None]).sum(1)

    def _scattered(self, x: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = self._chosen(scores)
        return self._soft(x, torch.zeros_like(scores).scatter(1, chosen, weights))

    def _soft(self, x: Tensor, weights: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.up + self.up_bias[:, None])
        return torch.einsum("ne,end->nd", weights, torch.bmm(hidden, self.down))

    def _stretches(self, x: Tensor, scores: Tensor) -> Tensor:
        weights, chosen = self._chosen(scores)
        order, places = chosen.flatten().sort()
        ends = torch.bincount(order, minlength=self.num_experts).cumsum(0).int()
        rows = x[places // self.top]
        hidden = F.gelu(F.grouped_mm(rows, self.up, offs=ends) + self.up_bias[order])
        made = F.grouped_mm(hidden, self.down, offs=ends) * weights.flatten()[places, None]
        return made[places.argsort()].view(-1, self.top, x.shape[-1]).sum(1)

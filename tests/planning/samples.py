"""Sites and plans for the tests of planning."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.planning.plan import Plan
from shallower.sites import LinearMap, Place, Site

N = 12


def linear(name: str, d_in: int, d_out: int, bias: bool = True) -> LinearMap:
    return LinearMap(name, "linear", d_in, d_out, bias, positions=4)


def site(name: str = "mlp", **changes: Any) -> Site:
    whole = Site(name, "feed-forward", N, linear("0", 6, N), (linear("2", N, 5),), Place("1"), "gelu")
    return dataclasses.replace(whole, **changes)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, N), nn.GELU(), nn.Linear(N, 5))


def fitted_plan() -> Plan:
    torch.manual_seed(1)
    fates = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 1, 2])
    fit = Fit((torch.randn(5, 4),), (torch.randn(5),), torch.randn(3, 6), (torch.randn(5, 3),))
    entry = Entry(site(), fates, torch.randn(N), torch.randn(N), torch.rand(N), "prelu", fit)
    return Plan((entry,), "ab" * 32, "test")


def same(a: Plan, b: Plan) -> bool:
    def numbers(plan: Plan) -> list[torch.Tensor]:
        found = []
        for e in plan.entries:
            found += [e.fates, e.slopes, e.offsets, *([] if e.alphas is None else [e.alphas])]
            found += [] if e.fit is None else list(e.fit.tensors.values())
        return found

    texts = [(p.method, p.fingerprint, [(e.site, e.family) for e in p.entries]) for p in (a, b)]
    x, y = numbers(a), numbers(b)
    return texts[0] == texts[1] and len(x) == len(y) and all(torch.equal(s, t) for s, t in zip(x, y, strict=True))

"""What was squeezed once is found and squeezed again, and each place is still the one it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.finding.kinds import find_sites
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate


class Chain(nn.Module):
    """Calls one function, or one module, after each of its layers."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor], depth: int = 4) -> None:
        super().__init__()
        self.f = f
        self.act = nn.GELU()
        for i in range(depth):
            setattr(self, f"l{i}", nn.Linear(8 if i else 4, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.call(self.l0(x))
        x = self.call(self.l1(x))
        x = self.call(self.l2(x))
        x = self.call(self.l3(x))
        return self.head(x)  # type: ignore[no-any-return]

    def call(self, x: Tensor) -> Tensor:
        return self.f(self, x)


KINDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda _, x: F.relu(x),
    "module": lambda m, x: m.act(x),  # type: ignore[no-any-return]
    "product": lambda _, x: x * torch.sigmoid(1.5 * x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["l0", "l1", "l2"])
def test_a_second_round_addresses_the_calls_of_the_original(kind: str, first: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Chain(KINDS[kind]).to(dtype).eval()
    x = torch.randn(16, 4, dtype=dtype)
    sites = find_sites(model, x)
    places = {site.name: site.activation for site in sites}
    once = apply(model, Plan.collapse(sites.select(first)), x)
    again = find_sites(once, x)
    assert set(again.names) == set(places) - {first}
    for name, place in places.items():
        if name != first and place is not None and place.calls:
            assert again[name].activation == place or again[name].activation.calls == ()
    plan = Plan.collapse(again)
    twice = apply(once, plan, x)
    assert torch.allclose(twice(x), simulate(once, plan)(x), rtol=0.05, atol=0.02)
    ran: list[str] = []
    for name, module in twice.named_modules():
        if isinstance(module, (nn.ReLU, nn.GELU)) or type(module).__name__ == "Pointwise":
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    twice(x)
    linear = x
    for layer in ("l0", "l1", "l2", "l3", "head"):
        linear = getattr(twice, layer)(linear)
    assert not ran
    assert torch.equal(twice(x), linear)


def test_a_method_attaches_to_a_result_at_the_right_place() -> None:
    from shallower.methods.collapsing.layer_collapse import LayerCollapse

    torch.manual_seed(0)
    model = Chain(KINDS["function"]).eval()
    x = torch.randn(16, 4)
    once = apply(model, Plan.collapse(find_sites(model, x).select("l1")), x)
    sites = find_sites(once, x)
    expected = once(x)
    method = LayerCollapse(once, sites.select("l2"))
    (slope,) = method.activations.values()
    seen: list[Tensor] = []
    slope.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    read: list[Tensor] = []
    once.l2.register_forward_hook(lambda _m, _a, output: read.append(output))
    once.eval()
    torch.testing.assert_close(once(x), expected)
    assert torch.equal(seen[0], read[0])

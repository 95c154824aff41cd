"""What a foreign loop does for a method, without any foreign library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.errors import MethodError
from shallower.integrations.following import Following
from shallower.methods.base import Method

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


def attached(model: nn.Module, **options: Any) -> sh.LayerCollapse:
    return sh.LayerCollapse(model, sh.find_sites(model, X), **options)


def trained(following: Following, model: nn.Module, steps: int) -> list[dict[str, float]]:
    """A loop as somebody else's library runs it."""
    method, seen = following.method, []
    optimizer = torch.optim.SGD(method.param_groups(weight_decay=0.1), lr=0.1)
    following.begin(model, steps, [optimizer])
    for _ in range(steps):
        method.before_step()
        model(X).square().mean().backward()
        method.add_penalty_grad()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step()
        seen.append(method.metrics())
    return seen


def test_slopes_arrive_in_their_part_of_the_training_and_the_result_is_the_collapsed_network(tmp_path: Path) -> None:
    model = network()
    following = Following(attached(model), arrive=0.5, directory=tmp_path / "small")
    seen = trained(following, model, steps=8)
    assert seen[3] == {"shallower/slope": 1.0, "shallower/linear": 1}
    following.finish((X, None))
    assert following.result is not None
    torch.testing.assert_close(following.result(X), model.eval()(X), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sh.load(tmp_path / "small", model=network())(X), following.result(X))


def test_the_decoupled_penalty_reads_the_rate_from_the_optimizer() -> None:
    model = network()
    following = Following(attached(model, decoupled=True, strength=1.0), arrive=None)
    first, *_ = trained(following, model, steps=1)
    assert first["shallower/slope"] == pytest.approx(2 * 0.1, abs=0.05)


def test_a_schedule_of_the_methods_own_stays() -> None:
    model = network()
    method = attached(model, arrive_in=100)
    trained(Following(method), model, steps=2)
    assert method.arrive_in == 100


def test_a_method_without_slopes_is_followed_too() -> None:
    model = network()
    assert trained(Following(Method(model, sh.find_sites(model, X))), model, steps=2) == [{}, {}]


def test_what_cannot_be_followed_is_refused() -> None:
    model = network()
    method = attached(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with pytest.raises(MethodError, match="another model"):
        Following(method).begin(network(), 1, [])
    with pytest.raises(MethodError, match="param_groups"):
        Following(method).begin(model, 1, [optimizer])
    with pytest.raises(MethodError, match="arrive="):
        Following(method, arrive=0)
    with pytest.raises(MethodError, match="several passes"):
        Following(sh.StructuralDropout(network(), sh.find_sites(network(), X)))
    with pytest.raises(MethodError, match="example_inputs="):
        Following(method).finish(None)


def test_a_part_of_the_trained_model_may_have_the_method() -> None:
    part = network()
    whole = nn.Sequential(nn.Identity(), part)
    Following(attached(part)).begin(whole, 1, [torch.optim.SGD(whole.parameters(), lr=0.1)])

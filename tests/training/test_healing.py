"""Healing: a small network learns to do what the original does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shallower.errors import MethodError, TrainingError
from shallower.finding.kinds import find_sites
from shallower.planning.entries import Entry
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.training.healing import heal, recipe
from shallower.training.matching import Matching


class Net(nn.Module):
    """One hidden layer and a head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def data(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def squeezed() -> tuple[nn.Module, nn.Module, Sites]:
    torch.manual_seed(0)
    dense = Net().eval()
    sites = find_sites(dense, data(1)[0])
    plan = Plan((Entry.narrow(sites[0], torch.arange(8)),))
    return dense, apply(dense, plan, data(1)[0]), sites


def error(small: nn.Module, dense: nn.Module) -> float:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((small(x) - dense(x)).norm() / (dense(x) - x).norm())


@pytest.mark.parametrize("match", ["outputs", "sites"])
def test_healing_brings_the_small_network_nearer_and_leaves_the_original(match: str) -> None:
    dense, small, sites = squeezed()
    weights = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    before = error(small, dense)
    history = heal(
        small,
        dense,
        data(),
        recipe(8, lr=1e-2),
        Matching("sites", sites) if match == "sites" else None,
        cpu=True,
    )
    assert history.losses[-1] < history.losses[0]
    assert error(small, dense) < 0.5 * before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dense.state_dict().items())
    assert not any(module._forward_hooks for module in [*dense.modules(), *small.modules()])


def test_logits_are_compared_as_distributions_and_padding_is_left_out() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        dense.lm_head.weight.mul_(30)
    ids = torch.randint(1, 20, (8, 6))
    mask = torch.ones(8, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    sites = find_sites(dense, batch)
    small = apply(dense, Plan((Entry.narrow(sites[0], torch.arange(4)),)), batch)
    (first,) = heal(small, dense, [batch], recipe(1, lr=1e-9), cpu=True).losses
    changed = {**batch, "input_ids": torch.where(mask.bool(), ids, 3)}
    (other,) = heal(small, dense, [changed], recipe(1, lr=1e-9), cpu=True).losses
    assert other == pytest.approx(first, rel=1e-4)
    with torch.no_grad():
        there, here = (m(**batch).logits[:, :4].log_softmax(-1) for m in (dense, small))
        wanted = float((there.exp() * (there - here)).sum(-1).mean())
    assert first == pytest.approx(wanted, rel=1e-3)


def test_an_interrupted_healing_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    dense, small, _ = squeezed()
    heal(small, dense, data(), recipe(3, lr=1e-2), cpu=True)
    whole = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    class StoppedError(Exception):
        pass

    dense, small, _ = squeezed()
    path = tmp_path / "heal.safetensors"
    batches = data()
    calls = 0

    def two_epochs(_: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StoppedError
        return 0.0

    with pytest.raises(StoppedError):
        heal(small, dense, batches, recipe(3, lr=1e-2), cpu=True, checkpoint=path, score=two_epochs)
    dense, small, _ = squeezed()
    history = heal(small, dense, batches, recipe(3, lr=1e-2), cpu=True, checkpoint=path)
    assert history.resumed == 24
    assert all(torch.equal(tensor, whole[name]) for name, tensor in small.state_dict().items())


def test_options_that_contradict_one_another_are_errors() -> None:
    sites = squeezed()[2]
    with pytest.raises(MethodError, match="temperature"):
        Matching(temperature=0)
    with pytest.raises(MethodError, match="temperature"):
        Matching(temperature=float("nan"))
    with pytest.raises(MethodError, match="sites="):
        Matching("sites")
    with pytest.raises(MethodError, match="sites="):
        Matching(sites=sites)
    with pytest.raises(MethodError, match="choose"):
        Matching("nothing")  # type: ignore[arg-type]


def test_impossible_models_and_batches_are_errors() -> None:
    dense, small, _ = squeezed()
    with pytest.raises(MethodError, match="same model"):
        heal(dense, dense, data(), recipe(1))
    with pytest.raises(TrainingError, match="one-shot"):
        heal(small, dense, iter(data()), recipe(1))
    with pytest.raises(TrainingError, match=r"step 1: .* Net does not run on these inputs"):
        heal(small, dense, [torch.randn(2, 5)], recipe(1), cpu=True)

"""Fewer layers, from sites to the smaller model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import shallower as sh
from tests.methods.depth.networks import Residual, inputs, sites_of


def away(model: nn.Module, small: nn.Module) -> float:
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float((small(x) - model(x)).square().mean())


@pytest.mark.parametrize("target", ["macs:76%", "params:76%", "size:76%", 1])
def test_the_target_is_met_with_as_few_layers_as_it_takes(target: str | int) -> None:
    model, batches = Residual((1, 0.2, 1, 1)), inputs()
    plan = sh.squeeze_depth(model, sites_of(model, batches), batches, target)
    small = sh.apply(model, plan, batches[0])
    assert len(small.layers) == 3
    assert [e.site.name for e in plan.entries if not len(e.kept)] == ["layers.1:layer"]
    assert plan.method == "squeeze_depth"
    assert len(plan.seen) == 6 * 32


def test_refitting_is_better_than_dropping_alone() -> None:
    model, batches = Residual((1, 1, 0.7, 1, 1)), inputs(count=8, rows=64)
    sites = sites_of(model, batches)
    found = {}
    for refit in (True, False):
        plan = sh.squeeze_depth(model, sites, batches, 1, refit=refit)
        found[refit] = away(model, sh.apply(model, plan, batches[0]))
    assert found[True] < 0.7 * found[False]


def test_a_score_says_how_many_may_go() -> None:
    model, batches = Residual((1, 0.01, 1, 0.01)), inputs()
    sites = sites_of(model, batches)
    plan = sh.squeeze_depth(model, sites, batches, "drop:0.01", score=lambda small: -away(model, small), refit=False)
    assert sorted(entry.site.name for entry in plan.entries) == ["layers.1:layer", "layers.3:layer"]
    with pytest.raises(sh.TargetError, match="without the branch that matters least"):
        sh.squeeze_depth(model, sites, batches, "drop:0.0000001", score=lambda small: -away(model, small), refit=False)
    with pytest.raises(sh.MethodError, match="needs score="):
        sh.squeeze_depth(model, sites, batches, "drop:1%")


def test_a_latency_is_met_as_it_is_measured() -> None:
    model, batches = Residual((1, 0.1, 1, 0.1), width=512, hidden=4096), inputs(count=2, width=512)
    sites = sites_of(model, batches)
    plan = sh.squeeze_depth(model, sites, batches, "latency:1.2x", refit=False)
    assert plan.entries[0].site.name in ("layers.1:layer", "layers.3:layer")


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Residual((1, 1, 0.7, 1, 1)), inputs(count=8, rows=64)
    sites = sites_of(model, batches)
    whole = sh.squeeze_depth(model, sites, batches, 1)
    from shallower.methods.depth import compensating

    fitted, count = compensating.narrowed_fit, 0

    def interrupted(*args: object, **kwargs: object) -> sh.Entry:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return fitted(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(compensating, "narrowed_fit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sh.squeeze_depth(model, sites, batches, 1, checkpoint=tmp_path / "kept")
    again = sh.squeeze_depth(model, sites, batches, 1, checkpoint=tmp_path / "kept")
    x = batches[0]
    with torch.no_grad():
        torch.testing.assert_close(sh.simulate(model, again)(x), sh.simulate(model, whole)(x))


def test_a_stock_class_loads_a_language_model_with_fewer_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=40
    )
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 40, (8, 12))} for _ in range(4)]
    sites = sh.find_sites(model, batches[0], kinds=("hidden", "heads", "branch"))
    plan = sh.squeeze_depth(model, sites, batches, 2)
    small = sh.apply(model, plan, batches[0])
    assert small.config.num_hidden_layers == 2
    sh.save(small, tmp_path / "small")
    back = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids: Tensor = batches[1]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, small(ids).logits)


def test_what_cannot_be_done_is_said() -> None:
    model, batches = Residual((1, 1)), inputs()
    sites = sites_of(model, batches)
    with pytest.raises(sh.SiteError, match="no branch among the sites"):
        sh.squeeze_depth(model, sh.find_sites(model, batches[0]), batches, 1)
    with pytest.raises(sh.MethodError, match="at least one layer"):
        sh.squeeze_depth(model, sites, batches, 0)
    with pytest.raises(sh.FitError, match="empty"):
        sh.squeeze_depth(model, sites, [], 1)
    with pytest.raises(sh.TargetError, match="as it is"):
        sh.squeeze_depth(model, sites, batches, "params:10M")
    with pytest.raises(sh.TargetError, match="without all branches"):
        sh.squeeze_depth(model, sites, batches, 3)

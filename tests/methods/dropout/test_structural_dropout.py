"""Structural Dropout: training at many widths, the live model, and what is written at one of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shallower.errors import MethodError, TargetError, TrainingError
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.methods.collapsing.layer_collapse import LayerCollapse
from shallower.methods.dropout.options import DropoutOptions
from shallower.methods.dropout.prefix import not_computed
from shallower.methods.dropout.structural_dropout import StructuralDropout
from shallower.modules.attachment import detached_copy
from shallower.planning.plan import Plan
from shallower.sites import Sites
from shallower.surgery.applying import apply
from shallower.training import Recipe, train
from tests.networks import convolutional_networks, networks, seeds
from tests.surgery.test_zoo import admit, outputs
from tests.zoo import ZOO, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 3)).to(dtype)


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )


def sites_of(model: nn.Module, inputs: Any = None) -> Sites:
    inputs = torch.randn(2, 6, dtype=next(model.parameters()).dtype) if inputs is None else inputs
    return find_sites(model.eval(), inputs)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * count, 6, generator=generator)
    return list(zip(x.split(8), (x[:, 0] > 0).long().split(8), strict=True))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


# ---------------------------------------------------------------------- the live model and what is written


def check_written_equals_live(model: nn.Module, x: Tensor, draw: Callable[[int, int], int], rescale: float) -> None:
    """At random widths the small model is what the live one was; at the full width nothing has changed."""
    sites = sites_of(model, x)
    if not any(site.width > 1 and not_computed(site) is None for site in sites):
        return
    before = model(x)
    keys = list(model.state_dict())
    method = StructuralDropout(model, sites, DropoutOptions(rescale=rescale))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    method.set_width({site.name: draw(1, site.width) for site in method.sites})
    live = model(x)
    small = apply(model, method.plan(), x)
    torch.testing.assert_close(small(x), live, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == keys
    method.detach()
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(network=networks(), seed=seeds, rescale=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_written_model_answers_as_the_live_one_did(
    network: tuple[nn.Module, Tensor], seed: int, rescale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_written_equals_live(
        *network, lambda low, high: int(torch.randint(low, high + 1, (), generator=generator)), rescale
    )


@settings(max_examples=20)
@given(network=convolutional_networks(), seed=seeds, rescale=st.sampled_from([0.0, 0.5, 1.0]))
def test_written_convolutions_answer_as_the_live_ones_did(
    network: tuple[nn.Module, Tensor], seed: int, rescale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    check_written_equals_live(
        *network, lambda low, high: int(torch.randint(low, high + 1, (), generator=generator)), rescale
    )


def check_architecture(specimen: Specimen) -> None:
    patient = admit(specimen)
    if all(site.not_narrow or site.width < 2 for site in patient.sites):
        pytest.skip("nothing can be narrowed")
    method = StructuralDropout(patient.model, patient.sites)
    method.set_width({site.name: max(1, site.width // 3) for site in method.sites})
    live = outputs(patient.model, patient.inputs)
    small = apply(patient.model, method.plan(), patient.inputs)
    torch.testing.assert_close(outputs(small, patient.inputs), live, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("specimen", [s for s in ZOO if s.sites], ids=lambda s: s.name)
def test_every_architecture_is_written_as_it_ran(specimen: Specimen) -> None:
    check_architecture(specimen)


@pytest.mark.parametrize(("rescale", "scale"), [(1.0, 4.0), (0.5, 2.0), (0.0, 1.0)])
def test_the_scale_makes_up_for_the_channels_that_are_missing(rescale: float, scale: float) -> None:
    model = mlp()
    model[4].weight.data.fill_(1.0)
    model[3] = nn.ReLU()
    method = StructuralDropout(model, sites_of(model), DropoutOptions(rescale=rescale), sort=None)
    x = torch.randn(4, 6, dtype=torch.float64)
    method.set_width(6, site="2")
    hidden = model[3](model[2](model[1](model[0](x))))
    torch.testing.assert_close(model(x), hidden.sum(1, keepdim=True) * scale + model[4].bias)


def test_a_width_is_set_without_copies_and_at_once() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model))
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    started = time.perf_counter()
    for _ in range(100):
        method.set_width({"0": 8, "2": 12})
    assert (time.perf_counter() - started) / 100 < 1e-3
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert method.widths() == {"0": 8, "2": 12}


def test_shares_take_the_nearest_width_of_the_table() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model), DropoutOptions(lower_bound=4, step=4))
    method.set_width("50%")
    assert method.widths() == {"0": 8, "2": 12}
    method.set_width("1%", site="2")
    assert method.widths() == {"0": 8, "2": 4}


@pytest.mark.parametrize("width", [0, -1, 17, "0%", "101%", "half", 1.5, True])
def test_widths_that_there_are_not_are_refused(width: Any) -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model))
    with pytest.raises(MethodError):
        method.set_width(width, site="0")
    assert method.widths() == {"0": 16, "2": 24}


def test_one_width_for_all_sites_must_fit_the_smallest() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model))
    with pytest.raises(MethodError, match=r"^0: width 20 must be a number of channels from 1 to 16"):
        method.set_width(20)
    assert method.widths() == {"0": 16, "2": 24}


def test_a_site_that_there_is_not_is_refused() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model))
    with pytest.raises(MethodError, match="no site 'x'; the sites are 0, 2"):
        method.set_width(4, site="x")


def test_an_attached_model_can_be_copied_and_the_copy_is_free() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model))
    x = torch.randn(3, 6, dtype=torch.float64)
    full = model(x)
    method.set_width("50%")
    torch.testing.assert_close(detached_copy(model)(x), full)
    twin = copy.deepcopy(model)
    live = model(x)
    method.set_width("25%")
    torch.testing.assert_close(twin(x), live)


def test_a_model_that_moves_to_another_type_is_detached_with_its_statistics() -> None:
    model = convolutions()
    x = torch.randn(2, 3, 6, 6)
    method = StructuralDropout(model, sites_of(model, x))
    model.double()
    model.train()
    model(x.double())
    method.detach()
    assert model[1].running_mean.dtype == torch.float64
    assert bool(model[1].running_mean.ne(0).any())


def test_the_fused_encoder_layer_of_torch_takes_the_width() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    method = StructuralDropout(layer, find_sites(layer, x))
    method.set_width("25%")
    with torch.no_grad():
        live = layer(x)
        torch.testing.assert_close(apply(layer, method.plan(), x)(x), live, rtol=1e-10, atol=1e-10)


NAMED = ("bert", "gpt2", "timm_mobilenet_v3", "swiglu")


@pytest.mark.parametrize("specimen", [s for s in ZOO if s.name in NAMED], ids=lambda s: s.name)
def test_some_architectures_are_written_as_they_ran(specimen: Specimen) -> None:
    check_architecture(specimen)


def attention_models() -> dict[str, nn.Module]:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    bert = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    llama = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=24,
        use_cache=False,
    )
    return {"bert": BertModel(bert, add_pooling_layer=False), "llama": LlamaModel(llama)}


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_heads_are_nested_like_channels(name: str, rescale: float) -> None:
    model = attention_models()[name].double().eval()
    ids = {"input_ids": torch.arange(14).view(2, 7)}
    sites = find_sites(model, ids, kinds=("hidden", "heads"))
    before = model(**ids).last_hidden_state
    method = StructuralDropout(model, sites, DropoutOptions(rescale=rescale))
    torch.testing.assert_close(model(**ids).last_hidden_state, before, rtol=1e-10, atol=1e-10)
    heads = [site for site in sites if site.kind == "heads"]
    assert heads
    method.set_width({site.name: site.width // 2 for site in sites})
    with FlopCounterMode(display=False) as counter:
        live = model(**ids).last_hidden_state
    small = apply(model, method.plan(), ids)
    torch.testing.assert_close(small(**ids).last_hidden_state, live, rtol=1e-10, atol=1e-10)
    with FlopCounterMode(display=False) as small_counter:
        small(**ids)
    assert counter.get_total_flops() == small_counter.get_total_flops()  # the live model computes no more
    method.detach()
    torch.testing.assert_close(model(**ids).last_hidden_state, before, rtol=1e-10, atol=1e-10)


def test_channels_may_be_sorted_by_what_batches_tell() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[5]  # one of the two says nothing new
        model[0].bias[3] = model[0].bias[5]
    x = torch.randn(64, 6, dtype=torch.float64)
    before = model(x)
    wanted = {tuple(row.tolist()) for row in model[0].weight}
    StructuralDropout(model, sites_of(model), sort=[x])
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    rows = [tuple(row.tolist()) for row in model[0].weight]
    assert set(rows) == wanted
    assert len(set(rows[:-1])) == 15  # the repetition is the last


# ---------------------------------------------------------------------- training


def test_channels_that_are_not_computed_get_no_gradient() -> None:
    model = mlp()
    method = StructuralDropout.as_published(model, sites_of(model), p=1.0)
    model.train()
    method.before_step()
    x = torch.randn(5, 6, dtype=torch.float64)
    method.loss(lambda: model(x).square().mean()).backward()
    k = int(model[0].weight.grad.ne(0).any(1).nonzero().max()) + 1
    assert k < 16
    assert bool(model[2].weight.grad[:, k:].eq(0).all())


def test_a_narrow_step_computes_less() -> None:
    model = mlp()
    method = StructuralDropout.as_published(model, sites_of(model), p=1.0)
    model.train()
    x = torch.randn(5, 6, dtype=torch.float64)
    flops = []
    for _ in range(8):
        method.before_step()
        with FlopCounterMode(display=False) as counter:
            method.loss(lambda: model(x).square().mean()).backward()
        flops.append(counter.get_total_flops())
    method.detach()
    with FlopCounterMode(display=False) as counter:
        model(x).square().mean().backward()
    assert max(flops) < counter.get_total_flops()


def test_eval_mode_has_the_width_that_was_set_and_not_a_drawn_one() -> None:
    model = mlp()
    method = StructuralDropout.as_published(model, sites_of(model), p=1.0)
    x = torch.randn(5, 6, dtype=torch.float64)
    full = model(x)
    model.train()
    method.before_step()
    assert not torch.equal(model(x), full)
    torch.testing.assert_close(model.eval()(x), full)
    method.after_step(0.1)
    torch.testing.assert_close(model.train()(x), full)


def widths_seen(method: StructuralDropout, model: nn.Module, steps: int) -> list[tuple[int, ...]]:
    """The widths that the layers gave in every pass."""
    seen: list[tuple[int, ...]] = []
    hidden: list[int] = []
    handles = [model[i].register_forward_hook(lambda _m, _x, y: hidden.append(y.shape[-1])) for i in (0, 2)]
    model.train()
    x = torch.randn(2, 6, dtype=torch.float64)
    for _ in range(steps):
        method.before_step()
        method.loss(lambda: model(x).square().mean())
    for handle in handles:
        handle.remove()
    for i in range(0, len(hidden), 2):
        seen.append(tuple(hidden[i : i + 2]))
    return seen


def test_the_published_rule_draws_the_full_width_or_any_smaller_one() -> None:
    model = mlp()
    seen = widths_seen(StructuralDropout.as_published(model, sites_of(model)), model, 600)
    first = [a for a, _ in seen]
    assert len(seen) == 600
    assert set(first) == set(range(1, 17))
    assert abs(first.count(16) / 600 - 0.5) < 0.08
    assert len({(a, b) for a, b in seen}) > 100  # each site for itself


def test_the_sandwich_has_the_full_and_the_smallest_width_in_every_step() -> None:
    model = mlp()
    seen = widths_seen(StructuralDropout(model, sites_of(model), DropoutOptions(lower_bound=4, step=4)), model, 5)
    assert len(seen) == 15
    assert seen[0::3] == [(16, 24)] * 5
    assert seen[1::3] == [(4, 4)] * 5
    assert all(a % 4 == 0 and b % 4 == 0 for a, b in seen)


def test_all_sites_of_a_pass_may_have_one_share() -> None:
    model = mlp()
    method = StructuralDropout(
        model, sites_of(model), DropoutOptions(lower_bound="25%", step="25%", passes=6, shared=1.0)
    )
    assert {(a / 16, b / 24) for a, b in widths_seen(method, model, 5)} == {(s, s) for s in (0.25, 0.5, 0.75, 1.0)}


def test_each_site_may_have_a_share_of_its_own() -> None:
    model = mlp()
    method = StructuralDropout(
        model, sites_of(model), DropoutOptions(lower_bound="25%", step="25%", passes=6, shared=0.0)
    )
    seen = {(a / 16, b / 24) for a, b in widths_seen(method, model, 8)}
    assert {(a, b) for a in (0.25, 0.5, 0.75) for b in (0.25, 0.5, 0.75)} <= seen


def test_the_loss_is_the_mean_over_the_passes() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model), DropoutOptions(distillation=0.0, passes=0, lower_bound=4))
    x = torch.randn(5, 6, dtype=torch.float64)
    model.train()
    method.before_step()
    found = method.loss(lambda: model(x).square().mean())
    model.eval()
    full = model(x).square().mean()
    method.set_width(4)
    torch.testing.assert_close(found, (full + model(x).square().mean()) / 2)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_the_full_width_teaches_and_is_not_taught(part: float) -> None:
    model = mlp()
    method = StructuralDropout(
        model, sites_of(model), DropoutOptions(passes=0, lower_bound=4, distillation=part, logits=True)
    )
    x, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    model.train()
    method.before_step()
    found = method.loss(lambda: F.cross_entropy(model(x), labels))
    model.eval()
    full = model(x)
    method.set_width(4)
    p, q = full.detach().float().softmax(-1), model(x).float().softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    narrow = (1 - part) * F.cross_entropy(model(x), labels) + part * divergence
    expected = (F.cross_entropy(full, labels) + narrow) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    got = torch.autograd.grad(found, model[4].bias)[0]
    torch.testing.assert_close(got, torch.autograd.grad(expected, model[4].bias)[0], rtol=1e-5, atol=1e-7)


def test_the_output_may_be_given_beside_the_loss() -> None:
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64)
    method = StructuralDropout(model, sites_of(model), DropoutOptions(logits=False))
    copied = model.forward  # not the model's own call

    def closure() -> tuple[Tensor, Tensor]:
        output = copied(x)
        return output.square().mean(), output

    model.train()
    method.before_step()
    assert bool(method.loss(closure).isfinite())
    with pytest.raises(MethodError, match=r"let closure return \(loss, output\)"):
        method.loss(lambda: closure()[0])


def test_narrow_passes_leave_the_statistics_to_the_full_width() -> None:
    x = torch.randn(4, 3, 6, 6)
    states = []
    for passes in (False, True):
        model = convolutions()
        sites = sites_of(model, x)
        model.train()
        if passes:
            method = StructuralDropout(model, sites, DropoutOptions(passes=3, distillation=0.0), sort=None)
            method.before_step()
            method.loss(lambda model=model: model(x).square().mean())
        else:
            model(x)
        states.append(model[1].running_mean)
        assert model[1].momentum == 0.1
    torch.testing.assert_close(*states)


def test_a_width_can_have_statistics_of_its_own() -> None:
    model, x = convolutions(), torch.randn(4, 3, 6, 6)
    method = StructuralDropout(model, sites_of(model, x))
    before = {name: b.clone() for name, b in model.named_buffers()}
    with method.at("50%", [x]) as live:
        narrow = live(x)
        assert not torch.equal(model[4].running_mean, before["4.running_mean"])
    assert method.widths() == {"0": 8}
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    method.set_width("50%", batches=[x])
    torch.testing.assert_close(model(x), narrow)
    torch.testing.assert_close(apply(model, method.plan(), x)(x), narrow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("published", [True, False])
def test_a_training_that_was_interrupted_goes_on_exactly(tmp_path: Path, published: bool) -> None:
    def trained(path: Path | None, stop: bool) -> dict[str, Tensor]:
        model = mlp(torch.float32)
        sites = sites_of(model)
        method = (StructuralDropout.as_published if published else StructuralDropout)(model, sites)
        scores: list[int] = []

        def score(_: nn.Module) -> float:
            scores.append(0)
            if stop and len(scores) == 3:
                raise KeyboardInterrupt
            return 0.0

        recipe = Recipe(epochs=5, lr=1e-2)
        train(model, batches(), cross_entropy, recipe, method=method, score=score, checkpoint=path, cpu=True)
        return dict(model.state_dict())

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(path, stop=True)
    torch.testing.assert_close(trained(path, stop=False), trained(None, stop=False), rtol=0, atol=0)


def test_the_checkpoint_of_another_table_of_widths_is_refused(tmp_path: Path) -> None:
    def run(lower_bound: int) -> None:
        model = mlp(torch.float32)
        method = StructuralDropout(model, sites_of(model), DropoutOptions(lower_bound=lower_bound))
        recipe, path = Recipe(epochs=1, lr=1e-2), tmp_path / "run.safetensors"
        train(model, batches(), cross_entropy, recipe, method=method, checkpoint=path, cpu=True)

    run(4)
    with pytest.raises(
        (MethodError, TrainingError), match=r"another table of widths \(13 widths from 4 to 16, here 12"
    ):
        run(5)


def test_equal_seeds_draw_equal_widths() -> None:
    seen = []
    for seed in (3, 3, 4):
        model = mlp()
        seen.append(widths_seen(StructuralDropout(model, sites_of(model), DropoutOptions(seed=seed)), model, 10))
    assert seen[0] == seen[1] != seen[2]


# ---------------------------------------------------------------------- plans and curves


def test_a_target_keeps_the_same_share_of_every_site_and_is_met() -> None:
    model, x = mlp(), torch.randn(2, 6, dtype=torch.float64)
    method = StructuralDropout(model, sites_of(model), DropoutOptions(lower_bound=1))
    small = apply(model, method.plan("params:40%"), x)
    params = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert params[0] <= 0.4 * params[1]
    widths = {"0": small[0].out_features, "2": small[2].out_features}
    assert method.cost(widths).params == params[0]
    assert widths["0"] / 16 == pytest.approx(widths["2"] / 24, abs=0.07)


def test_a_target_of_the_kv_cache_takes_heads_and_nothing_else() -> None:
    model, ids = attention_models()["llama"].eval(), {"input_ids": torch.arange(14).view(2, 7)}
    model.config.use_cache = True
    method = StructuralDropout(model, find_sites(model, ids, kinds=("hidden", "heads")))
    plan = method.plan("kv:50%")
    small = apply(model, plan, ids)
    assert [entry.site.kind for entry in plan.entries] == ["heads"]
    assert (
        2 * cost_of(small, ids).kv
        == cost_of(model, ids).kv
        == method.cost({"layers.0.self_attn": 4, "layers.0.mlp": 24}).kv
    )


def test_a_lower_bound_that_no_budget_can_meet_is_told() -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model), DropoutOptions(lower_bound="75%"))
    with pytest.raises(TargetError, match=r"smallest widths \(0: 12, 2: 18\) .* would remain"):
        method.plan("params:30%")


@pytest.mark.parametrize("target", ["latency:2x", "drop:1%"])
def test_targets_that_need_a_curve_say_so(target: str) -> None:
    model = mlp()
    method = StructuralDropout(model, sites_of(model))
    with pytest.raises(MethodError, match=r"needs a curve"):
        method.plan(target)


def test_the_full_width_plans_nothing() -> None:
    model = mlp()
    assert len(StructuralDropout(model, sites_of(model)).plan()) == 0


def test_another_site_may_be_collapsed_in_the_same_plan() -> None:
    model, x = mlp(), torch.randn(4, 6, dtype=torch.float64)
    sites = sites_of(model, x)
    method = StructuralDropout(model, sites.select("0"))
    plan = method.plan("50%", beside=Plan.collapse(sites, ["2"]))
    small = apply(model, plan, x)
    method.set_width("50%")
    torch.testing.assert_close(small(x), model[4](model[2](model[1](model[0](x)))), rtol=1e-10, atol=1e-10)
    assert len(plan) == 2


@pytest.mark.parametrize("narrowed", ["0", "2"])
def test_two_methods_train_one_model_and_make_one_plan(narrowed: str) -> None:
    model, x = mlp(), torch.randn(4, 6, dtype=torch.float64)
    sites = sites_of(model, x)
    collapsing = LayerCollapse(model, sites.select(lambda s: s.name != narrowed))
    method = StructuralDropout(model, sites.select(narrowed))
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1)
    model.train()
    for one in (collapsing, method):
        one.before_step()
    method.loss(lambda: model(x).square().mean() + collapsing.penalty()).backward()
    optimizer.step()
    with torch.no_grad():
        for slope in (module.slope for module in collapsing.activations.values()):
            slope.fill_(1.0)
    model.eval()
    method.set_width("50%")
    live = model(x)
    plan = method.plan(beside=collapsing.plan())
    assert len(plan) == 2
    torch.testing.assert_close(apply(model, plan, x)(x), live, rtol=1e-10, atol=1e-10)


def test_the_curve_spends_channels_where_they_count() -> None:
    model = mlp()
    model[2].weight.data[:, 8:] = 0  # the first site has channels that nothing reads
    x = torch.randn(64, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    method = StructuralDropout(model, sites_of(model), DropoutOptions(lower_bound=4, step=4, rescale=0.0))

    def score(model: nn.Module) -> float:
        return -float((model(x) - wanted).detach().square().mean())

    curve = method.curve(score, points=5, search=4, name="likeness")
    assert method.widths() == {"0": 16, "2": 24}
    assert curve.full.widths == {"0": 16, "2": 24}
    best = curve.best("params:60%")
    assert best.widths["0"] == 8
    small = apply(model, method.plan(best), x)
    assert score(small) == pytest.approx(best.score, abs=1e-12)
    assert sum(p.numel() for p in small.parameters()) == best.cost.params
    assert sum(t.numel() * t.element_size() for t in small.parameters()) == best.cost.size


def test_the_curve_measures_the_latency_of_its_front() -> None:
    model, x = mlp(), torch.randn(2, 6, dtype=torch.float64)
    method = StructuralDropout(model, sites_of(model))
    curve = method.curve(lambda m: float(m(x).detach().sum()), points=3, search=0, example_inputs=x)
    assert all(p.cost.latency is not None and p.cost.latency > 0 for p in curve.front())


def test_a_curve_without_statistics_of_its_own_is_warned_of() -> None:
    model, x = convolutions(), torch.randn(4, 3, 6, 6)
    method = StructuralDropout(model, sites_of(model, x))
    with pytest.warns(UserWarning, match="use recalibrate=batches"):
        method.curve(lambda m: float(m(x).detach().sum()), points=2)


def test_the_curve_counts_the_memory_of_statistics() -> None:
    model, x = convolutions(), torch.randn(4, 3, 6, 6)
    method = StructuralDropout(model, sites_of(model, x))
    small = apply(model, method.plan("50%"), x)
    assert method.cost({"0": 4}).size == sum(
        t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers())
    )


def test_a_narrow_pass_leaves_a_cumulative_mean_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(4, 3, 6, 6)
    plain = copy.deepcopy(model)
    method = StructuralDropout(model, sites_of(model, x), DropoutOptions(passes=2), sort=None)
    model.train()
    plain.train()
    for _ in range(3):
        x = torch.randn(4, 3, 6, 6)
        plain(x)
        method.before_step()
        method.loss(lambda x=x: model(x).square().mean())
    method.detach()
    assert int(model[1].num_batches_tracked) == 3
    torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)


def test_a_regression_is_taught_by_the_difference() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(8, 4)
    losses = []
    for part in (0.0, 1.0):
        method = StructuralDropout(model, sites_of(model, x), DropoutOptions(passes=0, distillation=part), sort=None)
        model.train()
        method.before_step()
        losses.append(float(method.loss(lambda: model(x).mean() * 0).detach()))
        method.detach()
    assert losses[0] == 0 < losses[1]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"p": 1.5}, "p=1.5: at most 1"),
        ({"passes": -1}, "passes=-1: at least 0"),
        ({"lower_bound": 0}, "lower_bound=0"),
        ({"lower_bound": 17}, "lower_bound=17 must be a number of channels from 1 to 16"),
        ({"step": 0}, "step=0"),
        ({"step": "x"}, "not a share"),
        ({"sandwich": False}, "teach only where it runs"),
    ],
)
def test_options_out_of_range_are_refused_and_nothing_is_attached(options: dict[str, Any], told: str) -> None:
    model = mlp()
    sites = sites_of(model)
    with pytest.raises(MethodError, match=told):
        StructuralDropout(model, sites, DropoutOptions(**options))
    assert type(model[0]) is nn.Linear


def test_an_unknown_order_is_refused_and_nothing_is_attached() -> None:
    model = mlp()
    with pytest.raises(MethodError, match="'magnitude', batches"):
        StructuralDropout(model, sites_of(model), sort="size")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(x) + self.a(x)))


def test_channels_of_a_residual_sum_are_explained() -> None:
    model, x = Stream(), torch.randn(2, 6)
    sites = find_sites(model.eval(), x, kinds="activation")
    with pytest.raises(MethodError, match=r"residual sum .* narrowed with it"):
        StructuralDropout(model, sites)


@pytest.mark.parametrize("first", [StructuralDropout, LayerCollapse])
def test_a_second_method_at_a_site_is_refused_before_anything_is_changed(first: Any) -> None:
    model = mlp()
    sites = sites_of(model)
    first(model, sites)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MethodError, match="attached here already"):
        StructuralDropout(model, sites)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_synchronised_norm_is_refused() -> None:
    model, x = convolutions(), torch.randn(2, 3, 6, 6)
    sites = sites_of(model, x)
    model[1] = nn.SyncBatchNorm(8)
    with pytest.raises(MethodError, match="`1` is a SyncBatchNorm"):
        StructuralDropout(model, sites)
    assert type(model[0]) is nn.Conv2d

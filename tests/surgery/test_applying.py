"""Surgery equals simulation, and the result costs what the plan says."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shallower.errors import PlanError, SurgeryError
from shallower.finding.kinds import find_sites
from shallower.modules.edits import edits, encoded, replay
from shallower.planning.entries import Entry, Fate
from shallower.planning.fits import Fit
from shallower.planning.forms import form_of
from shallower.planning.plan import CostWarning, Plan
from shallower.sites import Place, Site
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate
from tests.networks import Gated, Packed, convolutional_networks, networks, random_plan
from tests.planning.samples import linear

pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")
many = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def assert_equal_outputs(small: nn.Module, simulated: nn.Module, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    with torch.no_grad():
        expected, found = simulated(x), small(x)
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-300


def fitted(model: nn.Module, x: torch.Tensor, data: st.DataObject) -> tuple[Plan, nn.Module]:
    """A random plan with fitted maps, and its result."""
    try:
        plan = random_plan(find_sites(model, x), data.draw, fits=True)
        return plan, apply(model, plan, x)
    except PlanError as error:  # a linear path that does not fit what an overlapping site leaves
        assume("Apply" not in str(error))
        raise


@many
@given(network=networks(), data=st.data())
def test_any_mix_of_fates_gives_what_the_simulation_gives(network, data):
    model, x = network
    sites = find_sites(model, x)
    plan = random_plan(sites, data.draw)
    small = apply(model, plan, x)
    y = torch.randn_like(x)
    assert_equal_outputs(small, simulate(model, plan), y)


@many
@given(network=convolutional_networks(), data=st.data())
def test_convolutions_after_surgery_give_what_the_simulation_gives(network, data):
    model, x = network
    plan, small = fitted(model, x, data)
    assert_equal_outputs(small, simulate(model, plan), torch.randn_like(x))


@many
@given(network=networks(), data=st.data())
def test_fitted_maps_give_what_the_simulation_gives(network, data):
    model, x = network
    plan, small = fitted(model, x, data)
    assert_equal_outputs(small, simulate(model, plan), torch.randn_like(x))


@many
@given(network=st.one_of(networks(), convolutional_networks()), data=st.data())
def test_costs_of_a_plan_are_the_costs_of_its_result(network, data):
    model, x = network
    plan = random_plan(find_sites(model, x), data.draw)
    small = apply(model, plan, x)
    assert params(model) - params(small) == plan.params_saved
    assert macs(model, x) - macs(small, x) == plan.macs_saved


@settings(max_examples=12)
@given(network=networks(dtypes=[torch.float32]), data=st.data())
def test_float32_networks_agree_to_rounding(network, data):
    model, x = network
    plan = random_plan(find_sites(model, x), data.draw)
    assert_equal_outputs(apply(model, plan, x).double(), simulate(model, plan).double(), x.double(), 1e-5)


@settings(max_examples=12)
@given(network=networks(dtypes=[torch.bfloat16, torch.float16]), data=st.data())
def test_narrow_types_are_proven_site_by_site_and_stay_narrow(network, data):
    model, x = network
    small = apply(model, random_plan(find_sites(model, x), data.draw), x)
    weights = {m.weight.dtype for m in small.modules() if isinstance(m, nn.Linear)}
    assert weights <= {x.dtype}
    assert small(x).dtype == x.dtype


@settings(max_examples=12)
@given(network=networks(), data=st.data())
def test_replaying_the_edits_gives_the_same_structure(network, data):
    model, x = network
    small = apply(model, random_plan(find_sites(model, x), data.draw), x)
    record = json.loads(json.dumps([encoded(edit) for edit in edits(small)]))
    with torch.device("meta"):
        fresh = copy.deepcopy(model).to("meta")
    fresh = replay(fresh, record).to_empty(device="cpu")
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh.eval()(x), small.eval()(x))


# ---------------------------------------------------------------------------------------------------------- by hand


def mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Site, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Dropout(0.5), nn.Linear(20, 5)).to(dtype)
    site = Site("mlp", "head", 20, linear("0", 6, 20), (linear("3", 20, 5),), Place("1"), "gelu",
                dropouts=(Place("2"),))  # fmt: skip
    return model, site, torch.randn(4, 6, dtype=dtype)


def vgg_head(device: str = "cpu", width: int = 24) -> tuple[nn.Sequential, list[Site], torch.Tensor]:
    with torch.device(device):
        model = nn.Sequential(
            nn.Linear(30, width), nn.ReLU(), nn.Dropout(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        ).double()
    middle = linear("3", width, width)
    sites = [
        Site("first", "head", width, linear("0", 30, width), (middle,), Place("1"), dropouts=(Place("2"),)),
        Site("second", "head", width, middle, (linear("5", width, 10),), Place("4")),
    ]
    return model, sites, torch.randn(4, 30, dtype=torch.float64, device=device)


def test_a_collapse_is_one_linear_layer_at_the_consumers_name():
    model, site, x = mlp()
    small = apply(model, Plan.collapse([site]), x)
    assert [type(m).__name__ for m in small] == ["Identity", "Identity", "Identity", "Linear"]
    weight = model[3].weight @ model[0].weight
    assert torch.allclose(small[3].weight, weight, rtol=1e-12, atol=1e-14)


def test_the_argument_is_untouched():
    model, site, x = mlp()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    apply(model, Plan.collapse([site]), x)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert edits(model) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_result_has_the_mode_of_the_argument_and_the_random_state_is_untouched(training):
    model, site, x = mlp()
    model.train(training)
    state = torch.get_rng_state()
    small = apply(model, Plan.collapse([site]), x)
    assert all(m.training == training for m in small.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_both_layers_of_a_vgg_head_collapse_to_one_in_either_order(order):
    model, sites, x = vgg_head()
    plan = Plan(tuple(Entry.collapse(sites[i]) for i in order))
    small = apply(model, plan, x)
    assert small[5].weight.shape == (10, 30)
    assert params(small) == 310 == params(model) - plan.params_saved


def test_the_collapsed_head_of_vgg16_has_the_published_size():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    x = torch.randn(2, 25088, device="meta")
    middle = linear("2", 4096, 4096)
    first = Site("first", "head", 4096, linear("0", 25088, 4096), (middle,), Place("1"))
    second = Site("second", "head", 4096, middle, (linear("4", 4096, 10),), Place("3"))
    small = apply(model, Plan.collapse([first, second]), x)
    assert params(small) == 25088 * 10 + 10
    assert small[4].weight.is_meta


def test_few_linear_channels_become_a_bottleneck():
    model, site, x = mlp()
    fates = torch.full((20,), int(Fate.DROP))
    fates[:2] = Fate.LINEAR
    entry = Entry(site, fates, torch.ones(20), torch.zeros(20))
    small = apply(model, Plan((entry,)), x)
    assert small[0].weight.shape == (2, 6)
    assert small[3].weight.shape == (5, 2)
    assert form_of(entry).kind == "pair"


def test_a_narrower_site_has_the_very_same_numbers_in_stock_modules():
    model, site, x = mlp(torch.float32)
    kept = torch.tensor([1, 4, 7])
    small = apply(model, Plan((Entry.narrow(site, kept),)), x)
    assert [type(m) for m in small] == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert torch.equal(small[0].weight, model[0].weight[kept])
    assert torch.equal(small[3].weight, model[3].weight[:, kept])


def test_all_channels_dropped_leaves_a_constant():
    model, site, x = mlp()
    plan = Plan((Entry.narrow(site, torch.tensor([], dtype=torch.int64), torch.ones(20, dtype=torch.float64)),))
    y = apply(model, plan, x).eval()(x)
    assert torch.allclose(y, y[:1].expand_as(y))
    assert torch.allclose(y[0], model[3](torch.ones(20, dtype=torch.float64)))


def test_a_fitted_full_map_takes_the_consumers_place():
    model, site, x = mlp()
    fit = Fit((), (torch.arange(5.0),), ups=(torch.randn(5, 6, dtype=torch.float64),))
    plan = Plan((Entry(site, torch.full((20,), 1), torch.ones(20), torch.zeros(20), fit=fit),))
    small = apply(model, plan, x)
    assert torch.equal(small[3].weight, fit.ups[0])
    assert torch.equal(small[3].bias, fit.biases[0].double())


def test_a_fitted_pair_becomes_two_layers_of_its_rank():
    model, site, x = mlp()
    fit = Fit((), (torch.zeros(5),), torch.randn(2, 6), (torch.randn(5, 2),))
    small = apply(model, Plan((Entry(site, torch.full((20,), 1), torch.ones(20), torch.zeros(20), fit=fit),)), x)
    assert (small[0].out_features, small[3].in_features) == (2, 2)


def test_kept_channels_beside_a_linear_path_of_least_rank():
    model, site, x = mlp()
    fates = torch.ones(20, dtype=torch.int8)
    fates[:3] = Fate.KEEP
    small = apply(model, Plan((Entry(site, fates, torch.ones(20), torch.zeros(20)),)), x)
    assert (small[1].kept, small[1].linear) == (3, 5)  # 17 channels, 6 inputs, 5 outputs
    assert small[0].out_features == small[3].in_features == 8


@pytest.mark.parametrize("model", [Gated(4, 12, nn.SiLU(), False), Packed(4, 12, nn.SiLU(), False, True)])
def test_a_collapsed_gated_site_is_one_linear_layer_without_a_bias(model):
    x = torch.randn(2, 3, 4)
    small = apply(model, Plan.collapse(find_sites(model, x)), x)
    assert params(small) == 16


def test_gradients_stay_frozen_where_they_were():
    model, site, x = mlp()
    model[3].requires_grad_(False)
    small = apply(model, Plan((Entry.narrow(site, torch.arange(9)),)), x)
    assert [p.requires_grad for p in small.parameters()] == [True, True, False, False]


def test_channels_last_weights_stay_channels_last():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 9, 9)
    site = find_sites(model, x)[0]
    small = apply(model, Plan((Entry.narrow(site, torch.arange(5)),)), x)
    assert small[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_subclass_with_a_forward_of_its_own_becomes_the_stock_class():
    class Loud(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    class Quiet(nn.Linear):
        pass

    model, site, x = mlp()
    model[0], model[3] = Loud(6, 20).double(), Quiet(20, 5).double()
    small = apply(model, Plan((Entry.narrow(site, torch.arange(9)),)), x)
    assert (type(small[0]), type(small[3])) == (nn.Linear, Quiet)


def test_an_activation_place_becomes_an_identity():
    model, _, x = mlp()
    place = Site("place", "activation", 0, None, (), Place("1"), "gelu")
    small = apply(model, Plan.collapse([place]), x)
    assert torch.equal(small.eval()(x), model[3](model[0](x)))


def test_a_second_plan_goes_on_from_the_first():
    model, sites, x = vgg_head()
    once = apply(model, Plan((Entry.narrow(sites[0], torch.arange(12)),)), x)
    again = apply(once, Plan.collapse(find_sites(once, x)), x)
    assert params(again) == 310
    assert len(edits(again)) > len(edits(once)) > 0


def test_a_model_that_computes_something_else_is_caught():
    class Doubling(nn.Sequential):
        def forward(self, x):
            z = self[1](self[0](x))
            return self[3](z + z.sin())

    model, site, x = mlp()
    with pytest.raises(SurgeryError, match=r"mlp \(head, 20 channels\).*differs from the simulated one by"):
        apply(Doubling(*model), Plan.collapse([site]), x)


def test_a_second_reader_of_a_changed_layer_is_caught():
    class Reading(nn.Sequential):
        def forward(self, x):
            h = self[0](x)
            return self[3](self[1](h)) + h.sum()

    model, site, x = mlp()
    with pytest.raises(SurgeryError, match="the output of the model"):
        apply(Reading(*model), Plan.collapse([site]), x)


def test_a_network_that_amplifies_rounding_is_not_refused():
    model, site, x = mlp(torch.float32)
    amplified = nn.Sequential(*model, *[nn.LayerNorm(5, eps=0.0, elementwise_affine=False)])
    with torch.no_grad():
        amplified[3].weight.mul_(1e-4)
        amplified[3].bias.fill_(1.0)
    small, simulated = apply(amplified, Plan.collapse([site]), x), simulate(amplified, Plan.collapse([site]))
    assert not torch.allclose(small.eval()(x), simulated.eval()(x), rtol=1e-5)


def test_numbers_that_a_narrow_type_cannot_hold_are_refused():
    model, site, x = mlp(torch.float16)
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[3].weight.fill_(300.0)
    with pytest.raises(SurgeryError, match=r"torch.float16 cannot hold"):
        apply(model, Plan.collapse([site]), x * 0)


def test_a_plan_for_another_width_is_refused():
    _, site, x = mlp()
    other = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(0.5), nn.Linear(24, 5)).double()
    with pytest.raises(PlanError, match=r"made for output width 20 at `0`.*has 24. Is this the model"):
        apply(other, Plan.collapse([site]), x)


def test_a_plan_for_another_model_is_refused():
    _, site, x = mlp()
    with pytest.raises(PlanError, match="has no module `1`"):
        apply(nn.Sequential(nn.Linear(6, 20)), Plan.collapse([site]), x)


def test_a_collapse_that_does_not_pay_is_done_with_a_warning():
    model = nn.Sequential(nn.Linear(8, 3, bias=False), nn.ReLU(), nn.Linear(3, 8))
    x = torch.randn(4, 8)
    with pytest.warns(CostWarning, match="not smaller"):
        plan = Plan.collapse(find_sites(model, x))
    with pytest.warns(CostWarning):
        apply(model, plan, x)


def test_a_constant_before_a_padded_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)).eval()
    nn.init.normal_(model[2].bias)
    x = torch.randn(1, 3, 8, 8)
    site = find_sites(model, x)[0]
    with pytest.raises(PlanError, match="wrong along the border"):
        apply(model, Plan((Entry.narrow(site, torch.arange(3)),)), x)


# ---------------------------------------------------------------------------------------------------- language models


def test_generating_with_and_without_a_cache_agrees_after_surgery():
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=40)).eval()
    ids = {"input_ids": torch.arange(10).reshape(2, 5)}
    small = apply(model, Plan.collapse(find_sites(model, ids)), ids)
    prompt = torch.tensor([[3, 1, 4]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **options)
    assert torch.equal(
        cached, small.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options)
    )


# ------------------------------------------------------------------------------------ through poolings and reshapes


class LeNet(nn.Module):
    """Two convolutions with poolings behind them, and three linear layers over the flattened image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.classifier = nn.Sequential(nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_lenet_is_narrowed_with_its_dropped_channels_as_constants(dtype):
    model, x = LeNet().to(dtype).eval(), torch.randn(2, 1, 16, 16, dtype=dtype)
    sites = find_sites(model, x)
    constants = torch.linspace(-1, 1, 12, dtype=torch.float64)
    plan = Plan(tuple(Entry.narrow(s, torch.arange(s.width)[::2], constants[: s.width]) for s in sites))
    small = apply(model, plan, x)
    assert small.features[0].weight.shape == (2, 1, 5, 5)
    assert small.classifier[0].weight.shape == (6, 27)
    if dtype == torch.float64:
        assert_equal_outputs(small, simulate(model, plan), torch.randn_like(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_convolution_merges_with_the_linear_layer_over_its_pixels(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).to(dtype)
    x = torch.randn(3, 2, 6, 6, dtype=dtype)
    plan = Plan.collapse(find_sites(model, x))
    small = apply(model, plan, x)
    assert small[3].weight.shape == (5, 72)
    assert params(small) == params(model) - plan.params_saved
    if dtype == torch.float64:
        assert_equal_outputs(small, simulate(model, plan), torch.randn_like(x))


def test_a_chain_that_ends_in_a_flattened_image_becomes_one_linear_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 9), nn.ReLU(),
        nn.Linear(9, 2),
    ).double()  # fmt: skip
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    plan = Plan(tuple(Entry.collapse(site, becomes="merged") for site in find_sites(model, x)))
    small = apply(model, plan, x)
    assert [tuple(p.shape) for p in small.parameters()] == [(2, 64), (2,)]
    assert_equal_outputs(small, simulate(model, plan), torch.randn_like(x))


def test_a_linear_path_beside_a_pooling_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3))
    (site,) = find_sites(model, torch.randn(1, 1, 16, 16))
    with pytest.raises(PlanError, match=r"the pooling .* stands between"):
        Entry.collapse(site)


def test_a_linear_channel_with_slope_zero_is_an_exact_constant_in_front_of_zero_padding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    (site,) = find_sites(model, x)
    fates = torch.tensor([Fate.KEEP, Fate.KEEP, Fate.DROP, Fate.DROP])
    constants = torch.tensor([0, 0, 0, 0.7], dtype=torch.float64)
    with pytest.raises(PlanError, match="linear with slope 0"):
        Entry(site, fates, torch.ones(4), constants)
    fates[3] = Fate.LINEAR
    plan = Plan((Entry(site, fates, torch.tensor([1.0, 1.0, 1.0, 0.0]), constants),))
    small = apply(model, plan, x)
    assert small[0].out_channels == 3
    expected = model[2].weight[:, :2], torch.relu(model[0](x))[:, :2], torch.full((2, 1, 6, 6), 0.7).double()
    by_hand = torch.nn.functional.conv2d(expected[1], expected[0], model[2].bias, padding=1)
    by_hand = by_hand + torch.nn.functional.conv2d(expected[2], model[2].weight[:, 3:], padding=1)
    assert torch.allclose(small(x), by_hand)

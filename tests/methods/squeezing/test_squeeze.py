"""Squeezing small trained and untrained networks, from sites to the smaller model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from benchmarks.__main__ import execute
from shallower.calibrating.recalibration import recalibrate
from shallower.errors import CheckpointError, FitError, MethodError, SiteError, TargetError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import squeeze, squeeze_family
from shallower.methods.squeezing.sweeping import CalibrationWarning, Sweep
from shallower.planning.forms import form_of
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply


class Mlp(nn.Module):
    """Residual blocks whose hidden channels are copies of few."""

    def __init__(self, d: int = 8, n: int = 24, different: int = 6, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList(nn.Linear(d, n) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(n, d) for _ in range(blocks))
        with torch.no_grad():
            for up in self.up:
                copies = torch.arange(n) % different
                up.weight.copy_(up.weight[copies])
                up.bias.copy_(up.bias[copies])

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


class ConvBlock(nn.Module):
    """Conv, BatchNorm, ReLU, Conv, BatchNorm, with a residual around them."""

    def __init__(self, channels: int = 4, hidden: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def rows_of(count: int = 8, rows: int = 64, d: int = 8) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, d) for _ in range(count)]


def error(small: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - dense(x)).norm() / (dense(x) - x).norm())


def share(model: nn.Module, plan: Plan) -> float:
    total = sum(p.numel() for p in model.parameters())
    return 1 - plan.params_saved / total


def test_channels_that_others_can_stand_for_are_found() -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    plan = squeeze(model, sites, rows_of(), target="params:35%", options=SqueezeOptions(collapse=False))
    small = apply(model, plan, rows_of()[0])
    assert share(model, plan) <= 0.35
    assert error(small, model, rows_of(1)[0]) < 1e-3


@pytest.mark.parametrize("target", ["params:70%", "macs:60%", "memory:70%", "params:1.5x"])
def test_targets_are_met_and_hardly_undercut(target: str) -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    plan = squeeze(model, sites, rows_of(), target=target, options=SqueezeOptions(collapse=False))
    left = 1 - plan.macs_saved / sites.macs if target.startswith("macs") else share(model, plan)
    limit = {"params:70%": 0.7, "macs:60%": 0.6, "memory:70%": 0.7, "params:1.5x": 1 / 1.5}[target]
    assert limit - 0.05 < left <= limit


def test_strided_convolutions_are_squeezed_where_collapse_is_allowed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1)
    ).eval()
    batches = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    plan = squeeze(model, find_sites(model, batches[0]), batches, "macs:70%")
    assert plan.macs_saved > 0
    assert apply(model, plan, batches[0])(batches[0]).shape == (8, 4, 4, 4)


def test_a_memory_target_counts_what_batchnorms_hold() -> None:
    torch.manual_seed(0)
    model = ConvBlock(hidden=16).eval()
    batches = [torch.randn(16, 4, 6, 6) for _ in range(4)]

    def held(network: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])

    plan = squeeze(model, find_sites(model, batches[0]), batches, "memory:70%", uniform=True)
    share_left = held(apply(model, plan, batches[0])) / held(model)
    assert 0.6 < share_left <= 0.7


def test_uniform_widths_are_equal_and_rounded() -> None:
    model = Mlp(n=32)
    sites = find_sites(model, rows_of()[0])
    plan = squeeze(model, sites, rows_of(), target="params:60%", uniform=True, options=SqueezeOptions(round_to=8))
    assert {len(entry.kept) for entry in plan.entries} == {16}


def test_sites_that_matter_less_keep_less() -> None:
    model = Mlp(different=24)
    with torch.no_grad():
        model.down[1].weight.mul_(0.01)
    sites = find_sites(model, rows_of()[0])
    plan = squeeze(model, sites, rows_of(), target="params:60%", options=SqueezeOptions(collapse=False))
    kept = {entry.site.name: len(entry.kept) for entry in plan.entries}
    assert kept.get(sites[0].name, 24) > kept[sites[1].name]


def test_a_nearly_linear_site_collapses() -> None:
    model = Mlp(different=24)
    with torch.no_grad():
        for up in model.up:
            up.weight.mul_(0.02)
    sites = find_sites(model, rows_of()[0])
    plan = squeeze(model, sites, rows_of(), target="params:25%")
    small = apply(model, plan, rows_of()[0])
    assert [form_of(entry).kind for entry in plan.entries] == ["merged", "merged"]
    assert error(small, model, rows_of(1)[0]) < 0.01


def test_compensation_helps_later_sites() -> None:
    model = Mlp(different=24, blocks=4)
    sites = find_sites(model, rows_of()[0])
    errors = []
    for compensation in (0.0, 1.0):
        plan = squeeze(
            model, sites, rows_of(), "params:50%", uniform=True, options=SqueezeOptions(compensation=compensation)
        )
        errors.append(error(apply(model, plan, rows_of()[0]), model, torch.cat(rows_of())))
    assert errors[1] < errors[0]


def test_the_result_is_reproducible_and_the_model_untouched() -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    sites = find_sites(model, rows_of()[0])
    plans = [squeeze(model, sites, rows_of(), "params:60%") for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_convolutions_are_squeezed_through_their_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ConvBlock(), ConvBlock()).eval()
    with torch.no_grad():
        for block in model:
            copies = torch.arange(12) % 4
            block.conv1.weight.copy_(block.conv1.weight[copies])
    images = [torch.randn(8, 4, 8, 8) for _ in range(4)]
    sites = find_sites(model, images[0])
    plan = squeeze(model, sites, images, "params:40%", options=SqueezeOptions(collapse=False))
    small = apply(model, plan, images[0])
    assert error(small, model, images[0]) < 1e-2
    assert recalibrate(small, images) == 4


def test_a_gated_language_model_is_squeezed_without_new_biases() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 50, (4, 16))} for _ in range(4)]
    sites = find_sites(model, batches[0])
    plan = squeeze(model, sites, batches, "params:80%", uniform=True, options=SqueezeOptions(round_to=4))
    small = apply(model, plan, batches[0])
    assert small.config.intermediate_size == len(plan.entries[0].kept)
    assert small.model.layers[0].mlp.down_proj.bias is None
    assert small.state_dict().keys() == model.state_dict().keys()


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = [torch.randint(5, 50, (4, 8)) for _ in range(4)]
    ones = torch.ones(4, 8, dtype=torch.int64)
    bare = [{"input_ids": i, "attention_mask": ones} for i in ids]
    padded = [
        {
            "input_ids": torch.cat([i, torch.zeros(4, 3, dtype=torch.int64)], 1),
            "attention_mask": torch.cat([ones, torch.zeros(4, 3, dtype=torch.int64)], 1),
        }
        for i in ids
    ]
    sites = find_sites(model, bare[0])
    plans = [
        squeeze(model, sites, b, "params:80%", uniform=True, options=SqueezeOptions(sensitivity=False))
        for b in (bare, padded)
    ]
    for one, other in zip(plans[0].entries, plans[1].entries, strict=True):
        assert torch.equal(one.fates, other.fates)
        assert one.fit is not None
        assert other.fit is not None
        torch.testing.assert_close(one.fit.consumers[0], other.fit.consumers[0], rtol=1e-3, atol=1e-4)


def test_a_score_steers_how_much_goes() -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    x = rows_of(1)[0]
    plan = squeeze(model, sites, rows_of(), "drop:0.01", score=lambda m: -error(m, model, x))
    small = apply(model, plan, rows_of()[0])
    assert error(small, model, x) <= 0.01
    assert share(model, plan) < 0.6


def test_impossible_requests_are_errors_that_tell_what_to_do() -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    with pytest.raises(TargetError, match=r"would remain"):
        squeeze(model, sites, rows_of(), "params:1%")
    with pytest.raises(TargetError, match="no plan is cheaper"):
        squeeze(model, sites, rows_of(), "params:10M")
    with pytest.raises(TargetError, match="needs a model that returns its KV cache"):
        squeeze(model, sites, rows_of(), "kv:50%")
    with pytest.raises(TargetError, match="none of the 2 sites takes anything from it"):
        squeeze(model, dataclasses.replace(sites, kv=64), rows_of(), "kv:50%")
    with pytest.raises(MethodError, match="score="):
        squeeze(model, sites, rows_of(), "drop:1%")
    with pytest.raises(MethodError, match="compensation"):
        SqueezeOptions(compensation=2.0)
    with pytest.raises(TargetError, match=r"allows a score of 0\.99, and with 98\.4% of the parameters it is 0"):
        squeeze(model, sites, rows_of(), "drop:0.01", score=lambda m: float(m is model))
    with pytest.raises(SiteError, match="no site"):
        squeeze(model, sites.select(lambda _: False), rows_of(), "params:50%")


def test_unusable_data_are_errors() -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    with pytest.raises(FitError):
        squeeze(model, sites, [], "params:50%")
    with pytest.raises(FitError, match="few hundred samples"):
        squeeze(model, sites, [torch.randn(1, 8)], "params:50%")
    with pytest.raises(SiteError, match="one-shot"):
        squeeze(model, sites, iter(rows_of()), "params:50%")
    bad = [*rows_of(), torch.full((4, 8), torch.nan)]
    with pytest.raises(FitError, match=r"down.0|up.0|not finite"):
        squeeze(model, sites, bad, "params:50%")


def test_the_site_whose_activations_are_not_finite_is_named() -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    with torch.no_grad():
        model.up[1].bias[3] = torch.nan
    with pytest.raises(FitError, match=rf"{sites[1].name}.*not finite"):
        squeeze(model, sites, rows_of(), "params:50%", uniform=True)


def test_constant_channels_go_into_the_bias() -> None:
    model = Mlp(different=24)
    with torch.no_grad():
        for up in model.up:
            up.weight[::2] = 0
            up.bias[::2] = 2.0
    sites = find_sites(model, rows_of()[0])
    plan = squeeze(model, sites, rows_of(), "params:52%", uniform=True)
    assert error(apply(model, plan, rows_of()[0]), model, rows_of(1)[0]) < 1e-3
    assert all(bool((entry.kept % 2 == 1).all()) for entry in plan.entries)


@pytest.mark.parametrize("batch", [torch.randn(4, 9), {"y": torch.randn(4, 8)}, torch.randint(0, 5, (4, 8)), (1, 2, 3)])
def test_batches_of_the_wrong_form_are_an_error_that_shows_them(batch: object) -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    with pytest.raises(SiteError, match=r"cannot be called with the first calibration batch|a model is called with"):
        squeeze(model, sites, [batch, batch], "params:50%")


class Passes:
    """Counts forward passes of a model and of its copies, and interrupts after so many."""

    def __init__(self, model: nn.Module, most: int = 10**9) -> None:
        self.count = 0
        self.most = most
        model.register_forward_pre_hook(lambda *_: self.one())

    def __deepcopy__(self, _: object) -> Passes:
        return self

    def one(self) -> None:
        self.count += 1
        if self.count > self.most:
            raise KeyboardInterrupt


@pytest.mark.parametrize("uniform", [True, False])
def test_an_interrupted_squeezing_goes_on_with_the_same_result(tmp_path: Path, uniform: bool) -> None:
    models = [Mlp(blocks=3) for _ in range(3)]
    sites = find_sites(models[0], rows_of()[0])
    path = tmp_path / "squeeze"
    whole = Passes(models[0])
    plan = squeeze(models[0], sites, rows_of(), "params:60%", uniform=uniform)
    Passes(models[1], most=whole.count - 12)
    with pytest.raises(KeyboardInterrupt):
        squeeze(models[1], sites, rows_of(), "params:60%", uniform=uniform, checkpoint=path)
    rest = Passes(models[2])
    again = squeeze(models[2], sites, rows_of(), "params:60%", uniform=uniform, checkpoint=path)
    assert again.to_json() == plan.to_json()
    assert rest.count < whole.count


def test_the_checkpoint_of_another_squeezing_is_refused(tmp_path: Path) -> None:
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    path = tmp_path / "squeeze"
    squeeze(model, sites, rows_of(), "params:60%", uniform=True, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"compensation differ"):
        squeeze(
            model,
            sites,
            rows_of(),
            "params:60%",
            uniform=True,
            checkpoint=path,
            options=SqueezeOptions(compensation=0.5),
        )
    with pytest.raises(CheckpointError, match=r"data differ"):
        squeeze(model, sites, rows_of(9), "params:60%", uniform=True, checkpoint=path)
    with torch.no_grad():
        model.up[0].weight.mul_(2)
    with pytest.raises(CheckpointError, match=r"weights differ"):
        squeeze(model, sites, rows_of(), "params:60%", uniform=True, checkpoint=path)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_latency_is_met_by_fewer_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uniform: bool) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    model = Mlp(d=32, n=512, different=64)
    batches = rows_of(3, 256, 32)
    sites = find_sites(model, batches[0])
    plan = squeeze(
        model, sites, batches, "latency:60%", uniform=uniform, options=SqueezeOptions(round_to=32, sensitivity=False)
    )
    assert plan.macs_saved > 0.1 * sites.macs
    assert all(len(entry.kept) % 32 == 0 for entry in plan.entries)
    assert (tmp_path / "latencies.json").exists()


def test_impossible_latencies_are_errors_that_tell_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHALLOWER_CACHE", str(tmp_path))
    model = Mlp()
    sites = find_sites(model, rows_of()[0])
    with pytest.raises(TargetError, match=r"would remain|the fastest takes"):
        squeeze(model, sites, rows_of(), "latency:1%")
    with pytest.raises(TargetError, match="no plan is cheaper"):
        squeeze(model, sites, rows_of(), "latency:10s")


@pytest.mark.slow
def test_the_benchmark_beats_magnitude_on_a_real_language_model(data: Path, tmp_path: Path) -> None:
    table = execute("squeeze", data, True, tmp_path / "cache", tmp_path)
    lines = [line.split("|") for line in table.splitlines() if line.startswith("| stories260k")]
    perplexity = {cells[3].strip(): float(cells[4].split()[-1]) for cells in lines}
    assert perplexity["dense"] < perplexity["squeeze"] < 0.6 * perplexity["Torch-Pruning"]


def test_too_few_calibration_data_are_told_with_how_many_would_do() -> None:
    model = Mlp(different=96, n=96)
    sites = find_sites(model, rows_of()[0])
    with pytest.warns(CalibrationWarning, match=r"is fitted with 5\d numbers on 11 positions.* or more \(12 now"):
        squeeze(model, sites, rows_of(count=3, rows=4), "params:60%", uniform=True)


class Pooled(nn.Module):
    """Convolutions whose hidden channels are copies of few, read through a pooling and through their average."""

    def __init__(self, different: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 8, 1)
        self.conv3, self.head = nn.Conv2d(8, 32, 1), nn.Linear(32, 5)
        with torch.no_grad():
            for conv in (self.conv1, self.conv3):
                copies = torch.arange(conv.out_channels) % different
                conv.weight.copy_(conv.weight[copies])
                conv.bias.copy_(conv.bias[copies])  # type: ignore[index, union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2))
        x = torch.relu(self.conv3(x))
        out: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


def test_channels_that_are_read_through_a_pooling_are_squeezed() -> None:
    model = Pooled().eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(8)]
    sites = find_sites(model, batches[0])
    assert {"conv1", "conv3"} <= {site.producer.name for site in sites if site.producer is not None}
    widths = {"conv1": 8, "conv3": 8}
    chosen = [s for s in sites if s.producer is not None and s.producer.name in widths]
    plan, small = Sweep(model, chosen, Calibration(batches)).plan({s.name: 8 for s in chosen})
    found = apply(model, plan, batches[0])
    with torch.no_grad():
        torch.testing.assert_close(found(batches[0]), small(batches[0]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found(batches[0]), model(batches[0]), rtol=1e-2, atol=1e-2)


def test_a_family_has_a_plan_for_every_size_down_to_the_smallest() -> None:
    model = Mlp().eval()
    batches = rows_of()
    sites = find_sites(model, batches[0])
    family = squeeze_family(model, sites, batches, "params:50%", count=3)
    shares = [member.cost.params / family.before.params for member in family]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] <= 0.5 < shares[-2] <= 2 / 3
    for target, least in (("params:50%", 0.4), ("params:58%", 0.5), ("params:90%", 0.8)):
        plan = family.plan(model, target)
        small = apply(model, plan, batches[0])
        assert least < share(model, plan) <= float(target[7:-1]) / 100
        assert error(small, model, batches[0]) < 0.05
    with pytest.raises(TargetError, match="has to be measured"):
        squeeze_family(model, sites, batches, "drop:1%")
    with pytest.raises(MethodError, match="at least one member"):
        squeeze_family(model, sites, batches, "params:50%", count=0)

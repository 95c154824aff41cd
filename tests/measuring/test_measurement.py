"""What a model costs: counts that can be worked out by hand, and latencies that can be told apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shallower.errors import ModelError, ShallowerError
from shallower.measuring.cost import peak_memory
from shallower.measuring.measurement import compare, measure
from shallower.modules.attachment import attach, detach
from shallower.sites import Place
from tests.measuring.test_cost import network


def test_a_linear_network_costs_its_matrix_products():
    measured = measure(network(), torch.randn(2, 8), repeats=3, seconds=0)
    assert measured.params == 8 * 32 + 32 + 32 * 4 + 4
    assert measured.macs == 2 * (8 * 32 + 32 * 4)


def test_latency_has_a_median_and_a_spread_over_the_runs():
    measured = measure(network(), torch.randn(2, 8), repeats=5, seconds=0)
    assert measured.runs >= 5
    assert 0 < measured.latency < 1
    assert 0 <= measured.spread < 1


def test_the_conditions_of_a_measurement_are_named():
    measured = measure(network().bfloat16(), torch.randn(7, 8).bfloat16(), repeats=3, seconds=0)
    assert (measured.batch, measured.dtype, measured.threads) == (7, "bfloat16", torch.get_num_threads())
    assert measured.device.startswith("cpu")
    assert measured.torch_version == torch.__version__


def test_a_measurement_reads_as_one_line():
    text = str(measure(network(), torch.randn(2, 8), repeats=3, seconds=0))
    assert "\n" not in text
    for part in ("420 params", "768 MACs", "ms", "batch 2", "float32", "cpu"):
        assert part in text


def test_nothing_is_timed_on_the_meta_device():
    measured = measure(network().to("meta"), torch.randn(2, 8))
    assert math.isnan(measured.latency)
    assert measured.macs == 768
    assert "not timed" in str(measured)


def test_the_mode_of_every_module_is_put_back():
    model = network()
    model[1].eval()
    measure(model, torch.randn(2, 8), repeats=1, seconds=0)
    assert [module.training for module in model] == [True, False, True]


def test_a_dropout_is_measured_as_at_inference():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    assert (
        peak_memory(model.eval(), torch.ones(1, 8)) == measure(model.train(), torch.ones(1, 8), repeats=1).peak_memory
    )


def test_an_attached_model_is_measured_as_if_nothing_were_attached():
    model = network()
    attach(model, Place("1"), nn.Sequential(nn.Linear(32, 32), nn.GELU()))
    x = torch.randn(2, 8)
    attached = measure(model, x, repeats=1, seconds=0)
    assert (attached.params, attached.macs) == (420, 768)
    assert isinstance(model[1], nn.Sequential)
    detach(model)


@pytest.mark.slow
def test_a_compiled_model_is_counted_as_the_module_inside():
    model, x = network(), torch.randn(2, 8)
    compiled = measure(torch.compile(model, backend="eager"), x, repeats=2, seconds=0)
    eager = measure(model, x, repeats=2, seconds=0)
    assert (compiled.params, compiled.macs, compiled.peak_memory) == (eager.params, eager.macs, eager.peak_memory)
    assert compiled.latency > 0


def test_a_larger_network_compares_as_slower():
    models = {"small": network(16), "large": network(1 << 15)}
    timed = compare(models, torch.randn(64, 8), rounds=5)
    assert timed["small"].ratio == 1
    assert timed["large"].ratio > 2
    assert timed["large"].speedup == 1 / timed["large"].ratio
    assert timed["large"].rounds == 5


def test_a_comparison_reads_as_one_line():
    text = str(compare({"one": network()}, torch.randn(2, 8), rounds=2)["one"])
    assert "1.00x as fast" in text
    assert "\n" not in text


def test_a_model_on_the_meta_device_cannot_be_compared():
    with pytest.raises(ShallowerError, match="small: a model on the meta device"):
        compare({"small": network().to("meta")}, torch.randn(2, 8))


def test_measuring_without_a_run_is_an_error():
    with pytest.raises(ShallowerError, match="repeats and warmup are at least 1"):
        measure(network(), torch.randn(2, 8), repeats=0)


@pytest.mark.parametrize("inputs", [torch.ones(2, 99), (torch.ones(1, 8), torch.ones(1, 8)), {"no": torch.ones(1, 8)}])
def test_wrong_inputs_are_one_sentence(inputs):
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        measure(network(), inputs, repeats=1)
    with pytest.raises(ModelError, match="does not run on the example inputs"):
        compare({"a": network()}, inputs, rounds=1)


class Tires(nn.Module):
    """Runs as often as it is told, and not once more."""

    def __init__(self, passes):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.left = passes

    def forward(self, x):
        if not self.left:
            raise ValueError("tired")
        self.left -= 1
        return self.layer(x)


def test_an_error_of_a_later_pass_is_one_sentence():
    model = Tires(20)
    with pytest.raises(ModelError, match=r"Tires does not run on the example inputs.*tired"):
        measure(model, torch.randn(1, 8), repeats=30)
    with pytest.raises(ModelError, match=r"Tires does not run on the example inputs.*tired"):
        compare({"a": network(), "b": model}, torch.randn(1, 8), rounds=30)
    assert model.left == 20

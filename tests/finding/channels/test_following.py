"""What holds of following as a whole, whatever the rules say."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shallower.errors import SiteError
from shallower.finding.channels.following import RULES, Following, UnknownUseError, rule
from shallower.finding.channels.layout import is_open, runs
from shallower.recording.tracing import trace_forward
from tests.finding.channels.commuting import Usage


@pytest.fixture(autouse=True)
def temporary_rules():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def follow(net, *inputs):
    """A network, followed."""
    return Following(trace_forward(net, inputs))


def test_an_operation_without_a_rule_closes_what_it_reads_and_gives():
    del RULES["sin"]
    found = Usage("no rule", lambda x, y: torch.sin(x) + y, "x:2,6 y:6", "").check()
    assert "it is not known how `sin` in Holder moves channels" in (found.reasons["x1"], found.reasons["y0"])


def test_a_rule_that_gives_axes_of_another_size_is_not_believed():
    @rule("sin", replace=True)
    def wrong(f, call):
        return f.axes(call.inputs[0])[::-1]

    assert Usage("wrong", lambda x: torch.sin(x), "x:2,6", "").check().reasons["x1"]


def test_a_rule_says_why_it_does_not_know_a_use():
    @rule("sin", replace=True)
    def never(_f, _call):
        raise UnknownUseError("it is Monday")

    assert Usage("never", lambda x: torch.sin(x), "x:2,6", "").check().reasons == {
        "x0": "it is Monday",
        "x1": "it is Monday",
    }


def test_what_the_model_returns_stays():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))
    f = follow(net, torch.rand(2, 3))
    hidden, columns = (f.axes(f.trace.weights[net[i], "weight"])[axis] for i, axis in ((0, 0), (2, 1)))
    assert hidden is columns
    assert is_open(hidden)
    rows = f.axes(f.trace.weights[net[2], "weight"])[0]
    assert [run.closed for run in runs(rows)] == ["the model returns it"]


def test_what_the_model_is_given_stays():
    net = nn.Linear(3, 6)
    f = follow(net, torch.rand(2, 3))
    assert [run.closed for run in runs(f.axes(f.trace.weights[net, "weight"])[1])] == ["it has the size of an input"]


def test_sums_maps_and_marks_are_kept():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.norm, self.up, self.down = (
                nn.Linear(3, 6),
                nn.LayerNorm(6),
                nn.Linear(6, 8),
                nn.Linear(8, 6),
            )

        def forward(self, x):
            x = self.into(x)
            return (x + self.down(F.gelu(self.up(self.norm(x))))).sum(-1)

    net = Block()
    f = follow(net, torch.rand(2, 3))
    stream = f.axes(f.trace.weights[net.down, "weight"])[0]
    assert stream in [axis for call in f.sums for axis in f.axes(call.outputs[0])]
    assert [run.marks for run in runs(stream)] == [{"averaged"}]
    assert [call.name for _, call in f.written] == ["linear"] * 3
    assert [call.name for _, call in f.contracted] == ["linear"] * 3 + ["sum"]


def test_what_nobody_looks_at_runs_too_and_is_followed():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.pool, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.into(x)
            self.pool(x).tanh()
            return self.out(x)

    net = Pooled()
    f = follow(net, torch.rand(2, 3))
    read = [f.axes(f.trace.weights[layer, "weight"])[1] for layer in (net.pool, net.out)]
    assert read[0] is read[1]
    assert is_open(read[0])


def test_a_result_of_which_only_the_shape_is_used_closes_one_channel():
    def function(x, w):
        positions = F.linear(x, w)[:, 0]
        return F.linear(x, w) * torch.ones(positions.shape[0], 1)

    Usage("a shape", function, "x:2,3 w:6,3", "x0|x1 w1|w0").check()


@pytest.mark.parametrize("error", [AssertionError, IndexError, KeyError, TypeError, ValueError])
def test_a_rule_that_fails_is_no_rule(error):
    @rule("sin", replace=True)
    def failing(_f, _call):
        raise error

    assert Usage("failing", lambda x: torch.sin(x), "x:2,6", "").check().reasons["x1"].startswith("it is not known")


def test_a_product_of_two_results_marks_what_it_adds_up():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(3, 6), nn.Linear(3, 6)

        def forward(self, x):
            return self.q(x) @ self.k(x).T

    net = Attending()
    f = follow(net, torch.rand(2, 3))
    (run,) = runs(f.axes(f.trace.weights[net.q, "weight"])[0])
    assert run.marks == {"inner"}


def test_a_second_rule_of_an_operation_is_refused_unless_it_is_to_replace_the_first():
    first = RULES["sin"]
    with pytest.raises(SiteError, match="`sin` has a rule already"):
        rule("my_sine sin")
    assert RULES["sin"] is first
    assert "my_sine" not in RULES
    assert rule("sin", replace=True)(len) is len
    assert RULES["sin"] is len

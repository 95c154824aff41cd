"""Calls made modules of their own: same values, same names, and back again."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shallower.errors import SiteError
from shallower.finding.kinds import find_sites
from shallower.modules.rewriting import externalise, internalise, reason_not_rewritable
from shallower.sites import Place


class Network(nn.Module):
    """Functional calls, a module called twice, a mode, an optional argument on which it branches, one it passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.act = nn.ReLU()
        self.scale = Scale()

    def forward(self, x: Tensor, shift: Tensor | None = None, factor: float = 1.0) -> Tensor:
        x = F.relu(self.a(x))
        x = F.dropout(x, 0.5, self.training)
        x = self.act(self.b(x)) * x.size(-1)
        if shift is not None:
            x = x + shift
        x = self.act(torch.relu(x) - 1)
        return self.scale(self.c(0.5 * x * (1 + torch.tanh(x))), factor)  # type: ignore[no-any-return]


class Scale(nn.Module):
    def forward(self, x: Tensor, factor: float) -> Tensor:
        return x * factor


RELU, SECOND_RELU = Place("", (("relu", 0),)), Place("", (("relu", 1),))
ACT = Place("", (("self.act", 1),))
DROPOUT = Place("", (("dropout", 0),))
CHAIN = Place("", (("mul", 1), ("tanh", 0), ("add", 0), ("mul", 2)))
PLACES = [RELU, SECOND_RELU, ACT, DROPOUT, CHAIN]


def rows() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_model_computes_the_same_in_both_modes(place: Place) -> None:
    model, x = Network(), rows()
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(1)
        expected = model(x)
        externalise(model, place)
        torch.manual_seed(1)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_new_module_is_what_runs_at_the_place(place: Place) -> None:
    model, x = Network().train(), rows()
    name = externalise(model, place)
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))
    model(x)
    assert len(seen) == 1


def test_names_of_weights_class_and_signature_stay() -> None:
    model = Network()
    before, signature = list(model.state_dict()), inspect.signature(model.forward)
    for place in PLACES:
        externalise(model, place)
    assert list(model.state_dict()) == before
    assert type(model) is Network
    assert inspect.signature(model.forward) == signature


def test_names_are_the_same_every_time_and_doing_it_twice_changes_nothing() -> None:
    model = Network()
    names = [externalise(model, place) for place in PLACES]
    assert names == [externalise(model, place) for place in PLACES]
    assert names == [externalise(other, place) for other in [Network()] for place in reversed(PLACES)][::-1]
    assert names == ["relu_0", "relu_1", "act_call_1", "dropout_0", "mul_1"]


def test_a_place_that_is_a_module_already_is_itself() -> None:
    assert externalise(Network(), Place("act")) == "act"
    assert reason_not_rewritable(Network(), Place("act")) == ""


@given(order=st.permutations(PLACES), undone=st.sets(st.sampled_from(PLACES)))
@settings(max_examples=20)
def test_any_order_of_doing_and_undoing_leaves_the_same_function(order: list[Place], undone: set[Place]) -> None:
    model, x = Network().eval(), rows()
    expected = model(x)
    for place in order:
        externalise(model, place)
    for place in undone:
        internalise(model, place)
    assert torch.equal(model(x), expected)
    for place in order:
        internalise(model, place)
    assert torch.equal(model(x), expected)
    assert set(vars(model)) == set(vars(Network()))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in Network().named_modules()]


def test_a_deep_copy_is_independent() -> None:
    model, x = Network().eval(), rows()
    name = externalise(model, RELU)
    other = copy.deepcopy(model)
    expected = model(x)
    other.set_submodule(name, nn.Identity())
    assert torch.equal(model(x), expected)
    assert not torch.equal(other(x), expected)
    internalise(other, RELU)
    assert torch.equal(other(x), expected)


def test_what_stands_at_a_place_survives_another_place_being_externalised() -> None:
    model = Network().eval()
    model.set_submodule(externalise(model, RELU), nn.Identity())
    externalise(model, ACT)
    assert isinstance(model.get_submodule("relu_0"), nn.Identity)


def test_an_argument_that_is_only_passed_on_stays_an_argument() -> None:
    model, x = Network().eval(), rows()
    expected = model(x, factor=2.0)
    externalise(model, RELU)
    torch.testing.assert_close(model(x, factor=2.0), expected)


def test_an_argument_on_which_the_forward_branches_is_held_and_guarded() -> None:
    model, x = Network().eval(), rows()
    externalise(model, RELU)
    with pytest.raises(SiteError, match="default of shift"):
        model(x, shift=torch.ones(6))


def test_a_site_is_refused_where_the_model_was_called_with_such_an_argument() -> None:
    sites = find_sites(Network(), {"x": rows(), "shift": torch.ones(6)})
    reasons = [*sites.skipped.values(), *(site.not_linear for site in sites)]
    assert any("torch.fx does not see" in reason or "branches on" in reason for reason in reasons)


def test_gradients_reach_the_weights_through_the_new_module() -> None:
    model = Network()
    externalise(model, RELU)
    model(rows()).sum().backward()
    assert model.a.weight.grad is not None


def test_a_fused_encoder_layer_really_runs_what_stands_at_the_place() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = layer(x)
        place = Place("", (("relu", 0),))
        name = externalise(layer, place)
        torch.testing.assert_close(layer(x), expected)
        layer.set_submodule(name, nn.Identity())
        assert not torch.allclose(layer(x), expected)
        internalise(layer, place)
        assert torch.equal(layer(x), expected)
    assert layer.activation is F.relu
    assert layer.activation_relu_or_gelu == 1


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > 0 else x


class Remembers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return F.relu(x)


class Parametric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.slope)


class Packs(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return F.relu(xs[0])


@pytest.mark.parametrize(
    ("model", "place", "why"),
    [
        (Branches(), RELU, "cannot be traced"),
        (Remembers(), RELU, "sets attributes"),
        (Parametric(), Place("", (("prelu", 0),)), "more than one tensor|parameter"),
        (Network(), Place("", (("relu", 5),)), "does not make these calls"),
        (Network(), Place("", (("relu", 0), ("relu", 1))), "more than one tensor|read elsewhere"),
        (Network(), Place("nowhere", (("relu", 0),)), "no module 'nowhere'"),
        (Packs(), RELU, "Error|relu"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_rewritten_says_why_and_is_left_alone(model: nn.Module, place: Place, why: str) -> None:
    state = dict(vars(model))
    reason = reason_not_rewritable(model, place)
    if not reason:  # *args that are only indexed can be traced
        assert isinstance(model, Packs)
        return
    with pytest.raises(SiteError, match=why):
        externalise(model, place)
    assert vars(model) == state


class Counts(nn.Module):
    """Counts its calls and keeps a running mean, as a quantiser or a router does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.calls: Tensor
        self.mean: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = F.relu(self.fc(x))
        if self.training:
            self.mean.mul_(0.5).add_(h.detach().mean(0), alpha=0.5)
        return self.out(h - self.mean)


@pytest.mark.parametrize("training", [True, False])
def test_the_new_forward_writes_into_buffers_as_the_old_one_does(training: bool) -> None:
    torch.manual_seed(0)
    model, x = Counts().train(training), torch.randn(3, 4)
    other = copy.deepcopy(model)
    externalise(other, RELU)
    for _ in range(2):
        torch.testing.assert_close(other(x), model(x))
    assert other.calls == model.calls == 2
    torch.testing.assert_close(other.mean, model.mean)
    assert other.mean.any() == training
    saved = other.state_dict()
    other.load_state_dict({**saved, "calls": torch.tensor(7)})
    other(x)
    assert other.calls == 8


def test_several_places_of_nested_calls_do_not_overlap() -> None:
    model = Network()
    externalise(model, CHAIN)
    assert "already" in reason_not_rewritable(model, Place("", (("tanh", 0),)))


def test_a_model_output_of_transformers_stays_one() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}
    expected = model(**inputs)
    place = find_sites(model, inputs)["pre_classifier"].activation
    assert place is not None
    externalise(model, place)
    got = model(**inputs)
    assert type(got) is type(expected)
    assert torch.equal(got.logits, expected.logits)


def test_a_padded_encoder_runs_what_stands_at_the_place_and_goes_back() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    place = Place("layers.1", (("self.activation", 0),))
    seen: list[Tensor] = []
    externalise(encoder, place)
    encoder.layers[1].activation = nn.Identity()
    encoder.layers[1].activation.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        encoder(x, src_key_padding_mask=padding)
    assert [tensor.is_nested for tensor in seen] == [False]
    internalise(encoder, place)
    assert encoder.use_nested_tensor

"""What is attached can be taken away again, and then everything is the object it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.errors import MethodError, SiteError
from shallower.finding.kinds import find_sites
from shallower.modules.activations import SlopeActivation
from shallower.modules.attachment import attach, attached, attached_places, copied, detach, detached_copy, exposed
from shallower.modules.offloading import lent, weightless
from shallower.sites import Place


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.act = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


MODELS = {"modules": sequential, "functions": Functional, "one module called twice": Shared}
X = torch.randn(6, 4)


def attach_everywhere(model: nn.Module, slope: float = 1.0) -> list[Place]:
    places = [site.activation for site in find_sites(model, X) if site.activation is not None]
    for place in places:
        module = attach(model, place, SlopeActivation)
        with torch.no_grad():
            module.slope.fill_(slope)
    return places


@pytest.mark.parametrize("name", MODELS)
def test_what_is_attached_does_the_work(name: str) -> None:
    model = MODELS[name]()
    attach_everywhere(model, slope=1.0)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    expected = X
    for linear in linears:
        expected = linear(expected)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("name", MODELS)
def test_detaching_restores_every_module_and_the_forward(name: str) -> None:
    model = MODELS[name]()
    modules, attributes, expected = dict(model.named_modules()), set(vars(model)), model(X)
    attach_everywhere(model)
    detach(model)
    assert dict(model.named_modules()) == modules
    assert set(vars(model)) == attributes
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("name", MODELS)
def test_detached_copy_leaves_the_model_attached(name: str) -> None:
    model = MODELS[name]()
    expected = model(X)
    places = attach_everywhere(model)
    assert torch.equal(detached_copy(model)(X), expected)
    assert attached_places(model) == tuple(places)
    assert not torch.equal(model(X), expected)


@pytest.mark.parametrize("name", MODELS)
def test_deep_copy_of_an_attached_model_is_independent(name: str) -> None:
    model = MODELS[name]()
    expected = model(X)
    places = attach_everywhere(model, slope=0.5)
    duplicate = copy.deepcopy(model)
    attached(duplicate, places[0]).slope.data.fill_(1)
    assert attached(model, places[0]).slope.item() == 0.5
    detach(duplicate)
    assert torch.equal(duplicate(X), expected)
    assert attached_places(model) == tuple(places)


def test_copy_of_a_model_with_an_attached_part_is_detached() -> None:
    part = sequential()
    model = nn.Sequential(part, nn.Linear(2, 3))
    expected = model(X)
    attach_everywhere(part)
    assert torch.equal(detached_copy(model)(X), expected)


def test_detaching_one_place_leaves_the_others() -> None:
    model = Functional()
    first, second = attach_everywhere(model)
    detach(model, [first])
    assert attached_places(model) == (second,)
    torch.testing.assert_close(model(X), model.fc3(model.fc2(F.relu(model.fc1(X)))))


def test_attaching_twice_is_an_error_that_explains() -> None:
    model = sequential()
    attach(model, Place("1"), nn.Tanh())
    with pytest.raises(MethodError, match="1: a Tanh is attached here already; detach"):
        attach(model, Place("1"), nn.ReLU())


def test_place_that_does_not_exist_is_an_error_that_names_it() -> None:
    with pytest.raises(SiteError, match="no module 'elsewhere'"):
        attach(sequential(), Place("elsewhere"), nn.Tanh())


def test_asking_for_what_is_not_attached_is_an_error() -> None:
    with pytest.raises(MethodError, match="nothing is attached"):
        attached(sequential(), Place("1"))


def test_attached_module_takes_the_mode_of_the_model() -> None:
    model = sequential().eval()
    assert not attach(model, Place("1"), nn.Dropout()).training
    model.train()
    detach(model)
    assert model[1].training


@pytest.mark.parametrize("name", MODELS)
def test_exposed_places_are_modules_for_a_while(name: str) -> None:
    model = MODELS[name]()
    modules = dict(model.named_modules())
    places = [site.activation for site in find_sites(model, X) if site.activation is not None]
    seen: list[Tensor] = []
    with exposed(model, places) as standing:
        for place in places:
            standing[place].register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
        model(X)
    assert len(seen) == 2
    assert dict(model.named_modules()) == modules


def test_exposing_shows_what_is_attached() -> None:
    model = Functional()
    places = attach_everywhere(model)
    with exposed(model, places) as standing:
        assert all(standing[place] is attached(model, place) for place in places)
    assert attached_places(model) == tuple(places)


def test_state_dict_has_the_slopes_while_attached_only() -> None:
    model = Functional()
    before = list(model.state_dict())
    attach_everywhere(model)
    assert len(model.state_dict()) == len(before) + 2
    detach(model)
    assert list(model.state_dict()) == before


class Keeps(nn.Module):
    """Leaves tensors with a history in attributes, as for auxiliary losses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.maps: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.fc(x)
        self.maps.append(self.features)
        self.by_name["x"] = self.features * 2
        return self.features


def test_tensors_that_a_forward_keeps_are_copied_without_their_history() -> None:
    model = Keeps()
    model(torch.ones(1, 2)).sum().backward()
    other = detached_copy(model)
    assert other.features is other.maps[0]
    assert other.features.grad_fn is None
    assert torch.equal(other.by_name["x"], model.by_name["x"])
    assert model.features.grad_fn is not None


def test_a_copy_keeps_what_is_attached_and_shares_or_leaves_out_what_it_is_told() -> None:
    model = sequential()
    places = attach_everywhere(model)
    lender = next(model.parameters())
    other = copied(model, {**weightless(model.parameters()), **lent([lender])})
    assert attached_places(other) == tuple(places)
    first, *rest = other.parameters()
    assert first.data_ptr() == lender.data_ptr()
    assert all(parameter.is_meta for parameter in rest)


def test_a_copy_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        other = detached_copy(nn.Linear(2, 2))
    other(torch.ones(1, 2)).sum().backward()
    assert other.weight.grad is not None


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_with_the_old_weight_norm_is_copied() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(2, 2)))
    model(torch.ones(1, 2))
    assert torch.equal(detached_copy(model)(torch.ones(1, 2)), model(torch.ones(1, 2)))

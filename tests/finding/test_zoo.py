"""Sites are found in every architecture of the zoo: all of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import nn

from shallower.core.inputs import call
from shallower.core.trees import to_device
from shallower.finding.kinds import find_sites
from shallower.modules.attachment import copied
from shallower.modules.offloading import weightless
from shallower.sites import Site, Sites
from tests.zoo import ZOO, Expected, Specimen


@dataclass(frozen=True)
class Found:
    """What was found in one specimen, and the model's state before and after.

    Attributes:
        sites: those of which more is known than where their channels stand.
        everything: all hidden sites.
    """

    specimen: Specimen
    model: nn.Module
    sites: Sites
    everything: Sites
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="module", params=ZOO, ids=lambda specimen: specimen.name)
def found(request: pytest.FixtureRequest) -> Found:
    specimen: Specimen = request.param
    model, inputs = specimen.build()
    model.train()  # sites are those of the model in eval mode, in whatever mode it is handed over
    before = state(model)
    sites = find_sites(model, inputs)
    return Found(specimen, model, described_only(sites), sites, before, state(model))


def described_only(sites: Sites) -> Sites:
    return sites.select(lambda site: not site.followed)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that finding sites must leave as it is."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "gradients": [parameter.grad for parameter in model.parameters()],
        "random": torch.get_rng_state(),
        "hooks": {name: hooks(module) for name, module in model.named_modules()},
        "global hooks": [
            len(getattr(torch.nn.modules.module, name))
            for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
        ],
    }


def hooks(module: nn.Module) -> list[int]:
    return [len(value) for name, value in sorted(vars(module).items()) if name.endswith("hooks")]


def described(site: Site) -> Expected:
    """A found site in the words in which expectations are written."""
    assert site.producer is not None
    return Expected(
        kind=site.kind,
        width=site.width,
        producer=site.producer.name,
        consumers=tuple(consumer.name for consumer in site.consumers),
        f=site.activation_name,
        gate=site.gate.name if site.gate else "",
        packed=site.packed,
        calls=site.calls,
        linear=not site.not_linear,
        norm_before=site.norm_before,
        norm_after=site.norm_after,
        narrow=not site.not_narrow,
        between=tuple(between.map.name for between in site.between),
        residual=str(site.residual.place) if site.residual else "",
    )


def same(expected: Expected, site: Expected) -> bool:
    """Whether a found site is the expected one; of the activation's name a part is expected."""
    return expected.f in site.f and {**vars(expected), "f": ""} == {**vars(site), "f": ""}


def test_every_expected_site_is_found(found: Found) -> None:
    there = [described(site) for site in found.sites]
    missing = [expected for expected in found.specimen.sites if not any(same(expected, site) for site in there)]
    assert not missing, "\n".join(["missing:", *map(str, missing), "found:", *map(str, there), str(found.sites)])


def test_nothing_else_is_found(found: Found) -> None:
    there = [described(site) for site in found.sites]
    false = [site for site in there if not any(same(expected, site) for expected in found.specimen.sites)]
    assert not false, "\n".join(["not expected:", *map(str, false), str(found.sites)])


def test_sites_come_in_order_of_execution_with_names_of_their_own(found: Found) -> None:
    names = [site.name for site in found.everything]
    assert len(set(names)) == len(names)
    assert not set(names) & set(found.sites.skipped)


def test_what_looks_like_a_site_is_skipped_for_the_right_reason(found: Found) -> None:
    for skip in found.specimen.skips:
        reasons = {name: reason for name, reason in found.sites.skipped.items() if skip.where in name}
        for site in found.everything.select(lambda site: site.followed):
            reasons |= {slot.module: site.not_linear for slot in site.slots if skip.where in slot.module}
        assert reasons, f"nothing at {skip.where} is skipped:\n{found.sites}"
        assert any(re.search(skip.why, reason, re.IGNORECASE) for reason in reasons.values()), reasons


def test_channels_come_first_exactly_where_convolutions_produce_them(found: Found) -> None:
    for site in found.sites:
        assert site.producer is not None
        assert site.channels_first == (site.producer.kind == "conv2d"), site.name


def test_costs_add_up_to_the_layers_weights(found: Found) -> None:
    for site in found.sites:
        modules = {m.name: found.model.get_submodule(m.name) for m in site.maps}
        for m in site.maps:
            assert m.params == sum(p.numel() for p in modules[m.name].parameters()), m.name
    assert found.sites.params == sum(p.numel() for p in found.model.parameters())
    assert found.sites.macs >= sum(m.macs for m in {m.name: m for site in found.sites for m in site.maps}.values())


def test_the_model_is_left_as_it_was(found: Found) -> None:
    torch.testing.assert_close(found.after["weights"], found.before["weights"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.after["random"], found.before["random"])
    for what in ("modules", "attributes", "training", "gradients", "hooks", "global hooks"):
        assert found.after[what] == found.before[what], what


def test_the_sites_are_printed_as_a_table(found: Found) -> None:
    table = str(found.everything)
    for site in found.everything:
        assert site.name in table
    for name, reason in found.sites.skipped.items():
        assert name in table
        assert reason in table


def test_the_same_sites_are_found_without_data(found: Found) -> None:
    model, inputs = found.specimen.build()
    # tied weights stay tied
    model, inputs = copied(model, weightless([*model.parameters(), *model.buffers()])), to_device(inputs, "meta")
    try:
        call(model, inputs)
    except RuntimeError as error:
        pytest.skip(f"the model itself reads its inputs' values: {error}")
    sites = find_sites(model, inputs)
    assert sites.ordered == found.everything.ordered
    assert set(sites.skipped) == set(found.sites.skipped)
    assert sites.macs == found.sites.macs


def test_activation_places_of_resnet18_are_listed_on_request() -> None:
    specimen = next(specimen for specimen in ZOO if specimen.name == "resnet18")
    model, inputs = specimen.build()
    sites = described_only(find_sites(model, inputs, kinds=("hidden", "activation")))
    places = [site for site in sites if site.kind == "activation"]
    assert len(sites) == 17
    assert len(places) == 9
    assert str(places[0].activation) == "relu"  # the stem's, whose output the pooling reads
    assert [place.norm_before for place in places] == ["bn1"] + [""] * 8  # a residual sum comes from no norm
    assert [str(place.activation) for place in places[1:3]] == ["layer1.0:self.relu#1", "layer1.1:self.relu#1"]


# Activations of an architecture as the papers on removing them count: EASIER and TLC, their tables.
COUNTS: list[tuple[str, Callable[[], nn.Module], int]] = [
    ("vgg16_bn", lambda: tv.vgg16_bn(), 15),
    ("mobilenet_v2", lambda: tv.mobilenet_v2(), 35),
    ("swin_t", lambda: tv.swin_t(), 12),
]


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: case[0])
def test_sites_and_places_together_are_the_activations_that_papers_count(case: Any) -> None:
    _, make, count = case
    with torch.device("meta"):
        model = make()
    sites = described_only(find_sites(model, torch.zeros(1, 3, 64, 64), kinds=("hidden", "activation")))
    assert len([site for site in sites if not site.between and not site.pooled]) == count
    assert len({site.activation for site in sites}) == count


def test_the_zoo_has_the_architectures_that_are_asked_for() -> None:
    names = [specimen.name for specimen in ZOO]
    assert len(set(names)) == len(names) >= 48

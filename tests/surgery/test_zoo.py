"""Surgery equals simulation on every architecture of the zoo, in float64."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from shallower.core.inputs import Inputs, call
from shallower.core.trees import tensors
from shallower.errors import PlanError
from shallower.finding.kinds import SiteKind, find_sites
from shallower.planning.entries import Entry, Fate
from shallower.planning.plan import Plan
from shallower.sites import Site, Sites
from shallower.surgery.applying import apply
from shallower.surgery.simulation import simulate
from tests.networks import params
from tests.zoo import ZOO, Specimen

# What is tested is exactness; the narrow sites of the zoo seldom pay.
pytestmark = pytest.mark.filterwarnings("ignore::shallower.planning.plan.CostWarning")

WITH_SITES = [specimen for specimen in ZOO if specimen.sites]


@dataclass(frozen=True)
class Patient:
    """A model in float64, its inputs, sites and outputs."""

    name: str
    model: nn.Module
    inputs: Inputs
    sites: Sites
    outputs: list[Tensor]

    def generator(self, purpose: str) -> torch.Generator:
        """A source of randomness of its own for each model and purpose."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.name} {purpose}".encode()))


@pytest.fixture(scope="module", params=WITH_SITES, ids=lambda specimen: specimen.name)
def patient(request: pytest.FixtureRequest) -> Patient:
    return admit(request.param)


def admit(specimen: Specimen, kinds: SiteKind = "hidden") -> Patient:
    model, inputs = specimen.build()
    model, inputs = model.double(), widened(inputs)
    sites = find_sites(model, inputs, kinds=kinds).select(lambda site: not site.followed)
    return Patient(specimen.name, model, inputs, sites, outputs(model, inputs))


def widened(inputs: Inputs) -> Inputs:
    """The inputs with their floating-point tensors in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    assert isinstance(inputs, dict)
    return {name: widened(value) for name, value in inputs.items()}


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors that a model gives."""
    return [tensor.clone() for tensor in tensors(call(model, inputs)) if tensor.is_floating_point()]


def check(patient: Patient, plan: Plan) -> None:
    """What holds for every plan: surgery equals simulation, it costs what the plan says, the argument is untouched."""
    small = apply(patient.model, plan, patient.inputs)
    simulated = outputs(simulate(patient.model, plan), patient.inputs)
    result = outputs(small, patient.inputs)
    assert len(result) == len(simulated) == len(patient.outputs)
    for got, wanted in zip(result, simulated, strict=True):
        error = (got - wanted).abs().max() / wanted.abs().max()
        assert error <= 1e-10, f"relative error {error:.1e} at the output:\n{plan}"
    assert params(patient.model) - params(small) == plan.params_saved, plan
    for got, wanted in zip(outputs(patient.model, patient.inputs), patient.outputs, strict=True):
        assert torch.equal(got, wanted)


def jointly_linear(sites: Iterable[Site]) -> list[Site]:
    """Sites that may be linear together. Only convolutions may exclude one another, by the kernels they would grow."""
    chosen: list[Site] = []
    for site in sites:
        if site.not_linear:
            continue
        try:
            Plan.collapse([*chosen, site])
        except PlanError:
            assert site.kind == "convolution", f"{site.name} cannot be collapsed together with {chosen}"
            continue
        chosen.append(site)
    return chosen


def narrowable(sites: Iterable[Site]) -> list[Site]:
    """Sites whose channels may be kept and dropped one by one."""
    return [site for site in sites if not site.not_narrow]


def random_offsets(model: nn.Module, site: Site, generator: torch.Generator) -> Tensor:
    """Random constants; before a zero-padded consumer those that it reads as zero."""
    if all(consumer.padding == (0, 0) for consumer in site.consumers):
        return torch.randn(site.width, generator=generator, dtype=torch.float64)
    if not site.norm_after:
        return torch.zeros(site.width, dtype=torch.float64)
    norm = model.get_submodule(site.norm_after)
    return (norm.running_mean - norm.bias / norm.weight * (norm.running_var + norm.eps).sqrt()).detach()


def random_entry(model: nn.Module, site: Site, generator: torch.Generator, fates: tuple[Fate, ...]) -> Entry:
    """Random fates with random slopes, offsets and, for kept channels, slopes of their activation."""
    if site.not_linear:
        fates = tuple(fate for fate in fates if fate is not Fate.LINEAR)
    if site.not_narrow:
        fates = (Fate.LINEAR, Fate.DROP)
    n = site.width
    chosen = torch.tensor(fates)[torch.randint(len(fates), (n,), generator=generator)]
    chosen[int(torch.randint(n, (), generator=generator))] = int(fates[0])
    alphas = torch.rand((1, n, 0)[int(torch.randint(3, (), generator=generator))], generator=generator).double()
    return Entry(
        site,
        fates=chosen.to(torch.int8),
        slopes=torch.randn(n, generator=generator, dtype=torch.float64),
        offsets=random_offsets(model, site, generator),
        alphas=alphas if len(alphas) and not site.between else None,
    )


def test_each_site_collapses_exactly(patient: Patient) -> None:
    for site in patient.sites:
        if not site.not_linear:
            check(patient, Plan.collapse([site]))


def test_all_sites_collapse_exactly_together(patient: Patient) -> None:
    check(patient, Plan.collapse(jointly_linear(patient.sites)))


def test_the_collapse_proves_itself_in_single_precision(patient: Patient) -> None:
    model, inputs = next(specimen for specimen in ZOO if specimen.name == patient.name).build()
    plan = Plan.collapse(jointly_linear(patient.sites))
    apply(model, plan, inputs)


def test_narrower_sites_are_found_again_with_the_channels_they_kept(patient: Patient) -> None:
    generator = patient.generator("again")
    sites = narrowable(patient.sites)
    entries = [random_entry(patient.model, s, generator, (Fate.KEEP, Fate.DROP)) for s in sites]
    entries = [dataclasses.replace(entry, alphas=None) for entry in entries]
    small = apply(patient.model, Plan(tuple(entries)), patient.inputs)
    again = find_sites(small, patient.inputs).select(lambda site: not site.followed)
    assert {s.name for s in again} == {s.name for s in patient.sites}
    assert {s.name: s.width for s in narrowable(again)} == {e.site.name: len(e.kept) for e in entries}
    assert again.macs == patient.sites.macs - Plan(tuple(entries)).macs_saved


def test_narrower_sites_are_exact(patient: Patient) -> None:
    generator = patient.generator("narrower")
    sites = narrowable(patient.sites)
    check(patient, Plan(tuple(random_entry(patient.model, s, generator, (Fate.KEEP, Fate.DROP)) for s in sites)))


def test_what_is_simulated_is_not_the_model_itself(patient: Patient) -> None:
    generator = patient.generator("narrower")
    sites = narrowable(patient.sites)
    if not sites:
        pytest.skip("no site of this model can be narrowed")
    plan = Plan(tuple(random_entry(patient.model, s, generator, (Fate.KEEP, Fate.DROP)) for s in sites))
    simulated = outputs(simulate(patient.model, plan), patient.inputs)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(simulated, patient.outputs, strict=True))


def test_any_mix_of_fates_is_exact(patient: Patient) -> None:
    generator = patient.generator("mix")
    linear = [site.name for site in jointly_linear(patient.sites)]
    fates = dict.fromkeys(linear, (Fate.KEEP, Fate.LINEAR, Fate.DROP))
    sites = [site for site in patient.sites if not site.between]
    entries = (random_entry(patient.model, s, generator, fates.get(s.name, (Fate.KEEP, Fate.DROP))) for s in sites)
    check(patient, Plan(tuple(entries)))


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet", "regnet_y", "mobilenet_v2"])
def test_activation_places_go_exactly(name: str) -> None:
    patient = admit(next(specimen for specimen in ZOO if specimen.name == name), kinds="activation")
    places = [site for site in patient.sites if site.kind == "activation"]
    assert places
    check(patient, Plan(tuple(Entry.collapse(place) for place in places)))


@pytest.mark.parametrize("specimen", [s for s in WITH_SITES if s.writes], ids=lambda specimen: specimen.name)
def test_squeezed_language_models_write_the_same_with_and_without_cache(specimen: Specimen) -> None:
    patient = admit(specimen)
    generator = patient.generator("write")
    plan = Plan(tuple(random_entry(patient.model, s, generator, tuple(Fate)) for s in patient.sites))
    small = apply(patient.model, plan, patient.inputs)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    assert isinstance(patient.inputs, dict)
    cached, uncached = (small.generate(**patient.inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)

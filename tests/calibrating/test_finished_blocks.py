"""Going on from finished blocks, against passes from the inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.collecting import collect_grams, one_site
from shallower.calibrating.finished_blocks import FinishedBlocks, course_of
from shallower.calibrating.walking import Walk
from shallower.core.inputs import call
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.coupled.readers import is_coupled
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.methods.squeezing.squeeze import narrowable
from shallower.methods.squeezing.sweeping import Sweep
from shallower.sites import Site
from tests.zoo import ZOO, Specimen

BY_NAME = {specimen.name: specimen for specimen in ZOO}


class Blocks(nn.Module):
    """Residual blocks in a list; `reach` is how many blocks back each of them reads besides."""

    def __init__(self, depth: int = 4, reach: int = 0, d: int = 6, n: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(d, n), nn.Tanh(), nn.Linear(n, d)) for _ in range(depth))
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for i, block in enumerate(self.blocks):
            x = block(x) + (seen[max(0, i - self.reach)] if self.reach else 0)
            seen.append(x)
        return x


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def sites_of(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model, batches()[0]) if not site.followed]


def walked(model: nn.Module) -> tuple[Walk, int]:
    """A walk along all sites of a model, and how many first layers of blocks ran on the way."""
    sites = sites_of(model)
    walk = Walk.along(model, None, sites, batches())
    ran = []
    first = [site.maps[0].name for site in sites]
    handles = [model.get_submodule(name).register_forward_hook(lambda *_: ran.append(1)) for name in first]
    for site in sites:
        collect_grams(model, None, [site], batches(), walk=walk)
    for handle in handles:
        handle.remove()
    return walk, len(ran)


WALKED = ["bert", "gpt2", "llama", "albert", "t5", "cifar_resnet", "vit", "densenet", "vgg11_bn"]


@pytest.mark.parametrize("name", WALKED)
def test_plans_are_those_of_passes_from_the_inputs(name: str) -> None:
    specimen: Specimen = BY_NAME[name]
    model, inputs = specimen.build()
    sites = narrowable(find_sites(model, inputs))
    widths = {site.name: max(1, site.width // 2) for site in sites}
    calibration = Calibration([inputs] * 3, SqueezeOptions(sensitivity=False))
    plans = [Sweep(model, sites, calibration, walking=walking).plan(widths)[0] for walking in (True, False)]
    for one, other in zip(plans[0].entries, plans[1].entries, strict=True):
        assert torch.equal(one.fates, other.fates)
        assert (one.fit is None) == (other.fit is None) == (is_coupled(one.site) and len(one.dropped) > 0)
        if one.fit is None or other.fit is None:
            continue  # what reads a coupled site's channels is fitted by entries of its own
        for a, b in zip(one.fit.consumers, other.fit.consumers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_each_block_runs_once() -> None:
    walk, ran = walked(Blocks(depth=5))
    assert walk.on
    assert ran == 5 * len(batches())


def test_a_model_that_reads_earlier_blocks_runs_from_its_inputs() -> None:
    model = Blocks(depth=4, reach=2)
    walk, _ = walked(model)
    assert not walk.on
    sites = sites_of(model)
    over = Walk.along(model, None, sites, batches())
    for site in sites:
        here = collect_grams(model, None, [site], batches(), walk=over)[site.name].all
        there = one_site(collect_grams(model, None, [site], batches()), site).all
        torch.testing.assert_close(here.centred().zz, there.centred().zz)


def test_a_block_that_works_in_place_harms_nothing() -> None:
    model = nn.Sequential(*[
        layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.ReLU(inplace=True))
    ])  # fmt: skip
    sites = sites_of(model)
    walk = Walk.along(model, None, sites, batches())
    for site in sites:
        for _ in range(2):
            here = one_site(collect_grams(model, None, [site], batches(), walk=walk), site).all
            there = one_site(collect_grams(model, None, [site], batches()), site).all
            torch.testing.assert_close(here.centred().zy, there.centred().zy)


def test_what_finds_no_room_is_run_from_the_inputs() -> None:
    model = Blocks()
    sites = sites_of(model)
    course = course_of(model, sites, lambda: model(batches()[0]))
    blocks = FinishedBlocks(model, course, most=batches()[0].nbytes)
    ran: list[int] = []
    handle = model.blocks[0].get_submodule("0").register_forward_hook(lambda *_: ran.append(1))
    for batch, x in enumerate(batches()):
        for block in ("blocks.0", "blocks.1"):
            with torch.no_grad(), blocks.resumed(batch, block):
                call(model, x)
    handle.remove()
    assert len(ran) == 2 * len(batches()) - 1


def test_the_model_is_left_as_it_was() -> None:
    model = Blocks()
    walked(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupted_pass_keeps_nothing_and_leaves_the_model_as_it_was() -> None:
    model = Blocks()
    blocks = FinishedBlocks(model, course_of(model, sites_of(model), lambda: model(batches()[0])))

    def interrupted() -> None:
        with blocks.resumed(0, "blocks.1"):
            model(batches()[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all("forward" not in vars(module) for module in model.modules())
    with torch.no_grad(), blocks.resumed(0, "blocks.1"):
        torch.testing.assert_close(model(batches()[0]), Blocks()(batches()[0]))

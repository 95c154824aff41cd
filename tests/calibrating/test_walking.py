"""When passes stop starting from finished blocks, and what is said about it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.collecting import collect_grams, one_site
from shallower.calibrating.walking import Walk
from shallower.errors import ForwardError, OutOfMemoryError
from shallower.finding.kinds import find_sites


class Blocks(nn.Module):
    """Blocks in a list, with a probe that each pass calls."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            self.probe(x)
        return x

    def probe(self, x: Tensor) -> None:
        """Nothing."""


class Careful(Blocks):
    """Refuses values that are not finite, which is what blocks that were passed over return."""

    def probe(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise ValueError("not finite")


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) for _ in range(2)]


def test_a_model_that_refuses_empty_blocks_is_run_from_the_inputs(caplog: pytest.LogCaptureFixture) -> None:
    model = Careful()
    sites = list(find_sites(model, batches()[0]))
    walk = Walk.along(model, None, sites, batches())
    with caplog.at_level(logging.WARNING):
        for site in sites:
            here = one_site(collect_grams(model, None, [site], batches(), walk=walk), site).all.centred()
            there = one_site(collect_grams(model, None, [site], batches()), site).all.centred()
            torch.testing.assert_close(here.zz, there.zz)
    assert not walk.on
    messages = [record.getMessage() for record in caplog.records if "from the inputs" in record.getMessage()]
    assert len(messages) == 1
    assert "not finite" in messages[0]


def test_the_users_own_error_comes_out() -> None:
    class Failing(Blocks):
        broken = False

        def probe(self, x: Tensor) -> None:  # noqa: ARG002
            if self.broken:
                raise KeyError("mine")

    model = Failing()
    sites = list(find_sites(model, batches()[0]))
    walk = Walk.along(model, None, sites, batches())
    model.broken = True
    with pytest.raises(ForwardError, match="mine"):
        collect_grams(model, None, [sites[1]], batches(), walk=walk)


def test_out_of_memory_comes_out_and_ends_nothing() -> None:
    class Large(Blocks):
        broken = False

        def probe(self, x: Tensor) -> None:  # noqa: ARG002
            if self.broken:
                raise torch.OutOfMemoryError("out of memory")

    model = Large()
    sites = list(find_sites(model, batches()[0]))
    walk = Walk.along(model, None, sites, batches())
    model.broken = True
    with pytest.raises(OutOfMemoryError):
        collect_grams(model, None, [sites[1]], batches(), walk=walk)
    assert walk.on


def test_a_process_without_batches_walks_nowhere() -> None:
    model = Blocks()
    walk = Walk.along(model, None, list(find_sites(model, batches()[0])), [])
    assert not walk.on

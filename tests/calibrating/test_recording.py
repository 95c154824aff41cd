"""What a recorder sees of a site in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shallower.calibrating.recording import Recorder
from shallower.core.modes import evaluating
from shallower.errors import Refusal
from shallower.finding.kinds import find_sites
from shallower.sites import Site


class Block(nn.Module):
    """A residual block whose layers are called by keyword, and a layer behind it; the block may be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.skip:
            x = x + self.down(input=torch.relu(self.up(input=x)))
        return self.last(x)


def block_and_site() -> tuple[Block, Site]:
    torch.manual_seed(0)
    model = Block()
    (site,) = find_sites(model, torch.randn(2, 4))
    return model, site


def test_what_maps_read_and_return_and_are_added_to_is_recorded() -> None:
    model, site = block_and_site()
    x = torch.randn(3, 4)
    with evaluating(model), Recorder(model, [site]) as recorder:
        recorder.run(x)
    z = torch.relu(model.up(x)).detach()
    torch.testing.assert_close(recorder.inputs["up"], [x])
    torch.testing.assert_close(recorder.inputs["down"], [z])
    torch.testing.assert_close(recorder.outputs["down"], [model.down(z).detach()])
    torch.testing.assert_close(recorder.others["down"], [x])
    assert recorder.calls(site) == 1
    assert len(recorder.tensors(site)) == len(recorder.samples(site)) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_pass_ends_after_the_site() -> None:
    model, site = block_and_site()
    ran: list[int] = []
    model.last.register_forward_hook(lambda *_: ran.append(1))
    with evaluating(model), Recorder(model, [site]) as recorder:
        recorder.run(torch.randn(3, 4))
    assert not ran


def test_goals_make_up_for_a_part_of_the_stream() -> None:
    model, site = block_and_site()
    x = torch.randn(3, 4)
    with evaluating(model), Recorder(model, [site]) as recorder:
        recorder.run(x)
        goals = recorder.goals(site, compensation=0.5)
    assert not isinstance(goals, Refusal)
    (goal,) = goals
    assert goal.streamed == (True,)
    torch.testing.assert_close(goal.y[0], recorder.outputs["down"][0] + 0.5 * x)
    torch.testing.assert_close(goal.units[0], torch.ones(4))


def test_a_site_that_is_skipped_has_no_calls() -> None:
    model, site = block_and_site()
    model.skip = True
    with evaluating(model), Recorder(model, [site]) as recorder:
        recorder.run(torch.randn(3, 4))
        assert recorder.calls(site) == 0
        assert recorder.goals(site, 0.0) == []


def test_consumers_that_do_not_run_alike_are_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            z = torch.relu(self.up(x))
            return self.a(z) + self.b(z) if self.both else self.a(z)

    model = Branches()
    (site,) = find_sites(model, torch.randn(2, 4))
    model.both = False
    with evaluating(model), Recorder(model, [site]) as recorder:
        recorder.run(torch.randn(3, 4))
        refusal = recorder.goals(site, 0.0)
    assert isinstance(refusal, Refusal)
    assert "`a` ran 1 times and `b` 0 times" in refusal.reason

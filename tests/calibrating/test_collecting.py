"""Gram matrices of sites, against activations kept whole."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.collecting import GramOptions, collect_goals, collect_grams, one_site
from shallower.calibrating.fisher import output_metrics
from shallower.calibrating.site_grams import SiteGrams
from shallower.errors import FitError, Refusal, SiteError
from shallower.finding.kinds import find_sites
from shallower.sites import Site
from tests.processes import in_two_processes


class Residual(nn.Module):
    """Two residual blocks, dropout between."""

    def __init__(self, d: int = 6, n: int = 10) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(d, n) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(n, d) for _ in range(2))
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self.dropout(down(torch.relu(up(x))))
        return x


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 5, 6) for _ in range(count)]


def test_what_the_consumers_read_and_give_is_seen() -> None:
    model = Residual()
    sites = find_sites(model, batches()[0])
    grams = collect_grams(model, None, list(sites), batches())
    x = torch.cat([b.reshape(-1, 6) for b in batches()])
    z = torch.relu(model.up[0](x)).detach().double()
    torch.testing.assert_close(grams[sites[0].name].all.centred(False).zz, z.T @ z / len(z), rtol=1e-5, atol=1e-5)
    assert grams[sites[0].name].held.count == 7


def test_padding_does_not_count() -> None:
    model = Residual()
    sites = find_sites(model, batches()[0])
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 4)
    padded = [{"x": b, "attention_mask": mask} for b in batches()]
    cut = [b[:, :3] for b in batches()]
    torch.testing.assert_close(
        collect_grams(model, None, [sites[0]], padded)[sites[0].name].all.centred(False).zz,
        collect_grams(model, None, [sites[0]], cut)[sites[0].name].all.centred(False).zz,
    )


def test_a_mask_that_fits_no_site_is_refused_unless_it_came_with_the_batch() -> None:
    model = Residual()
    sites = find_sites(model, batches()[0])
    wrong = torch.ones(4, 7)
    with pytest.raises(FitError, match="28 positions, and the layers of the sites have 20"):
        collect_grams(model, None, list(sites), batches(), mask_of=lambda _: wrong)
    with pytest.raises(FitError, match="28 positions, and the layers of the sites have 20"):
        output_metrics(model, ["down.0"], batches(), mask_of=lambda _: wrong)
    given = [{"x": b, "attention_mask": wrong} for b in batches()]
    assert len(collect_grams(model, None, list(sites), given)) == len(sites)


def test_a_mask_counts_where_positions_of_a_convolution_are_sampled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1))
    x = torch.randn(4, 1, 96, 96)
    (site,) = find_sites(model, x)
    halves = torch.zeros(4, 96, 96)
    halves[:2] = 1
    whole = collect_grams(model, None, [site], [x])[site.name]
    masked = collect_grams(model, None, [site], [x], mask_of=lambda _: halves)[site.name]
    assert whole.all.count < 4 * 96 * 96
    assert masked.all.count == pytest.approx(whole.all.count / 2, rel=0.01)


def test_compensation_makes_up_for_the_residual_stream() -> None:
    torch.manual_seed(0)
    dense, small = Residual(), Residual()
    small.load_state_dict(dense.state_dict())
    with torch.no_grad():
        small.down[0].weight.zero_()
    site = list(find_sites(dense, batches()[0]))[1]
    target = (
        collect_grams(dense, small, [site], batches(), GramOptions(compensation=1.0))[site.name].all.centred().mean_y
    )
    streams = []
    for model in (dense, small):
        x = torch.cat([b.reshape(-1, 6) for b in batches()])
        streams.append(x + model.down[0](torch.relu(model.up[0](x))))
    wanted = dense.down[1](torch.relu(dense.up[1](streams[0]))) + streams[0] - streams[1]
    torch.testing.assert_close(target, wanted.detach().double().mean(0), rtol=1e-4, atol=1e-4)


def test_passes_stop_after_the_last_site() -> None:
    model = Residual()
    sites = find_sites(model, batches()[0])
    ran: list[int] = []
    model.up[1].register_forward_hook(lambda *_: ran.append(1))
    collect_grams(model, None, [sites[0]], batches())
    assert not ran


def test_the_model_is_left_as_it_was() -> None:
    model = Residual().train()
    sites = find_sites(model, batches()[0])
    collect_grams(model, None, list(sites), batches(), GramOptions(inputs=True))
    output_metrics(model, ["down.0"], batches())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("given", [[], [torch.randn(1, 6)]])
def test_no_data_or_one_sample_is_refused(given: list[Tensor]) -> None:
    model = Residual()
    sites = find_sites(model, torch.randn(2, 6))
    with pytest.raises(FitError, match="few hundred samples"):
        collect_grams(model, None, list(sites), given)


def test_nan_names_the_site() -> None:
    model = Residual()
    sites = find_sites(model, batches()[0])
    bad = batches()
    bad[1][0, 0, 0] = torch.nan
    with pytest.raises(FitError, match=sites[0].name):
        collect_grams(model, None, list(sites), bad)


def test_a_one_shot_iterator_is_refused() -> None:
    model = Residual()
    with pytest.raises(SiteError, match="one-shot"):
        collect_grams(model, None, list(find_sites(model, batches()[0])), iter(batches()))


def test_goals_kept_from_one_pass_are_those_of_a_pass_for_each_site() -> None:
    torch.manual_seed(0)
    dense, small = Residual(), Residual()
    sites = find_sites(dense, batches()[0])
    goals = collect_goals(dense, list(sites), batches(), compensation=1.0)
    options = GramOptions(compensation=1.0, rows=True)
    for site in sites:
        there = collect_grams(dense, small, [site], batches(), options, goals=goals)[site.name]
        here = collect_grams(dense, small, [site], batches(), options)[site.name]
        torch.testing.assert_close(there.all.centred().zy, here.all.centred().zy)
        torch.testing.assert_close(there.rows[0][0].y, here.rows[0][0].y)


def test_goals_that_do_not_fit_into_memory_are_left_out() -> None:
    model = Residual()
    sites = list(find_sites(model, batches()[0]))
    one = 4 * sum(b.numel() for b in batches())
    assert [list(collect_goals(model, sites, batches(), most=most)[0]) for most in (0, one, 2 * one)] == [
        [sites[0].name],
        [sites[0].name],
        [site.name for site in sites],
    ]


def test_a_batch_norm_behind_the_consumer_says_what_a_unit_of_it_becomes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(self.conv2(torch.relu(self.conv1(x))))
            return x + y

    model = Block().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([2.0, 0.5, 0.0]))
    images = [torch.randn(4, 3, 5, 5) for _ in range(2)]
    (site,) = find_sites(model, images[0])
    units = collect_grams(model, None, [site], images)[site.name].units
    assert units is not None
    torch.testing.assert_close(units, torch.tensor([2.0, 0.5, 0.0]), atol=1e-4, rtol=1e-4)


def test_what_a_convolution_reads_is_padded_as_it_pads() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 2, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), conv)
    images = [torch.randn(8, 3, 9, 9) for _ in range(4)]
    (site,) = find_sites(model, images[0])
    moments = collect_grams(model, None, [site], images)[site.name].all.centred()
    weight = torch.linalg.solve(moments.zz + 1e-9 * torch.eye(len(moments.zz)), moments.zy).T
    torch.testing.assert_close(weight.float(), conv.weight.detach().flatten(1), atol=1e-3, rtol=1e-3)


class Routed(nn.Module):
    """Two experts: rows go to the second one where their first number is large; a skipped expert does not run."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.expert = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.skips = skips
        self.limit = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        chosen = x[:, 0] > self.limit
        if self.skips and not bool(chosen.any()):
            return x
        return x.index_put((chosen.nonzero()[:, 0],), self.expert(x[chosen]))


def routed(skips: bool, small_first: bool = False) -> tuple[Routed, list[Site], list[Tensor]]:
    model = Routed(skips)
    data = [torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    sites = list(find_sites(model, data[0]))
    empty = data[1].clone()
    empty[:, 0] = -50.0
    return model, sites, [data[0], empty, data[2]] if not small_first else data


@pytest.mark.parametrize("skips", [True, False])
def test_a_batch_without_rows_for_a_site_counts_for_nothing_there(skips: bool) -> None:
    model, sites, data = routed(skips)
    found = collect_grams(model, None, sites, data, GramOptions(inputs=True, rows=True))
    without = collect_grams(model, None, sites, [data[0], data[2]], GramOptions(inputs=True, rows=True))
    here, there = one_site(found, sites[1]), one_site(without, sites[1])
    assert here.all.count == there.all.count < 32
    torch.testing.assert_close(here.all.centred().zz, there.all.centred().zz)
    assert one_site(found, sites[0]).all.count == 48


@pytest.mark.parametrize("skips", [True, False])
def test_a_site_that_sees_no_rows_at_all_is_left_out_with_the_reason(skips: bool) -> None:
    model, sites, data = routed(skips)
    found = collect_grams(model, None, sites, [data[1], data[1]])
    assert isinstance(found[sites[0].name], SiteGrams)
    refusal = found[sites[1].name]
    assert isinstance(refusal, Refusal)
    assert "no calibration batch, or on no rows" in refusal.reason
    with pytest.raises(SiteError, match="Leave the site out"):
        one_site(found, sites[1])


def test_a_site_that_is_routed_otherwise_in_the_squeezed_network_is_refused_alone() -> None:
    dense, sites, data = routed(skips=False, small_first=True)
    small = copy.deepcopy(dense)
    small.limit = 0.5
    found = collect_grams(dense, small, sites, data)
    assert isinstance(found[sites[0].name], SiteGrams)
    refusal = found[sites[1].name]
    assert isinstance(refusal, Refusal)
    assert "other rows in the squeezed network" in refusal.reason


WORKER = """
import torch
import torch.distributed as dist
from shallower.calibrating.collecting import GramOptions, collect_grams, one_site
from shallower.calibrating.fisher import output_metrics
from shallower.errors import FitError, ForwardError
from tests.calibrating.test_collecting import routed

dist.init_process_group("gloo")
rank = dist.get_rank()
model, sites, data = routed(skips=True)
names = [m.name for site in sites for m in site.consumers]
options = GramOptions(inputs=True, joint=True)

# the second process sees no rows of the expert, and then no batches at all
for own in ([data[0], data[2]] if rank == 0 else [data[1]], data if rank == 0 else []):
    found = collect_grams(model, None, sites, own, options)
    metrics = output_metrics(model, names, own)
    parts = own if rank == 0 else None
    whole = [data[0], data[2], data[1]] if len(own) < 3 and rank == 0 else data
    for site in sites:
        grams = one_site(found, site)
        counts = [None] * 2
        dist.all_gather_object(counts, (grams.all.count, float(grams.joint[0].centred().zz.sum()), grams.units.sum()))
        assert counts[0] == counts[1], counts
    assert list(metrics) == names
    assert one_site(found, sites[0]).all.count == 48

# few rows in both processes stay rows
thin = collect_grams(model, None, sites[:1], [data[0][:2]], options)
assert one_site(thin, sites[0]).all.count == 4
assert one_site(thin, sites[0]).all.centred().rows is not None

# an error in one process is raised in both
for batch, error in ((torch.full((16, 4), torch.nan), FitError), (torch.randn(2, 9), ForwardError)):
    try:
        collect_grams(model, None, sites, [data[0], batch] if rank == 0 else [data[0]])
    except error:
        pass
    else:
        raise AssertionError(error)
"""


@pytest.mark.slow
def test_processes_with_other_batches_end_together(tmp_path: Path) -> None:
    in_two_processes(WORKER, tmp_path)

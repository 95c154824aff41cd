"""Gram matrices of sites, against activations kept whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.collecting import GramOptions, collect_goals, collect_grams
from shallower.calibrating.fisher import output_metrics
from shallower.calibrating.grams import Gram
from shallower.calibrating.patches import patches
from shallower.calibrating.residual_sums import ResidualSums
from shallower.errors import FitError, SiteError
from shallower.finding.matching import find_sites
from shallower.sites import LinearMap


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


def test_gram_matrices_add_up() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(50, 4), torch.randn(50, 3)
    parts, whole = Gram.of(z[:20], y[:20]) + Gram.of(z[20:], y[20:]), Gram.of(z, y)
    for name in ("mean_z", "mean_y", "zz", "zy", "yy"):
        torch.testing.assert_close(getattr(parts.centred(), name), getattr(whole.centred(), name))
    assert parts.count == 50


def test_centred_moments_are_covariances() -> None:
    torch.manual_seed(0)
    z = torch.randn(40, 4, dtype=torch.float64) + 100
    moments = Gram.of(z, z).centred()
    torch.testing.assert_close(moments.zz, z.T.cov(correction=0), rtol=1e-8, atol=1e-8)


def test_what_the_consumers_read_and_give_is_seen() -> None:
    model = Residual()
    sites = find_sites(model, batches()[0])
    grams = collect_grams(model, None, list(sites), batches())
    x = torch.cat([b.reshape(-1, 6) for b in batches()])
    z = torch.relu(model.up[0](x)).detach().double()
    torch.testing.assert_close(grams[sites[0].name].all.centred(False).zz, z.T @ z / len(z), rtol=1e-5, atol=1e-5)
    assert grams[sites[0].name].held.count == 15


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


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_patches_times_weight_is_the_convolution(kernel: int, stride: int, padding: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, kernel, stride, padding, bias=False)
    z = torch.randn(2, 3, 8, 8)
    out = conv(z)
    m = LinearMap("c", "conv2d", 3, 5, False, 1, (kernel, kernel), (stride, stride), (padding, padding))
    rows = patches(z, m) @ conv.weight.flatten(1).T
    torch.testing.assert_close(rows, out.movedim(1, -1).reshape(-1, 5), rtol=1e-5, atol=1e-5)


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


def test_the_residual_sum_is_found_through_scale_norm_and_transposition() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4).eval()
    norm.running_var.uniform_(0.5, 2)
    scale = nn.Parameter(torch.rand(3) + 0.5)
    y, r = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    with ResidualSums() as sums:
        sums.follow(y)
        out = r + norm(y.transpose(1, 2)) * scale
    change = torch.randn_like(r)
    back = torch.randn_like(y)
    with ResidualSums() as other:
        other.follow(back)
        _ = (r + change) + norm(back.transpose(1, 2)) * scale
    difference = other.others[0] - sums.others[0]
    moved = r + norm((y + difference).transpose(1, 2)) * scale
    torch.testing.assert_close(moved, out + change)


def test_an_output_that_is_normalised_first_has_no_residual_sum() -> None:
    y = torch.randn(2, 4)
    with ResidualSums() as sums:
        sums.follow(y)
        _ = torch.randn(2, 4) + nn.functional.layer_norm(y, (4,))
    assert sums.others == [None]


def test_metric_predicts_the_change_of_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.Linear(4, 3)).double()
    data = [torch.randn(2000, 6, dtype=torch.float64) for _ in range(4)]
    metric = output_metrics(model, ["0"], data)["0"].zz
    weight = model[2].weight.detach()
    torch.testing.assert_close(metric, weight.T @ weight, rtol=0.1, atol=0.05)


def test_metric_of_logits_is_the_fisher_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = [torch.randn(5000, 4, dtype=torch.float64)]
    metric = output_metrics(model, [""], data, logits=True)[""].zz
    p = model(data[0]).softmax(-1).detach()
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(metric, exact, rtol=0.1, atol=0.02)


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

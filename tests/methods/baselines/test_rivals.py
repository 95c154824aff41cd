"""Scores and fits: the numbers that the authors' code gives where it was run, else their formulas by brute force.

The authors' numbers: `OSSCAR_fastprune` of mazumder-lab/OSSCAR (0bd7887), `WrappedGPT` and `BiasGPT` with the metrics
of CASIA-IVA-Lab/FLAP (9bbad71), given what `samples` makes.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.grams import Gram
from shallower.errors import FitError
from shallower.finding.kinds import find_sites
from shallower.methods.baselines.rivals import RIVALS, at_random, elimination, flap, leverage, variance, wanda
from shallower.methods.baselines.view import View
from tests.finding.test_heads import llama
from tests.methods.baselines.samples import channels, view

OSSCAR = {8: [1, 2, 4, 5, 7, 8, 10, 11], 6: [2, 4, 5, 7, 8, 11], 3: [2, 4, 5]}
OSSCAR_WEIGHTS = [
    [-0.9585227770623017, 0.46405330401942796, 0.6780036501209269],
    [-0.1192609865574853, 0.26517043470713125, -0.6445074953319558],
    [0.24076127667723018, -0.37758762044322164, 0.8880485151477171],
    [0.2262682415114808, 0.823900769885597, -1.043258024082454],
    [-0.6761925710048597, -0.8259139981397761, 0.8060090732656071],
]
WANDA = [1.1362, 1.9435, 3.1481, 1.0967, 2.2746, 4.6907, 0.4311, 2.301, 2.166, 0.9212, 2.224, 2.2914]
FLAP = [-0.8678, -0.1973, 1.3894, -0.8434, 0.0633, 2.3247, -1.0868, 0.0102, 0.2195, -0.9187, -0.2472, 0.154]


@pytest.mark.parametrize("width", OSSCAR)
def test_elimination_keeps_what_the_authors_code_keeps(width: int) -> None:
    assert RIVALS["osscar"].entry(view(full=True), width).kept.tolist() == OSSCAR[width]


def test_elimination_refits_as_the_authors_code_does() -> None:
    fit = RIVALS["osscar"].entry(view(full=True), 3).fit
    assert fit is not None
    torch.testing.assert_close(fit.consumers[0], torch.tensor(OSSCAR_WEIGHTS).double(), rtol=1e-6, atol=1e-6)
    assert not fit.biases[0].any()


def test_elimination_first_removes_the_channel_without_which_the_refit_is_best() -> None:
    seen = view(full=True)
    h = seen.moments(intercept=False).zz.clone()
    h.diagonal().add_(1e-2 * h.diagonal().mean())

    def lost(gone: int) -> float:
        left = torch.tensor([j for j in range(12) if j != gone])
        weight = torch.zeros_like(seen.weight)
        weight[:, left] = torch.linalg.solve(h[left][:, left], h[left] @ seen.weight.T).T
        missing = seen.weight - weight
        return float(((missing @ h) * missing).sum())

    assert int(elimination(seen).argmin()) == min(range(12), key=lost)


def test_wanda_scores_are_proportional_to_those_of_the_authors_code() -> None:
    ratio = torch.tensor(WANDA).double() / wanda(view())
    torch.testing.assert_close(ratio, ratio[:1].expand(12), rtol=1e-3, atol=0)


def test_fluctuation_scores_are_those_of_the_authors_code_but_for_its_running_mean() -> None:
    found = flap(view())
    torch.testing.assert_close(found, torch.tensor(FLAP).double(), rtol=0, atol=0.05)
    assert found.argsort()[:6].sort().values.tolist() == torch.tensor(FLAP).argsort()[:6].sort().values.tolist()


def test_fluctuation_is_standardised_over_the_site() -> None:
    _, _, z = channels()
    seen = view()
    plain = z.var(0, unbiased=False) * seen.weight.square().sum(0)
    torch.testing.assert_close(flap(seen), (plain - plain.mean()) / plain.std())


def heads() -> tuple[View, Tensor]:
    """A site of heads, and what its output projection reads."""
    model, inputs = llama(4, 4)
    model = model.double()
    site = find_sites(model, inputs, kinds="heads")[0]
    torch.manual_seed(0)
    z = torch.randn(50, site.width * site.block, dtype=torch.float64) * torch.rand(site.width * site.block).double()
    return View(model, site, Gram.of(z[:, :0], z)), z


def test_heads_count_by_the_mean_of_the_standardised_squares_of_their_columns() -> None:
    seen, z = heads()
    squares = (z.var(0, unbiased=False) * seen.weight.square().sum(0)).square()
    standard = (squares - squares.mean()) / squares.std()
    expected = [float(part.mean()) for part in standard.chunk(seen.site.width)]
    assert flap(seen).tolist() == pytest.approx(expected)


def test_heads_count_by_the_sum_of_what_their_columns_count() -> None:
    seen, z = heads()
    each = z.square().mean(0).sqrt() * seen.weight.abs().sum(0)
    expected = [float(part.sum()) for part in each.chunk(seen.site.width)]
    assert wanda(seen).tolist() == pytest.approx(expected)


def test_heads_are_left_out_by_ways_without_a_rule_for_them() -> None:
    site = heads()[0].site
    refusing = {name for name, rival in RIVALS.items() if rival.refusal(site) is not None}
    assert refusing == {"vbp", "nystrom", "folding"}


def test_leverage_is_the_diagonal_of_the_ridged_projection() -> None:
    _, _, z = channels()
    h = z.T @ z / len(z)
    larger = h + 1e-2 * h.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(leverage(view(full=True)), (h @ torch.linalg.inv(larger)).diagonal())


def test_a_refit_is_the_best_there_is_from_the_channels_that_stay() -> None:
    _, _, z = channels()
    seen = view(full=True)
    entry = RIVALS["nystrom"].entry(seen, 5)
    assert entry.fit is not None
    wanted = z @ seen.weight.T
    best = torch.linalg.lstsq(z[:, entry.kept], wanted).solution.T
    torch.testing.assert_close(entry.fit.consumers[0], best, rtol=1e-3, atol=1e-4)


def test_variances_need_no_weights() -> None:
    _, _, z = channels()
    torch.testing.assert_close(variance(view()), z.var(0, unbiased=False))


def test_the_mean_of_what_goes_is_in_the_bias() -> None:
    _, _, z = channels()
    seen = view()
    entry = RIVALS["vbp"].entry(seen, 4)
    assert entry.fit is not None
    before, after = z @ seen.weight.T, z[:, entry.kept] @ entry.fit.consumers[0].T + entry.fit.biases[0]
    torch.testing.assert_close(after.mean(0), before.mean(0))
    assert torch.equal(entry.fit.consumers[0], seen.weight[:, entry.kept])


def test_chance_follows_the_seed_and_the_site() -> None:
    drawn = {tuple(at_random(view(seed=seed)).tolist()) for seed in (0, 0, 1, 2)}
    assert len(drawn) == 3
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    first, second = (at_random(View(model, site)) for site in find_sites(model, torch.ones(1, 4)))
    assert first.tolist() != second.tolist()


def test_scores_that_need_data_say_so() -> None:
    model, site, _ = channels()
    for score in (wanda, flap, variance, leverage, elimination):
        with pytest.raises(FitError, match="needs data"):
            score(View(model, site))


def test_magnitude_is_the_product_of_the_norms_of_rows_and_columns() -> None:
    model, site, _ = channels()
    rows, columns = model[0].weight.norm(dim=1), model[2].weight.norm(dim=0)  # type: ignore[index]
    kept = RIVALS["magnitude"].entry(View(model, site), 4).kept
    assert kept.tolist() == (rows * columns).topk(4).indices.sort().values.tolist()


def test_every_way_keeps_as_many_channels_as_it_is_asked_for() -> None:
    for (_, rival), width in itertools.product(RIVALS.items(), (1, 5, 11)):
        entry = rival.entry(view(full=rival.reads == "products"), width)
        assert len(entry.kept) == width

"""Followed sites cut out of networks: the result is the network with these channels at zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from shallower.finding.kinds import find_sites
from shallower.measuring.cost import cost_of
from shallower.modules.prepared.attention import DenseAttention
from shallower.planning.costs import cost_after
from shallower.sites import Site, Span
from shallower.surgery.cutting import edits_of_cut
from shallower.surgery.proof import proven
from tests.followed import Attending, Encoding, Excited, Grouped, Joined, Normed, Recurrent, Scales, Stages, drawn

CASES = [
    pytest.param(Excited, (2, 6, 5, 5), id="excited"),
    pytest.param(Stages, (2, 3, 8, 8), id="stages"),
    pytest.param(Joined, (2, 3, 6, 6), id="joined"),
    pytest.param(Grouped, (2, 3, 5, 5), id="grouped"),
    pytest.param(Attending, (2, 5, 8), id="attending"),
    pytest.param(Encoding, (2, 6, 5), id="encoding"),
    pytest.param(Scales, (2, 4, 5), id="scales"),
    pytest.param(Normed, (2, 3, 5), id="normed", marks=pytest.mark.filterwarnings("ignore:.*weight_norm")),
    pytest.param(
        Recurrent, (2, 5, 5), id="recurrent", marks=pytest.mark.filterwarnings("ignore:LSTM with projections")
    ),
]
cases = pytest.mark.parametrize(("make", "shape"), CASES)


def narrowed(site: Site, seed: int = 0) -> sh.Entry:
    """Half of a site's channels, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return sh.Entry.narrow(site, torch.randperm(site.width, generator=generator)[: (site.width + 1) // 2].sort().values)


def everything(model: nn.Module, x: Tensor) -> sh.Plan:
    """Half of every followed site and of every other that can be narrowed."""
    sites = find_sites(model, x, kinds=("hidden", "heads", "stream"))
    return sh.Plan(tuple(narrowed(site) for site in sites if site.bridge.not_narrow is None))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_everything_halved_at_once_is_exact(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model, x = drawn(make(), dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = everything(model, x)
    assert any(entry.site.followed for entry in plan.entries)
    small = sh.apply(model, plan, x)
    if dtype in (torch.float32, torch.float64):
        other = torch.cat((x, x + 1))
        torch.testing.assert_close(small(other), sh.simulate(model, plan)(other), rtol=1e-4, atol=1e-5)


@cases
def test_what_a_plan_promises_is_what_goes(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = drawn(make()), torch.randn(shape)
    plan = everything(model, x)
    before, after = cost_of(model, x), cost_of(sh.apply(model, plan, x), x)
    promised = cost_after(plan, before, model)
    assert (promised.params, promised.macs, promised.size) == (after.params, after.macs, after.size)


@cases
def test_the_result_is_saved_and_loaded_to_the_last_bit(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    model, x = drawn(make()), torch.randn(shape)
    small = sh.apply(model, everything(model, x), x)
    sh.save(small, tmp_path / "out")
    again = sh.load(tmp_path / "out", model=make())
    assert torch.equal(again.eval()(x), small(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_stays_of_a_normed_weight_is_what_it_was() -> None:
    model, x = drawn(Normed()), torch.randn(2, 3, 5)
    site = find_sites(model, x, kinds="all")["c.parametrizations.weight"]
    small = sh.apply(model, sh.Plan((sh.Entry.narrow(site, [0, 2, 5]),)), x)
    for each in (model, small):  # the hook computes the weight in a pass
        each(x)
    torch.testing.assert_close(small.c.weight, model.c.weight[[0, 2, 5]])
    torch.testing.assert_close(small.d.weight, model.d.weight[:, [0, 2, 5]])


def test_heads_and_the_stream_of_an_encoder_are_cut_independently() -> None:
    model, x = drawn(Encoding()), torch.randn(2, 6, 5)
    sites = find_sites(model, x, kinds="all")
    stream = next(site for site in sites if site.kind == "stream")
    heads = sites["encoder.layers.1.self_attn"]
    for chosen in ((stream,), (heads,), (stream, heads)):
        small = sh.apply(model, sh.Plan(tuple(map(narrowed, chosen))), x)
        attention, untouched = small.encoder.layers[1].self_attn, small.encoder.layers[0].self_attn
        assert isinstance(attention, DenseAttention)
        assert isinstance(untouched, DenseAttention) == (stream in chosen)
        assert attention.embed_dim == (6 if stream in chosen else 12)
        assert attention.num_heads == (2 if heads in chosen else 4)
        assert attention.in_proj_weight.shape == (9 * attention.num_heads, attention.embed_dim)


def test_the_width_of_a_whole_transformer_follows() -> None:
    class Translating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 12), nn.Linear(6, 12), nn.Linear(12, 3)
            self.transformer = nn.Transformer(12, 4, 1, 1, 10, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
            return self.head(self.transformer(self.a(x), self.b(y), tgt_mask=mask, tgt_is_causal=True))

    model, inputs = drawn(Translating()), (torch.randn(2, 6, 5), torch.randn(2, 4, 6))
    plan = sh.Plan(tuple(narrowed(site) for site in find_sites(model, inputs, kinds=("stream", "heads"))))
    small = sh.apply(model, plan, inputs)
    assert (small.transformer.d_model, small.transformer.decoder.layers[0].multihead_attn.num_heads) == (6, 2)
    longer = (torch.randn(3, 8, 5), torch.randn(3, 5, 6))
    torch.testing.assert_close(small(*longer), sh.simulate(model, plan)(*longer), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_was_cut_takes_padded_batches() -> None:
    layer = nn.TransformerEncoderLayer(12, 4, 10, batch_first=True)
    model = drawn(nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)))
    x, padding = torch.randn(2, 6, 12), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    heads = find_sites(model, x, kinds="all")["0.layers.0.self_attn"]
    plan = sh.Plan((narrowed(heads),))
    small, simulated = sh.apply(model, plan, x), sh.simulate(model, plan)
    expected = simulated[0](x, src_key_padding_mask=padding)
    with torch.no_grad():
        y = small[0](x, src_key_padding_mask=padding)
    torch.testing.assert_close(y, expected)


def test_a_plan_is_saved_and_applied_elsewhere(tmp_path: Path) -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    plan = everything(model, x)
    plan.save(tmp_path / "plan")
    again = sh.Plan.load(tmp_path / "plan")
    assert torch.equal(sh.apply(model, again, x)(x), sh.apply(model, plan, x)(x))


def test_a_second_round_starts_from_the_first() -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    once = sh.apply(model, everything(model, x), x)
    twice = sh.apply(once, everything(once, x), x)
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())


def test_squeezed_sites_first_then_their_stream() -> None:
    model, x = drawn(Stages()), torch.randn(8, 3, 8, 8)
    hidden = find_sites(model, x).usable(lambda site: site.bridge.not_refitted, "none")
    plan = sh.squeeze(model, hidden, [x], target="params:95%")
    small = sh.apply(model, plan, x)
    streams = find_sites(small, x, kinds="stream")
    smaller = sh.apply(small, sh.Plan(tuple(map(narrowed, streams))), x)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())


def test_tied_tensors_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x))

    model, x = drawn(Tied()), torch.randn(3, 4)
    site = find_sites(model, x, kinds="hidden")[0]
    small = sh.apply(model, sh.Plan((narrowed(site),)), x)
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (3, 4)
    assert (small.a.out_features, small.c.in_features) == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surgery_at_other_positions_is_refused(dtype: torch.dtype) -> None:
    model, x = drawn(Stages(), dtype), torch.randn(2, 3, 8, 8).to(dtype)
    site = find_sites(model, x, kinds="stream")[0]
    plan = sh.Plan((narrowed(site),))

    def shifted(step, model):  # type: ignore[no-untyped-def]
        cuts = list(step.form.cuts)
        axis, kept = cuts[0].kept[0]
        cuts[0] = replace(cuts[0], kept=((axis, (kept + 1) % cuts[0].before[axis]),))
        return edits_of_cut(model, step.entry, replace(step.form, cuts=tuple(cuts)))

    with pytest.raises(sh.SurgeryError):
        proven(model, plan.steps, x, shifted)
    proven(model, plan.steps, x)


def test_wrong_positions_in_a_site_are_refused() -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    site = find_sites(model, x, kinds="stream")[0]
    first = next(slot for slot in site.slots if slot.side == "columns")
    moved = replace(first, spans=(Span(1, 1, 0, 1),))
    # positions beyond the end of the axis, of a hostile plan
    wrong = replace(site, slots=tuple(moved if slot is first else slot for slot in site.slots))
    with pytest.raises(sh.PlanError, match="do not lie in"):
        sh.apply(model, sh.Plan((narrowed(wrong),)), x)


def test_entries_that_cut_the_same_axis_are_refused() -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    stream = find_sites(model, x, kinds="stream")["stem:stream"]
    hidden = find_sites(model, x).select(lambda site: site.bridge.not_narrow is None)
    clash = next((site for site in hidden if "stem" in [m.name for m in site.maps]), None)
    if clash is not None:
        with pytest.raises(sh.PlanError, match="already changed"):
            sh.Plan((narrowed(clash), narrowed(stream)))
    with pytest.raises(sh.PlanError, match="keeps at least one"):
        sh.Entry.narrow(stream, [])
    with pytest.raises(sh.PlanError, match="linear"):
        sh.Entry.collapse(stream)
    with pytest.raises(sh.PlanError, match="become zeros"):
        sh.Entry.narrow(stream, [0], constants=torch.ones(6))


def test_another_model_is_refused() -> None:
    model, x = drawn(Stages()), torch.randn(2, 3, 8, 8)
    stream = find_sites(model, x, kinds="stream")["stem:stream"]
    other = Stages()
    other.stem = nn.Conv2d(3, 7, 3, padding=1)
    with pytest.raises(sh.PlanError, match=r"stem\.weight"):
        sh.apply(other, sh.Plan((narrowed(stream),)), x)


def test_methods_leave_followed_sites_out_with_the_reason() -> None:
    model, x = drawn(Stages()), torch.randn(4, 3, 8, 8)
    sites = find_sites(model, x, kinds="all")
    assert any(site.followed for site in sites)
    plan = sh.squeeze(model, sites, [x], target="params:98%")
    assert not any(entry.site.followed for entry in plan.entries)
    for kind, options in ((sh.LayerCollapse, {"include": "*"}), (sh.StructuralDropout, {})):
        method = kind(model, sites, **options)
        assert not any(site.followed for site in method.sites)
        assert any(name in method.sites.skipped for name in ("stem:stream", "down:stream"))
        method.detach()

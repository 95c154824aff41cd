"""Published ways to take layers away, on the sites, data and surgery that `squeeze_depth` has.

    entries = DEPTH["shortgpt"](Given(model, sites, batches, savings))

None refits what stays but ReplaceMe, which has one linear map at the cut. What the papers measure as perplexity is the
divergence from the original here, so that no labels are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shallower.calibrating.collecting import collect_goals
from shallower.calibrating.patches import flat, flat_mask
from shallower.calibrating.recording import DenseOutputs
from shallower.calibrating.selection import factor, ridged
from shallower.core.batches import Batches
from shallower.core.inputs import call, model_device
from shallower.core.modes import evaluating
from shallower.core.trees import tensors
from shallower.core.watching import After, watching
from shallower.errors import FitError, Refusal, SiteError, TargetError
from shallower.methods.depth.choosing import Chooser
from shallower.methods.depth.emptying import inside
from shallower.methods.depth.judging import Judge
from shallower.methods.depth.saving import Layers, Savings
from shallower.methods.squeezing.calibration import Calibration
from shallower.methods.squeezing.options import SqueezeOptions
from shallower.planning.entries import Entry
from shallower.planning.fits import Fit
from shallower.sites import Site, Sites

_MAP_RIDGE = 1e-6
"""Of ReplaceMe's map, relative to the mean diagonal; the paper's is none, or absolute."""


@dataclass(frozen=True)
class Given:
    """What a way works with.

    Attributes:
        dense: the model as it is.
        sites: with branches, and for ReplaceMe the hidden sites.
        batches: that were read once.
        savings: says when it is enough.
    """

    dense: nn.Module
    sites: Sites
    batches: Batches
    savings: Savings | Layers

    @property
    def layers(self) -> list[Site]:
        """Whole layers, in order of execution.

        Raises:
            SiteError: there is none.
        """
        found = [site for site in self.sites if site.branch is not None and site.branch.layer]
        if not found:
            raise SiteError('there is no layer among the sites; find them with kinds=("hidden", "heads", "branch")')
        return found

    def greedy(self, candidates: Sequence[Site]) -> list[Entry]:
        """Those with the least divergence first, measured anew after each."""
        judge = Judge(self.dense, Calibration(self.batches, SqueezeOptions()))
        chooser = Chooser(self.dense, candidates, judge, self.savings)
        *_, last = chooser.removals()
        return [Entry.drop(site, note=chooser.note(last)) for site in last.sites]


def shortgpt(given: Given) -> list[Entry]:
    """Layers with the least 1 - cos(x, layer(x)) go, all ranked at once.

    Reference: Men, Xu, Zhang, Wang, Lin, Lu, Han and Chen, ShortGPT: Layers in large language models are more redundant
    than you expect, 2024 (arXiv 2403.03853), section 3.
    """
    layers = given.layers
    scores = cosine_distances(given, 1)
    order = sorted(range(len(layers)), key=scores.__getitem__)
    chosen: list[Site] = []
    for i in order:
        if given.savings.needed(chosen) <= 0:
            break
        chosen.append(layers[i])
    if given.savings.needed(chosen) > 0:
        raise TargetError(f"without all {len(chosen)} layers more would remain than the target asks for")
    return [Entry.drop(site, note="1 - cos of what it reads and gives") for site in chosen]


def sleb(given: Given) -> list[Entry]:
    """Whole layers, greedy by the model's output, measured anew after each.

    Reference: Song, Oh, Kim, Kim, Kim and Kim, SLEB: Streamlining LLMs through redundancy verification and elimination
    of transformer blocks, ICML 2024 (arXiv 2402.09025), algorithm 1.
    """
    return given.greedy(given.layers)


def blockpruner(given: Given) -> list[Entry]:
    """Attention and feed-forward branches, greedy by the model's output, measured anew after each.

    Reference: Zhong, Wan, Chen, Quan and Li, BlockPruner: Fine-grained pruning for large language models, 2024 (arXiv
    2406.10594), algorithm 1.
    """
    return given.greedy([site for site in given.sites if site.branch is not None and not site.branch.layer])


def replaceme(given: Given) -> list[Entry]:
    """Layers in a row with the least 1 - cos(x, y) of what the first reads and the last gives; a linear map at the cut.

    With M what the feed-forward part before the cut gives, Y what that is added to and L the stream behind the cut,
    T = argmin || M T + Y - L ||^2 goes into that part's last weight.

    Reference: Shopkhoev, Ali, Zhussip, Malykh, Lefkimmiatis, Komodakis and Zagoruyko, ReplaceMe: Network simplification
    via depth pruning and transformer block linearization, 2025 (arXiv 2505.02819), sections 2.1 and 2.2.
    """
    layers = given.layers
    hidden = [site for site in given.sites if site.branch is None and site.kind != "heads" and len(site.consumers) == 1]
    for count in range(1, len(layers)):
        far = cosine_distances(given, count)
        starts = sorted(range(len(far)), key=far.__getitem__)
        for start in starts:
            chosen = layers[start : start + count]
            before = [site for site in hidden if start and inside(site, [layers[start - 1]])]
            ends = [site for site in hidden if inside(site, chosen[-1:])]
            if given.savings.needed(chosen) <= 0 and before and ends:
                note = f"{count} in a row with the least 1 - cos"
                return [_mapped(given, before[-1], ends[-1]), *(Entry.drop(site, note=note) for site in chosen)]
    raise TargetError("no layers in a row, with a feed-forward part before them, meet the target")


def _mapped(given: Given, site: Site, end: Site) -> Entry:
    """All channels of a site kept, with a linear map behind its consumer."""
    batches, both = given.batches, [site, end]
    outputs = collect_goals(given.dense, both, batches)
    streams = collect_goals(given.dense, both, batches, compensation=1.0)
    d = site.consumers[0].d_out
    mm, mt = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for index, (out, stream) in enumerate(zip(outputs, streams, strict=True)):
        mask = flat_mask(batches[index].mask)
        m = _counted_rows(out[site.name], mask)
        wanted = _counted_rows(stream[end.name], mask) - (_counted_rows(stream[site.name], mask) - m)
        mm += m.T @ m
        mt += m.T @ wanted
    t = torch.cholesky_solve(mt, factor(ridged(mm, _MAP_RIDGE)))
    module = given.dense.get_submodule(site.consumers[0].name)
    weight = t.T @ module.weight.detach().cpu().double()  # type: ignore[operator]
    bias = torch.zeros(d, dtype=torch.float64)
    if module.bias is not None:
        bias = t.T @ module.bias.detach().cpu().double()  # type: ignore[operator]
    return Entry.narrow(site, range(site.width), fit=Fit((weight,), (bias,)), note="a linear map behind it")


def _counted_rows(calls: Sequence[DenseOutputs] | Refusal, mask: Tensor | None) -> Tensor:
    """What one consumer gave at the positions that count."""
    if isinstance(calls, Refusal) or len(calls) != 1:
        raise FitError(f"ReplaceMe needs a feed-forward part that runs once in a pass: {calls}")
    rows = flat(calls[0].y[0], False).double().cpu()
    if mask is not None and len(mask) == len(rows):
        return rows[mask.cpu()]
    return rows


def cosine_distances(given: Given, count: int) -> list[float]:
    """For each start of so many layers in a row, 1 - cos(what the first reads, what the last gives), added over rows.

    cosine_distances(given, 2)
    """
    names = [site.branch.layer for site in given.layers if site.branch is not None]
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def seen(name: str) -> After:
        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read[name], made[name] = next(tensors((args, kwargs))).detach(), next(tensors(output)).detach()

        return after

    starts = range(len(names) - count + 1)
    sums = [0.0] * len(starts)
    with evaluating(given.dense), watching(given.dense, after={name: seen(name) for name in names}):
        for batch in given.batches:
            here = batch.on(model_device(given.dense))
            call(given.dense, here.inputs)
            mask = flat_mask(here.mask)
            for start in starts:
                x, y = read[names[start]], made[names[start + count - 1]]
                if x.shape != y.shape:
                    sums[start] = math.inf
                    continue
                far = 1 - F.cosine_similarity(flat(x, x.dim() == 4), flat(y, x.dim() == 4), dim=-1)
                if mask is not None and len(mask) == len(far):
                    far = far[mask]
                sums[start] += float(far.mean()) * here.rows
    return sums


DEPTH: dict[str, Callable[[Given], list[Entry]]] = {
    "shortgpt": shortgpt,
    "sleb": sleb,
    "blockpruner": blockpruner,
    "replaceme": replaceme,
}
"""By name."""

"""The rivals: each is a score of channels, how channels are shared out over sites, and what the consumers become.

    RIVALS["flap"].score(View(model, site, gram))       # (n,), larger is better

z_j are the columns of a channel as the consumers read them, w_j the consumers' weights on them, H the second moments of
z. A head's columns are those of its features; where a consumer is a convolution, a channel has a column for each tap,
and sums over a channel's columns take the place of one number. Where the consumers can hold a bias, H is centred and a
refit moves the bias too, as it does in `squeeze`; in the papers of those that refit, biases stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shallower.calibrating.selection import eliminate, factor, ridged
from shallower.errors import Refusal
from shallower.methods.baselines.compensating import Compensation, mean_in_bias, refitted, unchanged
from shallower.methods.baselines.folding import folded, not_folded
from shallower.methods.baselines.view import View
from shallower.planning.entries import Entry
from shallower.sites import Site

Score = Callable[[View], Tensor]
"""(n,) float64: the channels with the largest stay."""

_OSSCAR_RIDGE = 1e-2
_LEVERAGE_RIDGE = 1e-2
_REFIT_RIDGE = 1e-6
"""Relative to the mean diagonal of H. The first is the default of OSSCAR's code; MoDeGPT's ridge is absolute, and its
refit a pseudo-inverse."""


@dataclass(frozen=True)
class Rival:
    """One published way.

        entry = RIVALS["flap"].entry(view, width=384)

    Attributes:
        entry: what becomes of a site that keeps so many channels.
        score: channels are shared out by one threshold on these over all sites; None where every site keeps the same
            share.
        reads: of what the consumers read: nothing, squares of columns, or products of all.
        biased: the consumers get a bias, where they have none.
        sequential: each site is seen in the network whose earlier sites are narrowed; else in the dense one.
        refusal: why a site is left as it is; None for a site that the way has a rule for.
    """

    entry: Callable[[View, int], Entry]
    score: Score | None = None
    reads: Literal["nothing", "squares", "products"] = "squares"
    biased: bool = False
    sequential: bool = False
    refusal: Callable[[Site], Refusal | None] = lambda _: None


def ranked(score: Score, compensation: Compensation) -> Callable[[View, int], Entry]:
    """Keep the channels with the largest scores."""

    def entry(view: View, width: int) -> Entry:
        kept = score(view).argsort(descending=True, stable=True)[:width].sort().values
        return Entry.narrow(view.site, kept, fit=compensation(view, kept))

    return entry


def no_heads(site: Site) -> Refusal | None:
    """Why a rule for hidden channels is not one for this site."""
    if site.kind == "heads":
        return Refusal("this way has no rule for attention heads")
    return None


def at_random(view: View) -> Tensor:
    """Drawn from the seed, for each site anew."""
    generator = torch.Generator().manual_seed(view.seed)
    generator.manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)) ^ hash_of(view.site.name))
    return torch.rand(view.site.width, dtype=torch.float64, generator=generator)


def hash_of(name: str) -> int:
    """The same number for a name in every process, below 2^62."""
    return int.from_bytes(name.encode(), "little") % ((1 << 61) - 1)


def magnitude(view: View) -> Tensor:
    """|p_j| |w_j|, with p_j the rows that make the channel.

    References: Li, Kadav, Durdanovic, Samet and Graf, Pruning filters for efficient ConvNets, ICLR 2017, section 3.1,
    for the rows; the product with the columns is what a rescaling of the channel leaves alone.
    """
    return view.magnitude


def energy(view: View) -> Tensor:
    """E[z_j^2].

    Reference: Molchanov, Tyree, Karras, Aila and Kautz, Pruning convolutional neural networks for resource efficient
    inference, ICLR 2017, section 2.2, "activation" (there the mean or the deviation of it).
    """
    return view.of_channels(view.energy)


def wanda(view: View) -> Tensor:
    """E[z_j^2]^(1/2) |w_j|_1, summed over the columns of a head.

    References: Sun, Liu, Bair and Kolter, A simple and effective pruning approach for large language models, ICLR 2024
    (arXiv 2306.11695), equation 1; structured as in An, Zhao, Yu, Tang and Wang, Fluctuation-based adaptive structured
    pruning for large language models, AAAI 2024 (arXiv 2312.11983), section 4.1, "Wanda-sp", and its code.
    """
    return view.of_channels(view.energy.sqrt() * view.weight.abs().sum(0))


def flap(view: View) -> Tensor:
    """var(z_j) |w_j|^2, standardised over the columns of the site; of heads its square, and the mean of the columns.

    Reference: An, Zhao, Yu, Tang and Wang, Fluctuation-based adaptive structured pruning for large language models,
    AAAI 2024 (arXiv 2312.11983), section 3.2, equations 4 to 7; the square for heads is in its code alone ("AL-AM").
    """
    found = view.variance * view.weight.square().sum(0)
    if view.site.kind == "heads":
        return _standardised(found.square()).view(view.site.width, -1).mean(1)
    return _standardised(view.of_channels(found))


def _standardised(values: Tensor) -> Tensor:
    """Of mean 0 and deviation 1."""
    return (values - values.mean()) / values.std().clamp_min(torch.finfo(torch.float64).tiny)


def variance(view: View) -> Tensor:
    """var(z_j), compared over all sites.

    Reference: Berisha, Mehnert and Condurache, Variance-based pruning for accelerating and compressing trained
    networks, ICCV 2025 (arXiv 2507.12988), section 3: statistics, selection, mean-shift compensation.
    """
    return view.of_channels(view.variance)


def leverage(view: View) -> Tensor:
    """The ridge leverage score [H (H + l I)^-1]_jj, of the channels with most of which the others can say least.

    Reference: Lin, Gao, Smith, Patel, Tuli, Shen, Jin and Hsu, MoDeGPT: Modular decomposition for large language model
    compression, ICLR 2025 (arXiv 2408.09632), section 3.2, algorithm 1 (type I, Nystrom). Its shares by the influence
    of blocks (section 3.3) are left out: every site keeps the same share.
    """
    h = view.moments(view.intercept).zz.cpu()
    # H (H + l I)^-1 = I - l (H + l I)^-1
    inverse = torch.cholesky_inverse(factor(ridged(h, _LEVERAGE_RIDGE)))
    scores = 1 - _LEVERAGE_RIDGE * h.diagonal().mean() * inverse.diagonal()
    return view.of_channels(scores)


def elimination(view: View) -> Tensor:
    """How late a channel goes when the one goes, again and again, without which the refitted output loses least.

    The error of removing channel j from the current fit W is tr(W_j ((H^-1)_jj)^-1 W_j^T), H with its ridge; the fit
    starts from the weights as they were.

    References: Meng, Ibrahim, Behdin, Hazimeh, Ponomareva and Mazumder, OSSCAR: One-shot structured pruning in vision
    and language models with combinatorial optimization, ICML 2024 (arXiv 2403.12983), section 3, one channel a step and
    without the local search; Kurtic, Frantar and Alistarh, ZipLM: Inference-aware structured pruning of language
    models, NeurIPS 2023 (arXiv 2302.04089), section 3.1, for the same step. Its search by runtime is left out.
    """
    h = ridged(view.moments(view.intercept).zz.cpu(), _OSSCAR_RIDGE)
    # the fit that this starts from, h^-1 h W^T, is W^T itself: hence a ridge of 0 beside the one that h has
    gone = eliminate(h, h @ view.weight.T, ridge=0.0, taps=view.site.columns_each).order
    scores = torch.full((view.site.width,), view.site.width, dtype=torch.float64)
    scores[gone] = torch.arange(len(gone), dtype=torch.float64)
    return scores


RIVALS = {
    "random": Rival(ranked(at_random, unchanged), reads="nothing"),
    "magnitude": Rival(ranked(magnitude, unchanged), reads="nothing"),
    "energy": Rival(ranked(energy, unchanged)),
    "wanda-sp": Rival(ranked(wanda, unchanged), sequential=True),
    "flap": Rival(ranked(flap, mean_in_bias), flap, biased=True),
    "vbp": Rival(ranked(variance, mean_in_bias), variance, biased=True, refusal=no_heads),
    "nystrom": Rival(ranked(leverage, refitted(_REFIT_RIDGE)), reads="products", refusal=no_heads),
    "osscar": Rival(
        ranked(elimination, refitted(_OSSCAR_RIDGE, towards_weights=True)), reads="products", sequential=True
    ),
    "folding": Rival(folded, reads="nothing", sequential=True, refusal=not_folded),
}
"""By name."""

"""How Structural Dropout draws its widths and what teaches them."""

from __future__ import annotations

from dataclasses import dataclass

from shallower.core.options import Options, option
from shallower.errors import MethodError


@dataclass(frozen=True)
class DropoutOptions(Options):
    """How the widths of a training step are drawn, and what the narrow ones learn from.

        options = sh.DropoutOptions(lower_bound="50%", passes=2)
        method = sh.StructuralDropout(model, sites, options)

    Attributes:
        p: probability with which a site is narrowed in a random pass; it has its full width otherwise.
        lower_bound: the smallest width, as a number of channels or as a share ("25%") of the site's.
        step: between widths, as a number of channels or as a share.
        shared: probability that all sites of a random pass keep the same share of their channels; each draws its own
            share otherwise.
        sandwich: the full and the smallest width in every step, and `passes` random ones between.
        passes: random passes of a step with the sandwich rule.
        distillation: part of the narrow passes' loss that is the divergence from the full width's output, 0 to 1;
            needs `sandwich`.
        rescale: multiply the contribution of k channels by (n / k) to this power: 1 is the paper's scale, which keeps
            the mean of channels that agree, 0.5 keeps the energy of channels that do not, 0 changes nothing.
        seed: of the widths.
        logits: whether the model's output is logits of classes in its last dimension. The Kullback-Leibler divergence
            teaches where it is, the mean squared difference relative to the output's variance where it is not. None:
            whether the model calls its output so.

    Raises:
        MethodError: a value is out of its range.
    """

    p: float = option(1.0, least=0, most=1)
    lower_bound: int | str = "25%"
    step: int | str = 1
    shared: float = option(0.5, least=0, most=1)
    sandwich: bool = True
    passes: int = option(1, least=0)
    distillation: float = option(0.5, least=0, most=1)
    rescale: float = option(0.5, least=0, most=1)
    seed: int = option(0, least=0, most=2**32 - 1)
    logits: bool | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.distillation and not self.sandwich:
            raise MethodError(
                "distillation: the full width can teach only where it runs in every step. Use sandwich=True, or "
                "distillation=0"
            )

    @classmethod
    def published(cls, *, p: float = 0.5, seed: int = 0) -> DropoutOptions:
        """The paper's rule: one width for each site and step, uniform over 1 .. n - 1 with probability p, scale n / k.

        Reference: Structural Dropout, arXiv 2205.06906, section 3.
        """
        return cls(
            p=p, lower_bound=1, step=1, shared=0.0, sandwich=False, distillation=0.0, rescale=1.0, seed=seed
        )  # fmt: skip

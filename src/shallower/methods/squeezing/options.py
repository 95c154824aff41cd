"""What can be chosen about squeezing, beyond what is squeezed and how far. PyTorch is not needed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shallower.core.options import Options, option


@dataclass(frozen=True)
class SqueezeOptions(Options):
    """Options of `squeeze`.

        options = sh.SqueezeOptions(round_to=8, linear_path=True)
        plan = sh.squeeze(model, sites, batches, target="macs:60%", options=options)

    Attributes:
        round_to: widths are multiples of this many channels.
        linear_path: where it pays, let a linear map from what a site reads to what it returns take the place of some
            kept channels, with the rank that leaves the least error at the same cost. Such a site becomes a
            `PartialActivation`, which no stock class loads; `sh.load` does. For linear layers and 1x1 convolutions.
        collapse: let a site become one linear map where that is the better buy; not with equal widths.
        producers: refit the kept rows of the producers too, where there are enough data: slower, and mostly better.
        sensitivity: weigh the outputs of a site by their influence on the model's output, from one backward pass over
            the batches. Without it, all outputs of a layer count alike.
        compensation: part of the error left in the residual stream by earlier sites that a site corrects, 0 to 1.
        mask_of: returns the (batch, positions) mask of a batch, 0 where a position is padding; by default a
            two-dimensional `attention_mask`.
        output_of: returns the tensor that matters of what the model returns; by default its logits, or else its first
            floating-point tensor.
        logits: whether that tensor holds logits, compared as distributions; by default, whether the model's output
            has that name.
        seed: of the random projections behind `sensitivity`.

    Raises:
        MethodError: a number is out of range, or a reader is not a function.
    """

    round_to: int = option(1, "Multiple that widths are rounded to.", least=1)
    linear_path: bool = option(False, "Allow a linear map beside the kept channels.")
    collapse: bool = option(True)
    producers: bool = option(True)
    sensitivity: bool = option(True)
    compensation: float = option(1.0, least=0, most=1)
    mask_of: Callable[[Any], Any] | None = option(None)
    output_of: Callable[[Any], Any] | None = option(None)
    logits: bool | None = option(None)
    seed: int = option(0, least=0, most=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mask_of", "output_of"):
            reader = getattr(self, name)
            if reader is not None and not callable(reader):
                raise self.error(f"{name}={reader!r:.40}: a function, or None")

    @property
    def path_multiple(self) -> int:
        """Rank of a linear path and the number of channels beside it are multiples of this; 0 without paths."""
        return self.round_to * self.linear_path

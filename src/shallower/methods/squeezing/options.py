"""What can be chosen about squeezing, beyond what is squeezed and how far."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shallower.calibrating.fisher import OutputOf, default_output_of
from shallower.core.inputs import MaskOf
from shallower.errors import MethodError


@dataclass(frozen=True)
class SqueezeOptions:
    """Options of `squeeze`.

        options = sh.SqueezeOptions(round_to=8, linear_path=True)
        plan = sh.squeeze(model, sites, batches, target="macs:60%", options=options)

    Attributes:
        round_to: widths are multiples of this many channels.
        linear_path: where it pays, let a linear map from what a site reads to what it gives take the place of some
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
        MethodError: a number is out of range.
    """

    round_to: int = 1
    linear_path: bool = False
    collapse: bool = True
    producers: bool = True
    sensitivity: bool = True
    compensation: float = 1.0
    mask_of: MaskOf | None = None
    output_of: OutputOf = default_output_of
    logits: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise MethodError(f"round_to must be a whole number of channels, at least 1, not {self.round_to!r:.40}")
        if not isinstance(self.compensation, (int, float)) or not math.isfinite(self.compensation):
            raise MethodError(f"compensation must be a number from 0 to 1, not {self.compensation!r:.40}")
        if not 0 <= self.compensation <= 1:
            raise MethodError(f"compensation must be a number from 0 to 1, not {self.compensation:g}")
        for name in ("mask_of", "output_of"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise MethodError(f"{name} must be a function, not {function!r:.40}")
        if self.output_of is None:
            raise MethodError("output_of must be a function from what the model returns to a tensor, not None")

    @property
    def path_multiple(self) -> int:
        """Rank of a linear path and the number of channels beside it are multiples of this; 0 without paths."""
        return self.round_to * self.linear_path

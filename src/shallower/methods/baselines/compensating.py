"""What the consumers become when channels go: as they were, with the mean in the bias, or refitted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shallower.calibrating.selection import factor, ridged
from shallower.methods.baselines.view import View
from shallower.planning.fits import Fit

Compensation = Callable[[View, Tensor], Fit | None]
"""Returns what the consumers of a site become when these channels (k,) stay; None where nothing is fitted."""


def unchanged(_view: View, _kept: Tensor) -> Fit | None:
    """The consumers stay as they were, and what is dropped becomes 0."""
    return None


def mean_in_bias(view: View, kept: Tensor) -> Fit:
    """What is dropped becomes its mean, which goes into the consumers' biases.

    Behind a convolution it is the mean over all positions, those along the padded border too, so that the mean of the
    output does not change.
    """
    columns = view.columns(kept)
    gone = torch.ones(len(view.mean), dtype=torch.bool)
    gone[columns] = False
    return view.fit(kept, view.weight[:, columns], view.bias + view.weight[:, gone] @ view.mean[gone])


def refitted(ridge: float, *, towards_weights: bool = False) -> Compensation:
    """Ridge least squares: W_S = (W H)_S (H_SS)^-1, with H the second moments of what the consumers read.

    Args:
        ridge: added to the diagonal of H, relative to its mean.
        towards_weights: shrink towards the weights as they were, and not towards 0.
    """

    def fit(view: View, kept: Tensor) -> Fit:
        columns = view.columns(kept)
        moments = view.moments(view.intercept)
        h = moments.zz.cpu()
        larger = ridged(h, ridge)
        if towards_weights:
            h = larger
        wanted = h[columns] @ view.weight.T
        weight = torch.cholesky_solve(wanted, factor(larger[columns][:, columns])).T
        mean = moments.mean_z.cpu()
        return view.fit(kept, weight, view.bias + view.weight @ mean - weight @ mean[columns])

    return fit

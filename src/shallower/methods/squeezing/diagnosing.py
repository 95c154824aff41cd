"""What keeps a model from being squeezed on some data: checked before, and found out after something failed.

check_model(model, sites)
check_call(model, inputs, "the first calibration batch", remedy)
raise explained(model, sites, calibration, error) or error
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from shallower.core.failures import is_out_of_memory, sentence
from shallower.core.inputs import Inputs, call, model_device
from shallower.core.modes import evaluating
from shallower.core.tensors import has_no_numbers
from shallower.core.trees import tensors, to_device
from shallower.core.watching import watching
from shallower.errors import FitError, ForwardError, OutOfMemoryError, ShallowerError, SiteError
from shallower.methods.base import check_sites
from shallower.methods.squeezing.calibration import Calibration
from shallower.sites import Site


def check_model(model: nn.Module, sites: Iterable[Site]) -> None:
    """Check that the model has weights, and the layers of the sites.

    Raises:
        SiteError: it has not.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if has_no_numbers(tensor):
            raise SiteError(f"`{name}` is on the meta device: calibration runs the model, so load its weights first")
    check_sites(model, sites, SiteError)


def check_call(model: nn.Module, inputs: Inputs, which: str, remedy: str) -> Any:
    """What the model returns for such inputs.

    Args:
        model: in any mode; left as it is.
        inputs: of one call.
        which: for people, what inputs these are.
        remedy: what to do where the model cannot be called with them.

    Raises:
        SiteError: it cannot.
    """
    try:
        with evaluating(model):
            return call(model, to_device(inputs, model_device(model)))
    except (ForwardError, SiteError) as error:
        cause = sentence(error.__cause__ or error)
        raise SiteError(f"the model cannot be called with {which} ({_shapes(inputs)}): {cause}. {remedy}") from error


def explained(
    model: nn.Module, sites: Iterable[Site], calibration: Calibration, error: Exception
) -> ShallowerError | None:
    """What was wrong with the data where squeezing failed with `error`; None where nothing is found.

    All batches run once more: the first that the model cannot read is named, or the first site whose layers read
    something that is not finite.
    """
    if is_out_of_memory(error):
        return OutOfMemoryError(f"squeezing: {sentence(error)}. Use smaller batches, or squeeze fewer sites at a time")
    if isinstance(error, ShallowerError) and not isinstance(error, (FitError, ForwardError)):
        return None
    found: list[str] = []
    hooks = {m.name: _finite_hook(site.name, found) for site in sites for m in site.consumers}
    with evaluating(model), watching(model, before=hooks):
        for number, batch in enumerate(calibration.batches, 1):
            try:
                call(model, batch.on(model_device(model)).inputs)
            except (ForwardError, SiteError) as failure:
                return SiteError(
                    f"the model cannot be called with batch {number} ({_shapes(batch.inputs)}): "
                    f"{sentence(failure.__cause__ or failure)}. All calibration batches must be like the example "
                    "inputs that the sites were found with"
                )
            if found:
                return FitError(
                    f"{found[0]}: what its consumers read is not finite on batch {number}; does the model overflow, or "
                    "does the batch hold NaN?"
                )
    return None


def _finite_hook(name: str, found: list[str]) -> Any:
    """A hook that notes the first site at which something is not finite."""

    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in tensors((args, kwargs)):
            if not found and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                found.append(name)

    return hook


def _shapes(inputs: object) -> str:
    """Types and shapes of the tensors in a batch."""
    shapes = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors(inputs)]
    return ", ".join(shapes) or "no tensors"

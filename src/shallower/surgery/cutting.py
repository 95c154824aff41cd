"""A followed site after surgery: its dropped channels are cut out of every tensor in which they stand."""

from __future__ import annotations

from torch import nn

from shallower.errors import PlanError
from shallower.modules.edits import Attribute, Edit, Resize, Sized, Weights
from shallower.modules.preparing import ready_for_cuts
from shallower.planning.entries import Entry
from shallower.planning.forms import Form
from shallower.planning.geometry import resized_map


def edits_of_cut(model: nn.Module, entry: Entry, form: Form) -> list[Edit]:
    """The edits that cut a site's dropped channels out of a model.

    Args:
        model: as the earlier steps left it; not changed.
        entry: the fates.
        form: what becomes of the tensors.

    Raises:
        PlanError: a tensor has another shape than the plan expects.
    """
    edits: list[Edit] = [*ready_for_cuts(model, (cut.tensor for cut in form.cuts))]
    for follower in entry.site.followers:
        module = model.get_submodule(follower.module)
        fewer = getattr(module, follower.attribute) - follower.each * len(entry.dropped)
        edits.append(Attribute(follower.module, follower.attribute, fewer))
    fitted = _fitted(entry)
    for cut in form.cuts:
        name, _, attribute = cut.tensor.rpartition(".")
        if cut.before == (0,):  # a bias that the fit adds
            continue
        tensor = getattr(model.get_submodule(name), attribute).detach()
        if tuple(tensor.shape) != cut.before:
            raise PlanError(
                f"{entry.site.name}: `{cut.tensor}` has shape {tuple(tensor.shape)}, and the earlier entries of the "
                f"plan leave it {cut.before}"
            )
        for axis, kept in cut.kept:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
        edits += [Sized(name, attribute, tuple(tensor.shape)), Weights(name, {attribute: tensor}, as_held=True)]
    for own in fitted.values():
        edits += own
    return edits


def _fitted(entry: Entry) -> dict[str, list[Edit]]:
    """The edits that give the layers which read the channels their fitted weights, by name."""
    site, fit = entry.site, entry.fit
    found: dict[str, list[Edit]] = {}
    if fit is None:
        return found
    for m, weight, bias in zip(site.consumers, fit.consumers, fit.biases, strict=True):
        has_bias = m.bias or bool(bias.ne(0).any())
        numbers = {"weight": weight}
        if has_bias:
            numbers["bias"] = bias
        found[m.name] = [Resize.to(resized_map(m, d_in=weight.shape[1], bias=has_bias)), Weights(m.name, numbers)]
    return found

"""A followed site after surgery: its dropped channels are cut out of every tensor in which they stand."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from shallower.errors import PlanError
from shallower.modules.edits import Edit, Resize, Sized, Weights
from shallower.modules.prepared.lists import Entries
from shallower.modules.prepared.weight_norms import weight_norms
from shallower.modules.shrinking import before_cut, fallen
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
    edits: list[Edit] = [*before_cut(model, (cut.tensor for cut in form.cuts if cut.kept))]
    edits += fallen(model, entry.site.followers, entry.site.width, len(entry.dropped))
    left: dict[str, Tensor] = {}
    for cut in form.cuts:
        if not cut.kept:  # a bias that the fit adds, or a list that loses entries
            continue
        tensor = _tensor(model, cut.tensor)
        if tuple(tensor.shape) != cut.before:
            raise PlanError(
                f"{entry.site.name}: `{cut.tensor}` has shape {tuple(tensor.shape)}, and the earlier entries of the "
                f"plan leave it {cut.before}"
            )
        for axis, kept in cut.kept:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
        left[cut.tensor] = tensor
    resized = _lengths(model, form, left)
    for name, tensor in (left | resized).items():
        module_name, _, attribute = name.rpartition(".")
        if name in left:
            edits.append(Sized(module_name, attribute, tuple(tensor.shape)))
        edits.append(Weights(module_name, {attribute: tensor}, as_held=True))
    edits += _fitted(entry)
    for listed in entry.site.lists:
        edits.append(Entries(listed.module, tuple(entry.kept.tolist())))
    return edits


def _fitted(entry: Entry) -> list[Edit]:
    """The edits that give the layers which read the channels their fitted weights."""
    site, fit = entry.site, entry.fit
    found: list[Edit] = []
    if fit is None:
        return found
    for m, weight, bias in zip(site.consumers, fit.consumers, fit.biases, strict=True):
        has_bias = m.bias or bool(bias.ne(0).any())
        numbers = {"weight": weight}
        if has_bias:
            numbers["bias"] = bias
        found += [Resize.to(resized_map(m, d_in=weight.shape[1], bias=has_bias)), Weights(m.name, numbers)]
    return found


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor.detach()


def _lengths(model: nn.Module, form: Form, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The lengths of weight norms whose directions lose channels along other dimensions than theirs."""
    axes = {cut.tensor: dict(cut.kept) for cut in form.cuts}
    found: dict[str, Tensor] = {}
    for norm in weight_norms(model):
        own = axes.get(norm.direction, {})
        direction = left.get(norm.direction)
        if direction is None or not set(own) - {norm.dim}:
            continue
        whole = _tensor(model, norm.direction)
        if norm.dim in own:
            whole = whole.index_select(norm.dim, own[norm.dim].to(whole.device))
        length = left[norm.length] if norm.length in left else _tensor(model, norm.length)
        found[norm.length] = norm.resized(length, whole, direction)
    return found

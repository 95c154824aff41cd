"""What else becomes of a model where channels are cut out of its tensors: layers made ready, and numbers that fall.

for edit in (*before_cut(model, ["encoder.self_attn.in_proj_weight"]), *fallen(model, site.followers, site.width, 3)):
    perform(model, edit)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from shallower.modules.edits import Attribute, Dense, Number, StructuralEdit
from shallower.modules.prepared.attention import is_stock
from shallower.modules.written import numbers_written
from shallower.sites import Follower


def before_cut(model: nn.Module, tensors: Iterable[str]) -> list[StructuralEdit]:
    """The edits of layers that cannot lose channels as they are, before some of their tensors do.

    Args:
        model: not changed.
        tensors: dotted names.
    """
    found: dict[str, StructuralEdit] = {}
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors):
        for place in (name, name.rpartition(".")[0]):
            if is_stock(model.get_submodule(place)):
                found[place] = Dense(place)
    return list(found.values())


def fallen(model: nn.Module, followers: Iterable[Follower], width: int, gone: int) -> list[Attribute | Number]:
    """The edits with which numbers fall when so many channels go.

    Args:
        model: as earlier edits left it; not changed.
        followers: of one site.
        width: how many channels it has.
        gone: how many of its channels go.
    """
    edits: list[Attribute | Number] = []
    for follower in followers:
        module = model.get_submodule(follower.module)
        written = follower.written
        if written is None:
            now = getattr(module, follower.attribute)
            edits.append(Attribute(follower.module, follower.attribute, now - _fall(follower, now, width, gone)))
            continue
        now = numbers_written(module).get(written.path, {}).get(written.place, written.value)
        fewer = _fall(follower, int(now), width, gone)
        # a slice counts from the end where it is negative
        edits.append(Number(follower.module, written, now + fewer if now < 0 < fewer else now - fewer))
    return edits


def _fall(follower: Follower, now: int, width: int, gone: int) -> int:
    """By how much a number falls: by its share, where it counts these channels times others, which may have gone."""
    if abs(now) <= follower.each * width:
        return abs(now) // width * gone
    return follower.each * gone

"""Weights that a pass did not read: experts without tokens, branches not taken, heads that only train.

They may read the channels of a space in another pass, which a cut would break. A vector, a mask token for instance,
reads nothing: it stays as it is, and a pass that adds it to fewer channels ends in an error that says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from shallower.core.text import common_prefix
from shallower.recording.tracing import Trace
from shallower.sites import Slot


class Unread:
    """The weights of a model that one pass did not read.

    unread = Unread(trace)
    unread.reason(site.slots)       # "" where none of them can read these channels
    """

    def __init__(self, trace: Trace) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        names = trace.names
        for (module, attribute), value in trace.weights.items():
            if not value.readers and sum(size > 1 for size in value.shape) > 1:
                self._shapes[f"{names[module]}.{attribute}".lstrip(".")] = value.shape

    def reason(self, slots: Sequence[Slot]) -> str:
        """Why channels that stand in these slots cannot be cut, "" where they can.

        A weight may read them that lies in the smallest module around all slots, and has an axis as long as one of
        theirs.
        """
        if not self._shapes:
            return ""
        around = common_prefix([slot.tensor for slot in slots])
        lengths = {slot.shape[slot.axis] for slot in slots if slot.side}
        for name, shape in self._shapes.items():
            inside = not around or name.startswith(f"{around}.")
            if inside and lengths & set(shape):
                return f"`{name}` is not used on the example inputs, and may read the same channels on others"
        return ""

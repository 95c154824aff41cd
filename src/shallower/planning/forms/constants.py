"""Where constants go once channels are linear or dropped: into which bias, and whether one map is still exact."""

from __future__ import annotations

from shallower.planning.entries import Entry
from shallower.planning.geometry import is_plain
from shallower.sites import LinearMap


def has_constants(entry: Entry, producer: LinearMap) -> bool:
    """Whether what goes from the producer to the consumers may hold a constant, where no channel keeps f.

    A linear channel is s (P x + p) + t, scaled and shifted by BatchNorms: p, t and the shifts are constants.
    """
    if entry.fit is not None:
        return entry.fit.down_bias is not None
    site, shifted = entry.site, entry.shifts_linear or entry.shifts_dropped
    return producer.bias or site.bridge.has("norm") or shifted


def inexact(entry: Entry, producer: LinearMap, consumer: LinearMap) -> str:
    """Why one map would not be exactly what producer and consumer are together; "" where it would."""
    bridge = entry.site.bridge
    pointwise = producer.taps == 1 and producer.groups == 1 and is_plain(producer)
    if bridge.has("average") and pointwise and entry.fit is None:
        return ""  # the mean over pixels of a map of each pixel is the map of the mean
    if bridge.not_merged is not None:
        return str(bridge.not_merged)
    if not bridge.pads([consumer]) or (entry.fit is not None and not entry.fit.ups):
        return ""
    if producer.taps == 1 and producer.padding == (0, 0) and not has_constants(entry, producer):
        return ""  # zeros around what it reads are zeros around what it makes
    return (
        f"`{consumer.name}` pads with zeros behind `{producer.name}`, so that one kernel would differ along the "
        "border. Move the padding to the first of the two, and fine-tune (move_padding)"
    )


def needs_bias(entry: Entry, producer: LinearMap, consumer: LinearMap, i: int, inside: bool = False) -> bool:
    """Whether a consumer needs a bias: it has one, or a constant goes into it.

    Args:
        entry: the fates.
        producer: as it is now.
        consumer: as it is now.
        i: which of the site's consumers it is.
        inside: the constants of linear channels stay in the producer's bias.
    """
    if consumer.bias or consumer.kind == "conv1d":
        return True
    if entry.fit is not None:
        return bool(entry.fit.biases[i].ne(0).any()) or (entry.fit.down_bias is not None and not inside)
    bridge = entry.site.bridge
    behind = bridge.norm_after != "" and not bridge.has("depthwise")
    if entry.shifts_dropped or (behind and len(entry.dropped) > 0):
        return True
    if inside or len(entry.linear) == 0:
        return False
    return entry.shifts_linear or producer.bias or bridge.has("norm")

"""Operations that no channel passes, and why.

x.nonzero()           # closes what it reads
"""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from shallower.finding.channels.following import Following, UnknownUseError, rule
from shallower.recording.tracing import Call

REASONS = {
    "nonzero argwhere masked_select unique unique_consecutive": "picks positions by the numbers it reads",
    "kl_div binary_cross_entropy binary_cross_entropy_with_logits "
    "cross_entropy nll_loss cosine_embedding_loss triplet_margin_loss ctc_loss": "makes one number of all channels",
    "stft istft": "mixes positions by frequency",
    "quantize_per_tensor quantize_per_channel fake_quantize_per_channel_affine": "rounds numbers by tables",
}


def _refused(f: Following, call: Call, reason: str) -> NoReturn:
    raise UnknownUseError(f"{f.title(call)} {reason}")


for _names, _reason in REASONS.items():
    rule(_names)(partial(_refused, reason=_reason))

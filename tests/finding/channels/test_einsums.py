"""The letters of einsums."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.finding.channels.einsums import einsum_terms
from shallower.recording.tracing import trace_forward


@pytest.mark.parametrize(
    ("equation", "terms", "made"),
    [
        ("bi, io -> bo", ["bi", "io"], "bo"),
        ("...i,oi->...o", ["1i", "oi"], "1o"),
        ("ij,jk", ["ij", "jk"], "ik"),
    ],
)
def test_each_axis_has_a_letter(equation: str, terms: list[str], made: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum(equation, x, self.weight)

    (call,) = trace_forward(Net(), torch.randn(2, 3)).calls
    found, given = einsum_terms(call)
    assert ["".join(letters) for _, letters in found] == terms
    assert "".join(given) == made

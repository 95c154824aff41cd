"""The divergence that teaches narrow widths."""

from __future__ import annotations

import torch

from shallower.methods.dropout.teaching import divergence


def test_of_logits_it_is_the_mean_kullback_leibler_divergence() -> None:
    torch.manual_seed(0)
    given, wanted = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = wanted.softmax(-1), given.softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(divergence(given, wanted, True), expected)


def test_of_features_it_is_the_error_as_a_part_of_the_variance() -> None:
    wanted = torch.tensor([[0.0], [2.0]])
    assert float(divergence(wanted + 1, wanted, False)) == 0.5
    assert float(divergence(wanted, wanted, False)) == 0.0

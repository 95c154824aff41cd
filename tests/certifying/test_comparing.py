"""Outputs compared row by row."""

from __future__ import annotations

import pytest
import torch

from shallower.certifying.comparing import compared_rows
from shallower.errors import ModelError


def test_an_answer_changes_where_the_largest_logit_is_another() -> None:
    wanted = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    given = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 3.0]])
    rows = list(compared_rows(given, wanted, None, "abc", classes=True))
    assert [row.changed for row in rows] == [1, 0, 0]
    assert [row.sampled for row in rows] == [True, False, False]
    assert not rows[0].several
    p, q = (x[0].softmax(-1) for x in (wanted, given))
    assert rows[0].error == pytest.approx(float((p * (p / q).log()).sum()))
    assert rows[2].error == 0


def test_only_positions_in_the_mask_count_and_empty_rows_are_left_out() -> None:
    wanted, given = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    rows = list(compared_rows(given, wanted, mask, "abc", classes=True))
    assert [(row.digest, row.positions, row.size) for row in rows] == [("a", 2, 2), ("c", 4, 4)]
    differ = given.argmax(-1) != wanted.argmax(-1)
    assert rows[0].changed == int(differ[0, :2].sum())
    assert rows[0].several


def test_the_position_that_is_drawn_depends_on_the_row_and_the_seed_alone() -> None:
    wanted, given = torch.randn(1, 200, 2), torch.randn(1, 200, 2)
    state = torch.get_rng_state()

    def drawn(digest: str, seed: int) -> bool:
        (row,) = compared_rows(given, wanted, None, [digest], classes=True, seed=seed)
        return row.sampled

    assert drawn("a", 0) == drawn("a", 0)
    seen = {drawn("a", seed) for seed in range(20)}
    assert seen == {True, False}
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_of_classes_have_them_in_dimension_1() -> None:
    wanted = torch.zeros(1, 3, 2, 2)
    wanted[:, 1] = 1
    given = wanted.clone()
    given[0, 2, 0, 0] = 5
    (row,) = compared_rows(given, wanted, None, "a", classes=True)
    assert (row.positions, row.changed) == (4, 1)


def test_features_have_an_error_and_a_cosine() -> None:
    wanted, given = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    first, second = compared_rows(given, wanted, None, "ab", classes=False)
    assert (first.error, first.size) == (1, 25)
    assert second.cosine == pytest.approx(0)
    assert (first.positions, first.changed) == (1, 0)


def test_features_of_padding_count_for_nothing() -> None:
    wanted = torch.ones(1, 3, 2)
    given = wanted.clone()
    given[0, 2] = 9
    (row,) = compared_rows(given, wanted, torch.tensor([[1, 1, 0]]), "a", classes=False)
    assert (row.error, row.size) == (0, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 4), "return"),
        (torch.zeros(()), "return"),
        (torch.full((2, 3), float("nan")), "finite"),
    ],
)
def test_outputs_that_cannot_be_compared_are_errors(given: torch.Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        list(compared_rows(given, torch.zeros(2, 3), None, "ab", classes=True))
    with pytest.raises(ModelError, match="rows"):
        list(compared_rows(torch.zeros(3, 3), torch.zeros(3, 3), None, "ab", classes=True))

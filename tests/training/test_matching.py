"""What a small network learns from the original."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from shallower.core.batches import Batch
from shallower.errors import TrainingError
from shallower.training.matching import Lesson, Matching, Pupil, Teacher


class Counting(nn.Linear):
    """Counts its calls, outside of itself: what a forward leaves in a module is taken back."""

    calls: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return super().forward(x)


def test_the_distance_is_that_of_the_outputs() -> None:
    dense, small, x = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    with Teacher(dense, Matching()) as teacher, torch.no_grad():
        found = teacher.distance(small, Lesson(Batch(x)))
        wanted = (small(x) - dense(x)).square().sum() / dense(x).square().sum()
        torch.testing.assert_close(found, wanted)
    with Teacher(dense, Matching(logits=True)) as teacher, torch.no_grad():
        found = teacher.distance(small, Lesson(Batch(x)))
        p, q = dense(x).log_softmax(-1), small(x).log_softmax(-1)
        torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean())


def test_what_the_original_answers_to_a_numbered_lesson_is_kept() -> None:
    Counting.calls.clear()
    dense, small, x = Counting(4, 3), nn.Linear(4, 3), torch.randn(5, 4)
    with Teacher(dense, Matching()) as teacher:
        first = teacher.distance(small, Lesson(Batch(x), 0))
        again = teacher.distance(small, Lesson(Batch(x), 0))
        assert len(dense.calls) == 1
        assert torch.equal(first, again)
        teacher.distance(small, Lesson(Batch(x)))
        teacher.distance(small, Lesson(Batch(x)))
        assert len(dense.calls) == 3


def test_in_training_all_but_recurrent_layers_run_as_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.LSTM(4, 4)).train()
    Pupil(model).before_step()
    assert [module.training for module in model] == [False, False, False, True]
    Pupil(model, batchnorm=True).before_step()
    assert [module.training for module in model] == [False, True, False, True]


def test_the_checkpoint_of_another_training_is_refused() -> None:
    model = nn.Linear(2, 2)
    state = Pupil(model, identity="a").state_dict()
    Pupil(model, identity="a").load_state_dict(state)
    with pytest.raises(TrainingError, match="another healing"):
        Pupil(model, identity="b").load_state_dict(state)

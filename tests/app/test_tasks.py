"""What losses and scores mean."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shallower.app.tasks import (
    TASK_NAMES,
    Classification,
    LanguageModelling,
    Likeness,
    labels_of,
    logits_of,
    task_named,
)
from shallower.errors import DataError, ModelError

CLASSIFICATION, LANGUAGE = Classification(), LanguageModelling()


class Bigram(nn.Module):
    """Predicts from the last token alone, as a Transformers model answers."""

    def __init__(self, vocabulary: int = 7) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def test_accuracy_is_the_part_of_rows_whose_largest_logit_is_the_label() -> None:
    batches = [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([0]))]
    assert CLASSIFICATION.score(nn.Identity(), batches) == pytest.approx(0.75)


def test_classification_reads_mappings_and_pairs_alike() -> None:
    class Model(nn.Module):
        def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
            return {"logits": 2 * pixel_values}

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(2 * x, y)
    assert CLASSIFICATION.loss(Model(), {"pixel_values": x, "labels": y}).item() == pytest.approx(expected.item())
    assert CLASSIFICATION.loss(Model(), (x, y)).item() == pytest.approx(expected.item())


def test_scoring_runs_in_eval_mode_and_restores_every_module_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[1].eval()
    x = torch.eye(3)
    assert CLASSIFICATION.score(model.train(False), [(x, torch.arange(3))]) == 1
    model[0].train()
    assert CLASSIFICATION.score(model, [(x, torch.arange(3))]) == 1
    assert (model.training, model[0].training, model[1].training) == (False, True, False)


def test_language_score_is_summed_token_losses_over_summed_tokens() -> None:
    torch.manual_seed(0)
    model = Bigram()
    ids = torch.randint(7, (2, 5))
    labels = ids.clone()
    labels[1, 3:] = -100
    log_p = F.log_softmax(model(ids).logits, -1)
    losses = [-log_p[r, t, ids[r, t + 1]].item() for r, last in ((0, 4), (1, 2)) for t in range(last)]
    whole = LANGUAGE.score(model, [{"input_ids": ids, "labels": labels}])
    apart = LANGUAGE.score(model, [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in (0, 1)])
    assert whole == pytest.approx(-sum(losses) / 6, rel=1e-6)
    assert apart == pytest.approx(whole, rel=1e-6)
    assert LANGUAGE.loss(model, (ids, labels)).item() == pytest.approx(-whole, rel=1e-6)


def test_perplexity_is_shown_for_the_score_of_a_language_model() -> None:
    assert LANGUAGE.show(-math.log(4.5)) == "4.5"
    assert CLASSIFICATION.show(0.9375) == "93.75 %"


def test_a_quality_as_people_say_it_becomes_a_score() -> None:
    assert CLASSIFICATION.score_of(0.9) == 0.9
    assert LANGUAGE.show(LANGUAGE.score_of(20)) == "20"
    with pytest.raises(DataError, match="between 0 and 1, not at 90"):
        CLASSIFICATION.score_of(90)
    with pytest.raises(DataError, match="at least 1"):
        LANGUAGE.score_of(0.5)


@pytest.mark.parametrize("task", [CLASSIFICATION, LANGUAGE])
def test_no_rows_cannot_be_scored(task: Any) -> None:
    with pytest.raises(DataError, match="there are no"):
        task.score(nn.Identity(), [])


def test_logits_are_found_in_every_usual_answer() -> None:
    x = torch.zeros(2)
    for answer in (x, (x, None), {"logits": x}, SimpleNamespace(logits=x)):
        assert logits_of(answer) is x
    with pytest.raises(ModelError, match="holds no logits"):
        logits_of({"last_hidden_state": x})


def test_a_batch_without_labels_is_refused() -> None:
    with pytest.raises(DataError, match="labels"):
        labels_of({"input_ids": torch.zeros(2)})


def test_agreement_is_the_part_of_rows_with_the_same_class() -> None:
    original, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    original.weight.data, other.weight.data = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    task = Likeness(features=False).to(original)
    batches = [torch.eye(3), torch.eye(3)[2:]]
    assert task.score(original, batches) == 1
    assert task.score(other, batches) == pytest.approx(0.5)
    assert task.show(0.5) == "50.00 %"


def test_the_likeness_of_features_is_their_cosine_around_the_originals_mean() -> None:
    original, shifted, turned = (nn.Linear(4, 4) for _ in range(3))
    shifted.load_state_dict(original.state_dict())
    shifted.bias.data += 0.1
    turned.load_state_dict({name: -tensor for name, tensor in original.state_dict().items()})
    task = Likeness(features=True).to(original)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 4, generator=generator), torch.randn(3, 4, generator=generator)]
    assert task.score(original, batches) == pytest.approx(1)
    assert task.score(turned, batches) < 0 < task.score(shifted, batches) < 1


def test_features_of_padded_tokens_count_for_nothing() -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": F.one_hot(input_ids, 5).float(), "pooled": attention_mask.float()}

    class Padded(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return super().forward(input_ids.where(attention_mask.bool(), torch.tensor(4)), attention_mask)

    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    task = Likeness(features=True).to(Encoder())
    assert task.score(Padded(), [{"input_ids": ids, "attention_mask": (ids > 0).long()}]) == pytest.approx(1)


def test_there_is_no_loss_without_labels() -> None:
    with pytest.raises(DataError, match="squeeze without training"):
        task_named("image-classification", labelled=False).loss(nn.Identity(), torch.zeros(1))


def test_an_unknown_task_is_refused_with_the_list() -> None:
    assert {task_named(name).quality for name in TASK_NAMES} == {"accuracy", "perplexity", "cosine"}
    with pytest.raises(DataError, match="text-classification, image-classification, causal-lm"):
        task_named("translation")

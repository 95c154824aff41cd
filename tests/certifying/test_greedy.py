"""Greedy texts, with a cache and without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.certifying.certificate import Greedy
from shallower.certifying.greedy import agreement, prompts_in, writes, written
from shallower.core.batches import Batch
from tests.certifying.models import bert, llama


def test_a_text_is_what_the_model_itself_generates() -> None:
    model = llama()
    prompts = torch.randint(1, 50, (3, 5))
    found = written(model, prompts, 7)
    with torch.no_grad():
        text = prompts
        for _ in range(7):
            text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text[:, 5:])


def test_a_model_without_a_cache_writes_too() -> None:
    model = llama()

    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: torch.Tensor) -> object:
            return self.inner(**{**inputs, "use_cache": False})

    prompts = torch.randint(1, 50, (2, 4))
    assert torch.equal(written(Forgetful(), prompts, 5), written(model, prompts, 5))


def test_agreement_counts_the_tokens_before_the_first_that_differs() -> None:
    model = llama()
    prompts = list(torch.randint(1, 50, (6, 4)))
    found = agreement(model, model, prompts, Greedy(4, 6), seed=0)
    assert found is not None
    assert (found.texts, found.tokens, found.identical, found.agreed.value) == (6, 6, 6, 6)
    other = agreement(model, llama(seed=1), prompts, Greedy(4, 6), seed=0)
    assert other is not None
    assert other.agreed.value < 6


def test_there_is_no_text_without_a_prompt_or_without_room() -> None:
    model = llama()
    assert agreement(model, model, [], Greedy(), seed=0) is None
    assert agreement(model, model, list(torch.ones(2, 64, dtype=torch.int64)), Greedy(64, 6), seed=0) is None


def test_a_prompt_is_the_first_tokens_that_are_no_padding() -> None:
    ids = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 6]])
    first, second, third = prompts_in(Batch({"input_ids": ids}, ids > 0), 3)
    assert first is not None
    assert second is not None
    assert (first.tolist(), second.tolist(), third) == ([7, 8, 9], [1, 2, 3], None)
    assert list(prompts_in(Batch(torch.zeros(2, 3)), 1)) == [None, None]


@pytest.mark.parametrize(("model", "expected"), [(llama, True), (bert, False), (lambda: nn.Linear(2, 2), False)])
def test_only_models_that_continue_their_input_write(model: object, expected: bool) -> None:
    assert writes(model()) == expected  # type: ignore[operator]

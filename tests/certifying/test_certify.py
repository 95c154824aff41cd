"""Certificates of real pairs of models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.certifying.bounds import changed_at_most
from shallower.certifying.certificate import Greedy
from shallower.certifying.certify import certify
from shallower.core.batches import Batch, row_digests
from shallower.errors import DataError, ModelError, SiteError
from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.squeeze import squeeze
from shallower.planning.plan import Plan
from shallower.surgery.applying import apply
from tests.certifying.models import bert, llama


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()


def changed(model: nn.Module, size: float = 0.3) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return other


def images(rows: int = 120, size: int = 30, seed: int = 1) -> list[Tensor]:
    return list(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).split(size))


def test_a_classifier_is_certified_on_its_answers() -> None:
    dense = classifier()
    small = changed(dense)
    found = certify(dense, small, images(), logits=True)
    x = torch.cat(images())
    with torch.no_grad():
        p, q = dense(x).log_softmax(-1), small(x).log_softmax(-1)
    differ = int((p.argmax(-1) != q.argmax(-1)).sum())
    assert 0 < differ < 120
    assert (found.rows, found.changed, found.bound) == (120, differ, changed_at_most(differ, 120))
    assert found.divergence.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.divergence.low < found.divergence.value < found.divergence.high
    assert (found.tokens, found.token_rate, found.greedy, found.cosine) == (None, None, None, None)


def test_it_is_the_same_whatever_the_batches_and_the_random_state() -> None:
    dense, small = llama(), changed(llama(), 0.05)
    ids = torch.randint(1, 50, (12, 20))
    state = torch.get_rng_state()
    whole = certify(dense, small, [{"input_ids": ids}], greedy=Greedy(4, 4))
    parts = certify(dense, small, [{"input_ids": part} for part in ids.split(5)], greedy=Greedy(4, 4))
    assert (whole.changed, whole.tokens, whole.greedy) == (parts.changed, parts.tokens, parts.greedy)
    assert whole.divergence.value == pytest.approx(parts.divergence.value, rel=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_language_model_has_tokens_and_texts() -> None:
    dense, small = llama(), changed(llama(), 0.05)
    ids = torch.randint(1, 50, (10, 24))
    mask = torch.ones_like(ids)
    mask[:3, 9:] = 0
    found = certify(dense, small, [{"input_ids": ids, "attention_mask": mask}], greedy=Greedy(prompt=12, tokens=5))
    assert (found.rows, found.tokens) == (10, int(mask.sum()))
    assert found.token_rate is not None
    counted = mask.bool()
    with torch.no_grad():
        there, here = (model(input_ids=ids, attention_mask=mask).logits.argmax(-1) for model in (dense, small))
    assert found.token_rate.value == pytest.approx(float((there != here)[counted].double().mean()))
    assert found.greedy is not None
    assert (found.greedy.texts, found.greedy.prompt, found.greedy.tokens) == (7, 12, 5)
    assert certify(dense, small, [{"input_ids": ids}], greedy=Greedy(texts=0)).greedy is None


def test_a_model_is_like_itself() -> None:
    model = llama()
    found = certify(model, model, [{"input_ids": torch.randint(1, 50, (6, 20))}])
    assert (found.changed, found.divergence.value) == (0, 0)
    assert found.greedy is not None
    assert found.greedy.identical == 6


def test_features_are_certified_without_answers() -> None:
    dense, small = bert(), changed(bert(), 0.01)
    found = certify(dense, small, [{"input_ids": torch.randint(1, 50, (6, 20))}])
    assert (found.kind, found.changed, found.bound) == ("features", None, None)
    assert found.cosine is not None
    assert 0.9 < found.cosine.value < 1
    assert 0 < found.divergence.value < 0.2


def test_rows_that_the_plan_was_calibrated_on_are_refused() -> None:
    dense = classifier()
    data, others = images(240), images(90, seed=2)
    plan = squeeze(dense, find_sites(dense, data[0]), data, "params:60%")
    small = apply(dense, plan, data[0])
    found = certify(dense, small, [*data[:1], *others], seen=plan, logits=True)
    assert (found.rows, found.left_out) == (90, 30)
    assert "30 rows were left out" in str(found)
    with pytest.raises(DataError, match="made from all 240 rows"):
        certify(dense, small, data, seen=plan, logits=True)
    digests = row_digests(Batch(others[0]))
    assert certify(dense, small, others, seen=digests, logits=True).rows == 60


def test_what_a_plan_was_calibrated_on_goes_through_its_file(tmp_path: Any) -> None:
    dense, data = classifier(), images(240)
    plan = squeeze(dense, find_sites(dense, data[0]), data, "params:60%")
    plan.save(tmp_path)
    assert len(plan.seen) == 240
    assert Plan.load(tmp_path).seen == plan.seen


def test_models_and_their_modes_stay_as_they_are() -> None:
    dense = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    small = copy.deepcopy(dense)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    assert certify(dense, small, images(), logits=True).changed == 0
    assert small.training
    assert small[2].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_batches_and_outputs_that_do_not_fit_are_errors() -> None:
    dense = classifier()
    with pytest.raises(DataError, match="holds no row"):
        certify(dense, dense, [])
    with pytest.raises(SiteError, match="one-shot"):
        certify(dense, dense, iter(images()))
    with pytest.raises(ModelError, match="return"):
        certify(dense, nn.Linear(6, 2), images())


def test_a_row_that_comes_twice_counts_once() -> None:
    model = classifier()
    row = images(1, 1)[0]
    certificate = certify(model, changed(model), [torch.cat([row] * 50)])
    assert certificate.rows == 1

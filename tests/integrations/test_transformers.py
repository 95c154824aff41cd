"""A method inside Transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shallower as sh
from shallower.errors import MethodError
from shallower.methods.base import Method

transformers = pytest.importorskip("transformers")

from shallower.integrations.transformers import ShallowerCallback  # noqa: E402


def make_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
    return transformers.BertForSequenceClassification(config)


def make_rows(count: int = 32) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    ids = torch.randint(1, 50, (count, 8))
    return [{"input_ids": row, "labels": int(row[0] > 25)} for row in ids]


def make_trainer(model: Any, directory: Path, callbacks: list[Any], **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(directory / "trainer"),
        **{"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": [], **options},
        logging_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    return transformers.Trainer(model, arguments, train_dataset=make_rows(), callbacks=callbacks)


def attached() -> tuple[Any, sh.LayerCollapse]:
    model = make_model()
    example = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
    return model, sh.LayerCollapse(model, sh.find_sites(model, example).select("*layer*"))


def test_a_training_ends_with_a_directory_that_loads(tmp_path: Path) -> None:
    model, method = attached()
    callback = ShallowerCallback(method, directory=tmp_path / "small")
    make_trainer(model, tmp_path, [callback]).train()
    small = sh.load(tmp_path / "small")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    x = {"input_ids": torch.randint(1, 50, (3, 8))}
    torch.testing.assert_close(small(**x).logits, callback.result(**x).logits)
    assert len(sh.find_sites(small, x).select("*layer*")) == 0


def test_slopes_are_logged_through_the_trainers_loggers(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Logger(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            seen.append(dict(logs))

    model, method = attached()
    callback = ShallowerCallback(method)
    trainer = make_trainer(model, tmp_path, [Logger(), callback])
    callback.log_through(trainer)
    trainer.train()
    slopes = [logs["shallower/slope"] for logs in seen if "loss" in logs]
    assert slopes == sorted(slopes)
    assert slopes[-1] == 1
    assert trainer.state.log_history[0]["shallower/slope"] == slopes[0]
    assert [logs["shallower/linear"] for logs in seen if "loss" in logs][-1] == 2


def test_the_penalty_is_no_part_of_the_reported_loss_and_moves_the_slopes(tmp_path: Path) -> None:
    model, method = attached()
    trainer = make_trainer(model, tmp_path, [ShallowerCallback(method, arrive=None)])
    trainer.train()
    assert all(0 < float(slope.detach()) < 0.1 for slope in method.slopes().values())
    assert trainer.state.log_history[0]["loss"] < 1.5


def test_weight_decay_on_slopes_is_refused(tmp_path: Path) -> None:
    model, method = attached()
    with pytest.raises(MethodError, match="param_groups"):
        make_trainer(model, tmp_path, [ShallowerCallback(method)], weight_decay=0.1).train()


def test_a_method_on_another_model_is_refused(tmp_path: Path) -> None:
    _, method = attached()
    with pytest.raises(MethodError, match="another model"):
        make_trainer(make_model(), tmp_path, [ShallowerCallback(method)]).train()


def test_a_method_of_several_passes_is_refused() -> None:
    model = make_model()
    sites = sh.find_sites(model, {"input_ids": torch.ones(2, 8, dtype=torch.long)}).select("*layer*")

    class Twice(Method):
        def loss(self, closure: Any) -> Any:
            return closure() + closure()

    with pytest.raises(MethodError, match="several passes"):
        ShallowerCallback(Twice(model, sites))


def test_a_uniformly_narrower_model_loads_with_stock_from_pretrained(tmp_path: Path) -> None:
    model, x = make_model().eval(), {"input_ids": torch.randint(1, 50, (4, 8))}
    sites = sh.find_sites(model, x).select("*layer*")
    plan = sh.Plan(tuple(sh.Entry.narrow(site, torch.arange(24)) for site in sites))
    small = sh.apply(model, plan, x)
    sh.save(small, tmp_path / "small")
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert type(stock) is type(model)
    torch.testing.assert_close(stock.eval()(**x).logits, small(**x).logits)

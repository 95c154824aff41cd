"""`from_pretrained` of Transformers reads results with unequal layers, and refuses them where we are not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shallower as sh

transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3,
    "max_position_embeddings": 24,
}  # fmt: skip


REPAIR = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""So that transformers can be imported beside a torchvision whose wheel was built for another torch."""


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(1, 40, (2, 7))


def classifier() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3)).eval()


@pytest.fixture(scope="module")
def unequal(ids: torch.Tensor) -> Any:
    """Widths of 5, 32 and 9 channels, three heads in one layer, and one attention less."""
    model = classifier()
    sites = sh.find_sites(model, {"input_ids": ids}, kinds=("hidden", "heads", "branch"))
    hidden = [site for site in sites if site.kind == "feed-forward"]
    (heads,) = [site for site in sites if site.kind == "heads" and "layer.0" in site.name]
    (attention,) = [site for site in sites if site.kind == "branch" and "layer.1.attention" in site.name]
    entries = [sh.Entry.narrow(hidden[0], range(5)), sh.Entry.narrow(hidden[2], range(9))]
    entries += [sh.Entry.narrow(heads, range(3)), sh.Entry.drop(attention)]
    return sh.apply(model, sh.Plan(tuple(entries)), {"input_ids": ids})


@pytest.fixture(scope="module")
def saved(unequal: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "small"
    sh.save(unequal, directory)
    return directory


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_what_was_saved_is_read_by_the_class_and_by_auto_classes(saved: Path, unequal: Any, ids: torch.Tensor) -> None:
    for read in (transformers.BertForSequenceClassification, transformers.AutoModelForSequenceClassification):
        loaded, report = read.from_pretrained(saved, output_loading_info=True)
        assert torch.equal(logits(loaded.eval(), ids), logits(unequal, ids))
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert not getattr(loaded, "is_quantized", False)


def test_it_goes_round_and_round(saved: Path, unequal: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    read(saved).save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again").eval()
    assert torch.equal(logits(again, ids), logits(unequal, ids))
    unequal.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(read(tmp_path / "plain").eval(), ids), logits(unequal, ids))
    loaded = sh.load(saved)
    loaded.save_pretrained(tmp_path / "loaded")
    assert torch.equal(logits(read(tmp_path / "loaded").eval(), ids), logits(unequal, ids))
    sh.save(again, tmp_path / "ours")
    assert torch.equal(logits(sh.load(tmp_path / "ours"), ids), logits(unequal, ids))


def test_the_encoder_of_a_classifier_and_a_classifier_of_an_encoder(
    saved: Path, unequal: Any, ids: torch.Tensor, tmp_path: Path
) -> None:  # fmt: skip
    encoder = transformers.AutoModel.from_pretrained(saved).eval()
    with torch.no_grad():
        expected = unequal.bert(input_ids=ids).pooler_output
        assert torch.equal(encoder(input_ids=ids).pooler_output, expected)
    encoder.save_pretrained(tmp_path / "encoder")
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    assert headed.bert.encoder.layer[0].intermediate.dense.out_features == 5


def test_another_type_and_training(saved: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.bert.encoder.layer[0].intermediate.dense.weight.dtype == torch.bfloat16
    model = model.to(torch.float32)
    rows = [{"input_ids": row, "labels": torch.tensor(1)} for row in ids]
    arguments = transformers.TrainingArguments(tmp_path / "run", max_steps=2, report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "trained")
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(logits(trained, ids), logits(model.eval(), ids))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
def test_an_adapter_is_merged_and_saved(saved: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    config = peft.LoraConfig(r=2, target_modules=["key"], init_lora_weights=False)
    merged = peft.get_peft_model(model, config).merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again, ids), logits(merged, ids))


def test_equal_widths_leave_no_record(ids: torch.Tensor, tmp_path: Path) -> None:
    model = classifier()
    sites = sh.find_sites(model, {"input_ids": ids}).select(lambda site: site.kind == "feed-forward")
    small = sh.apply(model, sh.Plan(tuple(sh.Entry.narrow(site, range(8)) for site in sites)), {"input_ids": ids})
    assert "quantization_config" not in small.config.to_dict()
    sh.save(small, tmp_path / "small")
    assert "shallower" not in (tmp_path / "small" / "config.json").read_text()


@pytest.mark.parametrize("what", ["widths", "an attention", "a layer"])
def test_without_us_loading_fails_and_names_us(what: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = classifier()
    sites = sh.find_sites(model, {"input_ids": ids}, kinds=("hidden", "branch"))
    entries = {
        "widths": [sh.Entry.narrow(next(iter(sites)), range(5))],
        "an attention": [sh.Entry.drop(sites["bert.encoder.layer.1.attention:branch"])],
        "a layer": [
            sh.Entry.narrow(next(iter(sites)), range(5)),
            sh.Entry.drop(sites["bert.encoder.layer.1:layer"]),
        ],
    }[what]
    small = sh.apply(model, sh.Plan(tuple(entries)), {"input_ids": ids})
    sh.save(small, tmp_path / "small")
    code = (
        f"import transformers; transformers.BertForSequenceClassification.from_pretrained({str(tmp_path / 'small')!r})"
    )
    # a command line that ran before in this process keeps Transformers quiet
    loud = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    alone = subprocess.run([sys.executable, "-c", REPAIR + code], capture_output=True, text=True, check=False, env=loud)
    assert alone.returncode != 0
    assert "shallower" in alone.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"import shallower; {REPAIR}{code}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_record_of_another_version_is_refused(saved: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    model.config.quantization_config["version"] = 99
    model.save_pretrained(tmp_path / "later")
    with pytest.raises(sh.CheckpointError, match="install a newer Shallower"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "later")

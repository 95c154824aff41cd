"""A whole run, from names to a directory, and what is found out before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("datasets")

from shallower import load
from shallower.app.jobs import Job, device_named, run, task_of
from shallower.app.options import DataOptions, RunOptions, Scope, TrainingOptions
from shallower.app.results import read_record
from shallower.app.runs.squeeze import SqueezeRun
from shallower.errors import CheckpointError, DataError, ModelError
from shallower.planning.targets import Target
from tests.app.small import Net


def make_net() -> nn.Module:
    """A wide layer for 6x6 pictures of three classes."""
    torch.manual_seed(0)
    return Net(nn.Flatten(), nn.Linear(36, 96), nn.ReLU(), nn.Linear(96, 3))


def make_double() -> nn.Module:
    """The same in float64."""
    return make_net().double()


def make_empty() -> nn.Module:
    """The same without weights."""
    return make_net().to("meta")


def make_failing() -> nn.Module:
    """A network that reads a key that is not there."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: torch.Tensor) -> Any:
            return {"logits": self.net(x)}["scores"]

    return Failing()


def job(pictures: Path, name: str = "make_net", output: str = "out", **changes: Any) -> Job:
    """Squeezing the network."""
    given = Job(
        f"{__name__}:{name}",
        str(pictures),
        Target.parse("params:50%"),
        pictures.parent / output,
        SqueezeRun(samples=64),
        Scope(task="image-classification"),
        machine=RunOptions("cpu"),
    )
    return replace(given, **changes)


def test_a_run_leaves_a_directory_and_nothing_beside_it(pictures: Path) -> None:
    output = run(job(pictures))
    assert sorted(path.name for path in pictures.parent.iterdir()) == ["out", "pictures.npz"]
    record = read_record(pictures.parent / "out")
    assert record.options["samples"] == 64
    assert record.rows == {"train": 135, "validation": 15, "test": None}
    assert output.data["small"]["params"] == record.small.params
    assert "load it with shallower.load" in output.text


def test_a_double_model_is_squeezed_and_saved_in_its_own_type(pictures: Path) -> None:
    run(job(pictures, "make_double"))
    small = load(pictures.parent / "out", model=make_double())
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make_empty", "it has no weights|the model has no weights"),
        ("make_failing", r"does not run on the data \(\(8, 1, 6, 6\) torch\.float32\): KeyError: 'scores'"),
    ],
)
def test_a_model_that_does_not_run_is_found_out_first(pictures: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run(job(pictures, name))
    assert sorted(path.name for path in pictures.parent.iterdir()) == ["pictures.npz"]


def test_training_before_and_after_goes_on_after_an_interruption(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job(pictures, method=SqueezeRun(samples=64, heal=1), training=TrainingOptions(dense_epochs=2, lr=1e-3))
    run(replace(given, output=pictures.parent / "whole"))
    # Two passes of five batches train the unchanged model; the third step of a trial rate is interrupted.
    monkeypatch.setattr(Net, "interrupt_in", 13)
    with pytest.raises(KeyboardInterrupt):
        run(given)
    assert (given.progress / "squeeze").exists()
    monkeypatch.setattr(Net, "interrupt_in", None)
    run(given)
    whole, resumed = ((pictures.parent / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed
    assert not given.progress.exists()


def test_a_damaged_note_of_a_run_names_the_remedy(pictures: Path) -> None:
    given = job(pictures)
    given.progress.mkdir()
    (given.progress / "job.json").write_text('{"finger')
    with pytest.raises(CheckpointError, match=r"job\.json.*--fresh starts over"):
        run(given)
    run(given, resume=False)
    assert (pictures.parent / "out").is_dir()


def test_numbers_of_classes_that_are_ids_are_not_counted_up_to(pictures: Path) -> None:
    with np.load(pictures) as arrays:
        np.savez(pictures, image=arrays["image"], label=arrays["label"] + 1_000_000_001)
    output = run(job(pictures))
    assert "the labels were not used" in output.text
    with pytest.raises(DataError, match="1000000003"):
        run(job(pictures, output="other", rows=DataOptions(label_column="label")))


def test_the_task_of_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    for name, task in (
        ("BertForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertModel", "feature-extraction"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert task_of(str(tmp_path)) == task
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTModel"], "image_size": 32}))
    assert task_of(str(tmp_path)) == "image-feature-extraction"
    for text in ("{", "[1]", '{"architectures": ["Unknown"]}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError):
            task_of(str(tmp_path))


def test_a_device_that_is_not_there_is_named() -> None:
    assert device_named("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(Exception, match="no CUDA device"):
            device_named("cuda")

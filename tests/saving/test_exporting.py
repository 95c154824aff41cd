"""Exported models answer as the model does, without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.errors import ExportError, ShallowerError


class Net(nn.Module):
    """Two wide layers around an activation, on rows of 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 48), nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


class Fixed(nn.Module):
    """A model that takes exactly four rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def squeezed_net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 12)
    return sh.apply(model, sh.Plan.collapse(sh.find_sites(model, x)), x), x


def squeezed_bert() -> tuple[Any, dict[str, torch.Tensor]]:
    """Two layers, one of them collapsed, on three rows of seven tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=100, **sizes)).eval()
    x = {"input_ids": torch.randint(0, 100, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    x["attention_mask"][1, 5:] = 0
    sites = sh.find_sites(model, x).select("*layer.1*")
    return sh.apply(model, sh.Plan.collapse(sites), x), x


def test_pt2_of_a_collapsed_bert_takes_other_batches_and_lengths(tmp_path: Path) -> None:
    model, x = squeezed_bert()
    written = sh.export(model, x, tmp_path / "model.pt2")
    assert written.dynamic == {name: {0: "batch", 1: "length"} for name in x}
    other = {name: torch.ones(5, 11, dtype=torch.long) for name in x}
    again = torch.export.load(tmp_path / "model.pt2").module()(**other)
    torch.testing.assert_close(again.logits, model(**other).logits)


@pytest.mark.slow
def test_onnx_of_a_collapsed_bert_takes_other_batches_and_lengths(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = squeezed_bert()
    written = sh.export(model, x, tmp_path / "model.onnx")
    assert written.dynamic == {name: {0: "batch", 1: "length"} for name in x}
    assert written.error is not None
    assert written.error < 1e-5
    session = runtime.InferenceSession(str(written.path))
    other = {name: torch.ones(5, 11, dtype=torch.long) for name in x}
    (logits,) = session.run(None, {name: value.numpy() for name, value in other.items()})
    torch.testing.assert_close(torch.from_numpy(logits), model(**other).logits)


def test_onnx_of_a_collapsed_net_takes_other_batches(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = squeezed_net()
    written = sh.export(model, x[:1], tmp_path / "model.onnx")
    assert written.files == (tmp_path / "model.onnx",)
    assert written.checked == ("2 x 12", "3 x 12")
    session = runtime.InferenceSession(str(written.path))
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x))


def test_large_weights_lie_beside_the_onnx_file_and_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model, x = squeezed_net()
    with monkeypatch.context() as small:
        small.setattr("shallower.saving.exporting._SINGLE_FILE", 0)
        written = sh.export(model, x, tmp_path / "model.onnx")
    assert {file.name for file in written.files} == {"model.onnx", "model.onnx.data"}
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    sh.export(model, x, tmp_path / "model.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx"}


def test_sizes_can_be_fixed(tmp_path: Path) -> None:
    model, x = squeezed_net()
    written = sh.export(model, x, tmp_path / "model.pt2", dynamic=None)
    assert written.dynamic == {}
    assert "all sizes are fixed" in str(written)


def test_auto_leaves_fixed_what_the_model_fixes(tmp_path: Path) -> None:
    assert sh.export(Fixed(), torch.randn(4, 12), tmp_path / "model.pt2").dynamic == {}


def test_a_dimension_that_the_model_fixes_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fixes dimension 0"):
        sh.export(Fixed(), torch.randn(4, 12), tmp_path / "model.pt2", dynamic=[{0: "batch"}])
    assert not any(tmp_path.iterdir())


def test_the_model_with_a_method_attached_is_exported_without_it(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(3, 12)
    method = sh.LayerCollapse(model, sh.find_sites(model, x))
    sh.export(model, x, tmp_path / "model.pt2")
    assert list(method.activations)


class Two(nn.Module):
    """Two token inputs of lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, query: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
        first = self.down(self.up(self.embedding(query)).relu()).mean(1)
        return first + self.down(self.up(self.embedding(document)).relu()).sum(1)  # type: ignore[no-any-return]


def test_inputs_of_different_lengths_have_names_of_their_own(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, ids = Two().eval(), torch.randint(1, 50, (4, 9))
    written = sh.export(model, (ids, ids), tmp_path / "two.onnx")
    assert written.dynamic == {"0": {0: "batch", 1: "query_length"}, "1": {0: "batch", 1: "document_length"}}
    assert written.checked == ("4 x 9", "5 x 6 and 5 x 5")
    session = runtime.InferenceSession(str(written.path))
    assert [value.shape for value in session.get_inputs()] == [["batch", "query_length"], ["batch", "document_length"]]
    short = torch.randint(1, 50, (4, 7))
    (y,) = session.run(None, {"query": ids.numpy(), "document": short.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(ids, short))


def test_keywords_may_come_in_any_order(tmp_path: Path) -> None:
    model, ids = Two().eval(), torch.randint(1, 50, (4, 9))
    written = sh.export(model, {"document": ids[:, :5], "query": ids}, tmp_path / "two.pt2")
    assert written.dynamic["document"] == {0: "batch", 1: "document_length"}


@pytest.mark.slow
def test_onnx_outputs_have_the_names_that_the_model_gives_them(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = squeezed_bert()
    session = runtime.InferenceSession(str(sh.export(model, x, tmp_path / "model.onnx").path))
    assert [value.name for value in session.get_outputs()] == ["logits"]


def test_a_directory_a_meta_model_and_wrong_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").mkdir()
    x = torch.randn(3, 12)
    with pytest.raises(ExportError, match="this is a directory"):
        sh.export(Net(), x, tmp_path / "model.pt2")
    with pytest.raises(ExportError, match="on the meta device"):
        sh.export(Net().to("meta"), x, tmp_path / "other.pt2")
    with pytest.raises(ShallowerError, match="shapes"):
        sh.export(Net(), torch.randn(3, 11), tmp_path / "other.pt2")
    with pytest.raises(ExportError, match="there are none"):
        sh.export(Net(), {}, tmp_path / "other.pt2")
    with pytest.raises(ExportError, match="only tensors"):
        sh.export(Net(), {"x": 3}, tmp_path / "other.pt2")
    with pytest.raises(ExportError, match="cannot be written"):
        sh.export(Net(), x, tmp_path / ("x" * 300 + ".pt2"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


class Stubborn(nn.Module):
    """Asks about its numbers, which no tracer knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("model.pt", Net(), "must end in .onnx or .pt2"),
        ("nowhere/model.pt2", Net(), "no such directory"),
        ("model.pt2", Stubborn(), "cannot be traced"),
        ("model.onnx", Net().bfloat16(), "bfloat16"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, name: str, model: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        sh.export(model, torch.randn(3, 12), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_failed_export_keeps_the_earlier_file(tmp_path: Path) -> None:
    model, x = squeezed_net()
    before = sh.export(model, x, tmp_path / "model.pt2").path.read_bytes()
    with pytest.raises(ExportError):
        sh.export(Stubborn(), x, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_bytes() == before


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [({"y": {0: "batch"}}, "the inputs are 0"), ([{2: "far"}], "no dimension 2"), ("all", "give")],
)
def test_dimensions_that_are_not_there_are_refused(tmp_path: Path, dynamic: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        sh.export(Net(), torch.randn(3, 12), tmp_path / "model.pt2", dynamic=dynamic)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own compiler uses what PyTorch deprecates
def test_a_squeezed_model_compiles() -> None:
    model, x = squeezed_net()
    torch.testing.assert_close(torch.compile(model)(x), model(x))

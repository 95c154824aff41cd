"""Second moments of gradients, and models that let gradients through in part only."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.fisher import default_output_of, output_metrics
from shallower.errors import FitError


def test_metric_predicts_the_change_of_the_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.Linear(4, 3)).double()
    data = [torch.randn(2000, 6, dtype=torch.float64) for _ in range(4)]
    metric = output_metrics(model, ["0"], data)["0"].zz
    weight = model[2].weight.detach()
    torch.testing.assert_close(metric, weight.T @ weight, rtol=0.1, atol=0.05)


def test_metric_of_logits_is_the_fisher_matrix() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = [torch.randn(5000, 4, dtype=torch.float64)]
    metric = output_metrics(model, [""], data, logits=True)[""].zz
    p = model(data[0]).softmax(-1).detach()
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    torch.testing.assert_close(metric, exact, rtol=0.1, atol=0.02)


class Backbone(nn.Module):
    """A frozen part that runs without gradients, and a head."""

    def __init__(self, context: Any = torch.no_grad) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            x = self.frozen(x)
        self.kept = x = self.head(x.clone())
        return x


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_that_no_gradient_reaches_are_left_out(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        metrics = output_metrics(Backbone(context), ["frozen.0", "head.0"], batches())
    assert list(metrics) == ["head.0"]
    assert "no gradient reaches frozen.0" in caplog.text


def test_a_model_that_keeps_its_features_is_left_as_it_was() -> None:
    model = Backbone()
    output_metrics(model, ["head.0"], batches())
    assert "kept" not in vars(model)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_callers_inference_mode_is_lifted() -> None:
    model = Backbone()
    with torch.inference_mode():
        metrics = output_metrics(model, ["head.0"], batches())
    assert metrics["head.0"].zz.shape == (8, 8)


class Cloud(nn.Module):
    """One cloud of points: dimension 0 is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.whole = nn.Linear(3, 16), nn.Linear(16, 2)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows = [*self.rows, len(x)]
        return self.whole(torch.relu(self.each(x)).amax(0))


def test_rows_that_depend_on_one_another_are_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shallower.calibrating.fisher._ROOM", 1)
    seen: list[int] = []
    model = Cloud()
    model.each.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    output_metrics(model, ["each"], [torch.randn(40, 3) for _ in range(3)])
    assert seen[-3:] == [40, 40, 40]


def test_independent_rows_are_divided_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shallower.calibrating.fisher._ROOM", 1)
    seen: list[int] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    metrics = output_metrics(model, ["0"], [torch.randn(64, 4)])
    assert seen[0] == 64
    assert seen[-1] < 64
    assert metrics["0"].zz.shape == (8, 8)


def test_sparse_inputs_are_read() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.second(torch.sparse.mm(edges, torch.relu(self.first(x))))

    data = [(torch.randn(5, 3), torch.eye(5).to_sparse()) for _ in range(3)]
    metrics = output_metrics(Graph(), ["first"], data, inputs_of=lambda batch: batch)
    assert metrics["first"].zz.shape == (8, 8)


def test_no_batches_are_refused() -> None:
    with pytest.raises(FitError, match="`batches` is empty"):
        output_metrics(Backbone(), ["head.0"], [])


def test_gradients_that_are_not_finite_name_the_layer() -> None:
    model = Backbone()
    with torch.no_grad():
        model.head[2].weight.fill_(torch.inf)
    with pytest.raises(FitError, match=r"head\.0: the gradients"):
        output_metrics(model, ["head.0"], batches())


def test_the_output_is_the_logits_or_the_first_floating_point_tensor() -> None:
    assert default_output_of((torch.tensor([1]), torch.tensor([2.0]))).item() == 2.0
    with pytest.raises(FitError, match="output_of="):
        default_output_of(torch.tensor([1]))


def test_a_batch_whose_half_does_not_run_stays_whole() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return adjacency @ self.fc(x)  # type: ignore[no-any-return]

    batch = (torch.randn(64, 4), torch.eye(64))
    assert set(output_metrics(Graph(), ["fc"], [batch], inputs_of=lambda b: b)) == {"fc"}

"""A method inside Lightning's Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shallower as sh
from shallower.errors import MethodError

pytest.importorskip("lightning")
warnings.filterwarnings("ignore", module="lightning")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402

from shallower.integrations.lightning import ShallowerCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


class Module(LightningModule):  # type: ignore[misc]
    """Classifies rows of six numbers."""

    def __init__(self, weight_decay_everywhere: bool = False) -> None:
        super().__init__()
        self.net = make_net()
        self.method = sh.LayerCollapse(self.net, sh.find_sites(self.net, torch.randn(2, 6)))
        self.everywhere = weight_decay_everywhere
        self.logged: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        if self.everywhere:
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return torch.optim.AdamW(self.method.param_groups(weight_decay=0.1), lr=1e-2)


def fit(module: Module, directory: Path, callback: Any, **options: Any) -> Trainer:
    torch.manual_seed(1)
    x = torch.randn(64, 6)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    where = {"accelerator": "cpu", "default_root_dir": directory}
    trainer = Trainer(max_epochs=2, callbacks=[callback], **where, **quiet, **options)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_ends_with_a_directory_that_loads(tmp_path: Path, accumulate: int) -> None:
    module = Module()
    callback = ShallowerCallback(module.method, directory=tmp_path / "small")
    trainer = fit(module, tmp_path, callback, accumulate_grad_batches=accumulate)
    small = sh.load(tmp_path / "small", model=make_net())
    x = torch.randn(5, 6)
    torch.testing.assert_close(small(x), callback.result(x))
    assert sum(p.numel() for p in small.parameters()) == 6 * 3 + 3
    assert float(trainer.callback_metrics["shallower/slope"]) == 1


def test_weight_decay_on_slopes_is_refused(tmp_path: Path) -> None:
    module = Module(weight_decay_everywhere=True)
    with pytest.raises(MethodError, match="param_groups"):
        fit(module, tmp_path, ShallowerCallback(module.method))

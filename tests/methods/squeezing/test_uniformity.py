"""Equal widths: what comes of them is a model of the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from shallower.finding.kinds import find_sites
from shallower.methods.squeezing.squeeze import narrowable, squeeze
from shallower.methods.squeezing.uniformity import UniformWarning, only_expressible
from shallower.saving.checkpoint import save
from shallower.surgery.applying import apply

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT: dict[str, Any] = {"vocab_size": 99, "max_position_embeddings": 32, **SIZES}
STOCK: dict[str, tuple[Any, Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**TEXT)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**TEXT)),
    "vit": (ViTForImageClassification, ViTConfig(image_size=8, patch_size=4, **SIZES)),
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(32, 3, 8, 8)}
    return {"input_ids": torch.randint(5, 99, (32, 12)), "attention_mask": torch.ones(32, 12, dtype=torch.int64)}


@pytest.mark.filterwarnings("ignore::shallower.methods.squeezing.uniformity.UniformWarning")
@pytest.mark.parametrize("name", STOCK)
def test_the_stock_class_loads_what_all_sites_were_squeezed_to(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture, config = STOCK[name]
    model, x = architecture(config).eval(), inputs(name)
    plan = squeeze(model, find_sites(model, x), [x], "params:85%", uniform=True)
    small = apply(model, plan, x)
    save(small, tmp_path / "small")
    again = architecture.from_pretrained(tmp_path / "small").eval()
    assert again.config.intermediate_size < 64
    with torch.no_grad():
        torch.testing.assert_close(again(**x).logits, small(**x).logits)


def test_sites_that_the_config_does_not_express_are_named() -> None:
    architecture, config = STOCK["bert"]
    model, x = architecture(config).eval(), inputs("bert")
    with pytest.warns(UniformWarning, match="pooler"):
        chosen = only_expressible(model, narrowable(find_sites(model, x)))
    assert all("layer" in name for name in chosen.names)
    assert "pooler" in "".join(chosen.skipped)


def test_where_no_width_can_be_expressed_a_warning_says_so() -> None:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=3, image_size=8, patch_size=4
    )
    model, x = Dinov2Model(config).eval(), inputs("vit")
    sites = narrowable(find_sites(model, x))
    with pytest.warns(UniformWarning, match="no stock class"):
        assert only_expressible(model, sites).names == sites.names


def test_a_model_without_a_config_keeps_all_its_sites() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    sites = find_sites(model, torch.zeros(2, 4))
    assert only_expressible(model, sites).names == sites.names

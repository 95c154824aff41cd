"""When a result is a stock model of Transformers, and when it only looks like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shallower as sh
from shallower.app.report.card import write_card
from shallower.app.report.page import write_report
from shallower.app.report.stock import stock_class
from tests.app.report.test_page import saved

transformers = pytest.importorskip("transformers")


def bert(**changes: Any) -> Any:
    """Three layers without a pooler; a value of the config is a width that the tests ask for."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=32, **{**sizes, **changes})
    torch.manual_seed(0)
    return transformers.BertForTokenClassification(config).eval()


def narrowed(directory: Path, layers: int, width: int = 32) -> Path:
    """The first layers of the model narrowed to that width, and saved."""
    model, ids = bert(), torch.arange(10).view(2, 5)
    example = {"input_ids": ids}
    sites = sh.find_sites(model, example)
    plan = sh.Plan(tuple(sh.Entry.narrow(site, torch.arange(width)) for site in list(sites)[:layers]))
    sh.save(sh.apply(model, plan, example), directory)
    return directory


def test_equally_narrower_everywhere_is_stock_and_loads_so(tmp_path: Path) -> None:
    directory = saved(narrowed(tmp_path / "small", 3), curve=False)
    assert stock_class(directory) == ("BertForTokenClassification", "")
    assert "BertForTokenClassification.from_pretrained(" in write_report(directory).read_text()
    assert write_card(directory).read_text().startswith("---\nlibrary_name: transformers\n")
    model = transformers.BertForTokenClassification.from_pretrained(directory)
    assert model.config.intermediate_size == 32


def test_one_narrower_layer_is_not_though_its_width_is_some_value_of_the_config(tmp_path: Path) -> None:
    directory = saved(narrowed(tmp_path / "small", 1), curve=False)
    name, reason = stock_class(directory)
    assert name == ""
    assert "layer" in reason
    assert "BertForTokenClassification.from_pretrained(" not in write_report(directory).read_text()
    card = write_card(directory).read_text()
    assert card.startswith("---\nlibrary_name: shallower\n")
    assert "Transformers alone does not load it" in card


def test_a_layer_without_its_activation_is_not_though_all_shapes_are(tmp_path: Path) -> None:
    model, example = bert(), {"input_ids": torch.arange(10).view(2, 5)}
    sites = sh.find_sites(model, example)
    plan = sh.Plan.collapse(sites.select("*0*"))
    sh.save(sh.apply(model, plan, example), tmp_path / "small")
    assert stock_class(tmp_path / "small")[0] == ""


def test_of_other_directories_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert stock_class(tmp_path) == ("", "")
    sh.save(torch.nn.Linear(2, 2), tmp_path / "out")
    assert stock_class(tmp_path / "out") == ("", "")

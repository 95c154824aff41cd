"""The README.md that lies in a saved directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.app.report.card import write_card
from tests.app.report.test_page import CERTIFICATE, saved


def test_a_result_gets_a_card_with_its_numbers(tmp_path: Path) -> None:
    text = write_card(saved(tmp_path), at="small").read_text()
    assert text.startswith("---\nlibrary_name: shallower\n")
    assert "| accuracy | 90.00 % | 88.00 % |" in text
    assert "| parameters | 1K | 600 |" in text
    assert "`models/tiny-bert` made smaller by calibrated squeezing" in text
    assert "Measured on 300 test rows" in text
    assert "sh.load('small'" in text


def test_a_certificate_stands_under_the_numbers(tmp_path: Path) -> None:
    text = write_card(saved(tmp_path, certificate=CERTIFICATE)).read_text()
    assert "Of 300 rows 4 get another answer than from the original: 1.33 %, and with 95% confidence" in text
    assert text.index("Of 300 rows") < text.index("## How to load it")
    assert "Both models on 300 test rows" in text


def test_the_base_model_is_named_as_the_hub_does(tmp_path: Path) -> None:
    assert 'base_model: "models/tiny-bert"' in write_card(saved(tmp_path)).read_text()


def test_a_local_folder_is_no_base_model(tmp_path: Path) -> None:
    options = {"model": str(tmp_path), "method": "squeeze"}
    assert "base_model" not in write_card(saved(tmp_path, options=options)).read_text()


def test_the_code_of_a_card_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    sh.save(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "out" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names = {"make_model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))}
    exec(code, names)
    x = torch.randn(3, 4)
    torch.testing.assert_close(names["model"](x), model(x))  # type: ignore[operator]

"""Sources and configs that ask for too much, or for something from elsewhere: refused soon, small, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shallower as sh
from shallower.app.models import load_model
from tests.attacks.harness import outcome
from tests.attacks.models import bert, detr, distilbert, gemma3, jamba, qwen2, swin, whisper


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], nn.Module]], Path]:
    """A directory with the model that a function makes, saved once."""
    folder = tmp_path_factory.mktemp("saved")

    def of(make: Callable[[], nn.Module]) -> Path:
        directory = folder / make.__name__
        if not directory.exists():
            torch.manual_seed(0)
            sh.save(make().eval(), directory)
        return directory

    return of


def attack(directory: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    copied = Path(shutil.copytree(directory, tmp_path / "attacked"))
    change(copied)
    found = outcome(lambda: sh.load(copied))
    assert found.harmless, found
    assert found.kind == "refused", found


def config(**changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def source(text: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        path = directory / "shallower.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "source": text}))

    return change


BILLION = 10**9


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (bert, {"num_labels": BILLION}),
        (bert, {"num_hidden_layers": BILLION}),
        (bert, {"num_hidden_layers": 10**6}),
        (bert, {"hidden_size": 10**6}),
        (bert, {"max_position_embeddings": BILLION}),
        (bert, {"id2label": {"0": BILLION}, "num_labels": 10**6}),
        (qwen2, {"num_hidden_layers": BILLION}),
        (qwen2, {"layer_types": ["full_attention"] * 10**6, "num_hidden_layers": 10**6}),
        (gemma3, {"num_hidden_layers": BILLION}),
        (jamba, {"num_hidden_layers": BILLION}),
        (jamba, {"num_experts": 10**6}),
        (swin, {"depths": [BILLION]}),
        (swin, {"depths": [10**6]}),
        (swin, {"window_size": 10**6, "image_size": 10**6}),
        (whisper, {"max_source_positions": 2**26}),
        (whisper, {"max_source_positions": 2**20}),
        (distilbert, {"max_position_embeddings": 2**20, "dim": 1024}),
        (detr, {"num_queries": 2**40}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:60]),
)
def test_a_config_that_asks_for_a_billion(
    make: Callable[[], nn.Module], changes: dict[str, Any], saved: Any, tmp_path: Path
) -> None:
    attack(saved(make), tmp_path, config(**changes))


TIMM = {"model_type": "timm_backbone", "backbone": "hf_hub:evil/net", "use_pretrained_backbone": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "evil/net", "backbone_config": None},
        {"backbone": "evil", "backbone_config": None, "use_timm_backbone": False},
        {"backbone": "resnet18", "backbone_config": None, "use_timm_backbone": True, "use_pretrained_backbone": True},
        {"backbone_config": TIMM},
        {"backbone_config": {**TIMM, "backbone": "hf-hub:evil/net"}},
        {"backbone_config": {**TIMM, "backbone": "local-dir:/tmp"}},
        {"backbone_config": {"model_type": "timm_wrapper", "architecture": "hf_hub:evil/net"}},
        {"backbone_config": {"model_type": "evil/net"}},
        {"_name_or_path": "evil/net", "auto_map": {"AutoModel": "evil/net--code.Model"}, "d_model": 8},
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:60]),
)
def test_a_config_that_names_something_from_elsewhere(changes: dict[str, Any], saved: Any, tmp_path: Path) -> None:
    attack(saved(detr), tmp_path, config(**changes))


@pytest.mark.parametrize(
    "text",
    [
        "timm:test_vit?depth=1000000000",
        "timm:test_vit?depth=10000",
        "timm:test_vit?img_size=1000000",
        "timm:test_vit?num_classes=1000000000000",
        "timm:test_vit?embed_dim=1000000",
        "timm:swin_tiny_patch4_window7_224?window_size=100000",
        "timm:hf_hub:evil/net",
        "torchvision:regnet_y_400mf?num_classes=1000000",
        "torchvision:vit_b_16?num_layers=1000000",
        "torchvision:densenet121?growth_rate=1000000",
        "torchvision:resnet18?num_classes=1000000000",
        "transformers:BertModel?attention__encoder=sdpa&experts=someone/kernel",
        "transformers:BertModel?attention=flash_attention_2",
    ],
)
def test_a_source_that_asks_for_too_much(text: str, saved: Any, tmp_path: Path) -> None:
    attack(saved(bert), tmp_path, source(text))


def test_wraps_within_wraps(saved: Any, tmp_path: Path) -> None:
    slope = {"edit": "slope", "width": 0, "family": "blend", "target": "identity", "channels_first": False}
    place = "bert.encoder.layer.0.intermediate.intermediate_act_fn"

    def nest(deeper: bool) -> Callable[[Path], None]:
        def change(directory: Path) -> None:
            path = directory / "shallower.json"
            data = json.loads(path.read_text())
            names = [place + ".f" * i * deeper for i in range(900)]
            data["edits"] = [{**slope, "name": name, "dtype": "float32"} for name in names]
            path.write_text(json.dumps(data))

        return change

    attack(saved(bert), tmp_path / "a", nest(False))
    attack(saved(bert), tmp_path / "b", nest(True))


def test_wide_slopes_at_many_places(saved: Any, tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        path = directory / "shallower.json"
        data = json.loads(path.read_text())
        slope = {"family": "blend", "target": "identity", "channels_first": False, "dtype": "float64"}
        place = "bert.encoder.layer.0.intermediate.intermediate_act_fn"
        data["edits"] = [{"edit": "slope", "name": place, "width": 2**24, **slope}] * 8
        path.write_text(json.dumps(data))

    attack(saved(bert), tmp_path, change)


@pytest.mark.parametrize(
    "name",
    ["timm:test_vit?num_classes=3", "timm:vit_tiny_r_s16_p8_224?num_classes=2", "torchvision:regnet_y_400mf"],
)
def test_honest_sources_of_difficult_constructors_are_within_the_limits(name: str, tmp_path: Path) -> None:
    made = load_model(name, pretrained=False)
    sh.save(made.model, tmp_path / "out", source=made.source)
    loaded = sh.load(tmp_path / "out")
    images = made.make_example_inputs()
    with torch.no_grad():
        assert torch.equal(loaded(images), made.model(images))

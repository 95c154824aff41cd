"""Exact parameter counts of collapsed models, on the meta device (LayerCollapse, arXiv 2311.17943, and its release)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision.models as tv
import transformers as hf
from torch import nn

from shallower.core.inputs import Inputs
from shallower.finding.kinds import find_sites
from shallower.planning.plan import Plan
from shallower.sites import Site
from shallower.surgery.applying import apply
from tests.networks import params


@dataclass(frozen=True)
class Count:
    """A model, which of its sites are collapsed, and its parameters before and after."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    chosen: Callable[[Site], bool]
    sites: int
    before: int
    after: int


def picture(size: int = 224) -> torch.Tensor:
    return torch.randn(1, 3, size, size)


def words() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(1, 8, dtype=torch.long)}


def in_layers(*layers: str) -> Callable[[Site], bool]:
    """The feed-forward sites whose names have one of these parts."""
    return lambda site: site.kind == "feed-forward" and any(f".{layer}." in f".{site.name}." for layer in layers)


def in_head(site: Site) -> bool:
    return site.producer is not None and site.producer.name.startswith("classifier")


def bert(layers: int, width: int, heads: int) -> nn.Module:
    config = hf.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_labels=2,
    )
    return hf.BertForSequenceClassification(config)


def vgg16_with_head_of_512() -> nn.Module:
    model = tv.vgg16_bn(num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(512, 4096)
    return model


COUNTS = (
    Count(
        "ViT-B/16, the last MLP",
        tv.vit_b_16,
        picture,
        in_layers("encoder_layer_11"),
        1,
        86_567_656,
        82_435_816,
    ),
    Count(
        "BERT-base, the last four feed-forward blocks",
        lambda: bert(12, 768, 12),
        words,
        in_layers("layer.8", "layer.9", "layer.10", "layer.11"),
        4,
        109_483_778,
        92_956_418,
    ),
    Count(
        "BERT-large, the last four feed-forward blocks",
        lambda: bert(24, 1024, 16),
        words,
        in_layers("layer.20", "layer.21", "layer.22", "layer.23"),
        4,
        335_143_938,
        305_767_426,
    ),
    Count(
        "Mixer-B/16, the last two blocks",
        lambda: timm.create_model("mixer_b16_224"),
        picture,
        in_layers("blocks.10", "blocks.11"),
        4,
        59_880_472,
        51_391_800,
    ),
    Count("VGG11-bn, both of its head", tv.vgg11_bn, picture, in_head, 2, 132_868_840, 34_314_984),
    Count(
        "GPT-2, one MLP",
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config()),
        words,
        in_layers("h.6"),
        1,
        124_439_808,
        120_307_968,
    ),
    Count(
        "VGG16-bn, both of its head of 512",
        vgg16_with_head_of_512,
        lambda: picture(32),
        in_head,
        2,
        33_646_666,
        14_728_266,
    ),
    Count(
        "VGG16-bn, both of its head of 25088",
        lambda: tv.vgg16_bn(num_classes=10),
        picture,
        in_head,
        2,
        134_309_962,
        14_974_026,
    ),
)


@pytest.mark.parametrize("count", COUNTS, ids=lambda count: count.name)
def test_the_collapsed_model_has_exactly_the_papers_parameters(count: Count) -> None:
    with torch.device("meta"):
        model, inputs = count.make().eval(), count.inputs()
    sites = find_sites(model, inputs)
    chosen = sites.select(count.chosen)
    plan = Plan.collapse(chosen)
    small = apply(model, plan, inputs)
    assert len(chosen) == count.sites
    assert sites.params == params(model) == count.before
    assert params(small) == count.after
    assert all(parameter.is_meta for parameter in small.parameters())

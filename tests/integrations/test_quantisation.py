"""Results go through int8 quantisation like any model."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import shallower as sh


def size(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


@pytest.mark.filterwarnings("ignore")  # PyTorch has deprecated what most people still use
def test_a_squeezed_network_is_quantised_to_a_quarter_and_answers_nearly_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    x = torch.randn(200, 64)
    first, second = sh.find_sites(model, x)
    plan = sh.Plan((sh.Entry.narrow(first, torch.arange(256)), sh.Entry.collapse(second)))
    small = sh.apply(model, plan, x)
    quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
    assert size(small) < 0.4 * size(model)
    assert size(quantised) < 0.4 * size(small)
    answers, dense = quantised(x), small(x)
    assert float((answers - dense).norm() / dense.norm()) < 0.05
    assert float((answers.argmax(1) == dense.argmax(1)).float().mean()) > 0.95

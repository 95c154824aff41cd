"""What modules read and return is seen however they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.core.watching import read, recorded, watching
from shallower.errors import SiteError


class Keyword(nn.Module):
    """Calls its layer by keyword, several times or never."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.fc, self.times = nn.Linear(2, 2), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.fc(input=x)
            x.add_(1)
        return x


@pytest.mark.parametrize("times", [0, 1, 3])
def test_each_call_by_keyword_is_recorded(times: int) -> None:
    model, x = Keyword(times), torch.randn(4, 2)
    with recorded(model, ["fc"]) as seen, torch.no_grad():
        model(x)
    assert len(seen.inputs["fc"]) == len(seen.outputs["fc"]) == times
    for read_, returned in zip(seen.inputs["fc"], seen.outputs["fc"], strict=True):
        # in-place operations behind the layer do not reach what was recorded
        assert torch.equal(model.fc(read_), returned)
    assert not model.fc._forward_hooks
    assert not model.fc._forward_pre_hooks


def test_a_layer_may_see_no_rows() -> None:
    model = Keyword(1)
    with recorded(model, ["fc"], outputs=False) as seen:
        model(torch.zeros(0, 2))
    assert seen.inputs["fc"][0].shape == (0, 2)
    assert not seen.outputs


def test_outputs_keep_their_structure() -> None:
    lstm = nn.Sequential(nn.LSTM(2, 3))
    with recorded(lstm, ["0"], inputs=False, keep=lambda t: tuple(t.shape)) as seen:
        lstm(torch.zeros(5, 2))
    assert seen.outputs["0"] == [((5, 3), ((1, 3), (1, 3)))]
    seen.clear()
    assert seen.outputs["0"] == []


def test_arguments_and_outputs_can_be_exchanged() -> None:
    layer = nn.Linear(2, 2)

    def double(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return (), {"input": 2 * read(args, kwargs)}

    with watching({3: layer}, before={3: double}, after={3: lambda _m, _a, _k, output: -output}), torch.no_grad():
        assert torch.equal(layer(torch.ones(2)), -layer.forward(2 * torch.ones(2)))


def test_a_missing_module_and_a_missing_tensor_are_errors() -> None:
    with pytest.raises(SiteError, match="no module 'gone'"), recorded(nn.Linear(2, 2), ["gone"]):
        pass
    with pytest.raises(SiteError, match="without a tensor"):
        read((), {"x": 3})

"""However parts were put together after surgery, what is saved loads again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shallower as sh
from tests import networks

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
halved = partial(networks.halved, x=X)


def net(classes: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, classes))


def whole() -> nn.Sequential:
    return nn.Sequential(net(), nn.ReLU(), nn.Linear(8, 3))


class Adapter(nn.Module):
    """A low-rank addition to a layer."""

    def __init__(self, base: nn.Module, d_in: int = 16, d_out: int = 32) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(d_in, 2), nn.Linear(2, d_out)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.up(self.down(x))


def part_put_in() -> tuple[nn.Module, nn.Module]:
    model = whole()
    model[0] = halved(model[0])
    return model, whole()


def part_taken_out() -> tuple[nn.Module, nn.Module]:
    return halved(whole()).get_submodule("0"), net()


def part_put_in_and_squeezed_again() -> tuple[nn.Module, nn.Module]:
    model = whole()
    model[0] = halved(model[0])
    return halved(model), whole()


def compiled_before() -> tuple[nn.Module, nn.Module]:
    return halved(torch.compile(net(), backend="eager")), net()  # type: ignore[arg-type]


def compiled_after() -> tuple[nn.Module, nn.Module]:
    return torch.compile(halved(net()), backend="eager"), net()  # type: ignore[return-value]


def part_compiled() -> tuple[nn.Module, nn.Module]:
    model = halved(whole())
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[operator,index]
    return model, whole()


def adapted() -> tuple[nn.Module, nn.Module]:
    model, fresh = halved(net()), net()
    model.set_submodule("0", Adapter(model.get_submodule("0")))
    fresh[0] = Adapter(fresh[0])
    return model, fresh


def new_last_layer() -> tuple[nn.Module, nn.Module]:
    model = halved(net())
    model.set_submodule("2", nn.Linear(32, 5))
    return model, net()


def new_last_layer_in_both() -> tuple[nn.Module, nn.Module]:
    return new_last_layer()[0], net(classes=5)


def new_head_of_another_kind() -> tuple[nn.Module, nn.Module]:
    model, fresh = halved(net()), net()
    model.set_submodule("2", nn.Sequential(nn.Linear(32, 4), nn.Tanh()))
    fresh[2] = nn.Sequential(nn.Linear(32, 4), nn.Tanh())
    return model, fresh


@pytest.mark.parametrize(
    "make",
    [
        part_put_in,
        part_taken_out,
        part_put_in_and_squeezed_again,
        compiled_before,
        compiled_after,
        part_compiled,
        adapted,
        new_last_layer,
        new_last_layer_in_both,
        new_head_of_another_kind,
    ],
    ids=lambda make: make.__name__,
)
def test_a_model_composed_after_surgery_is_saved_and_loaded(
    make: Callable[[], tuple[nn.Module, nn.Module]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, fresh = make()
    sh.save(model, tmp_path / "out")
    loaded = sh.load(tmp_path / "out", model=fresh)
    with torch.no_grad():
        assert torch.equal(loaded(X), model.eval()(X))


def test_a_squeezed_encoder_within_a_model_of_the_library_loads_by_its_source(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    ids = {"input_ids": torch.arange(3, 23).view(2, 10)}
    encoder = model.bert
    sites = sh.find_sites(encoder, ids).select("*layer.0*")
    model.bert = sh.apply(encoder, sh.Plan.collapse(sites), ids)
    sh.save(model, tmp_path / "out")
    loaded: Any = sh.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, model(**ids).logits)

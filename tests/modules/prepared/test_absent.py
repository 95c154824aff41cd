"""What stands in the place of a branch that is gone."""

from __future__ import annotations

import torch
from torch import nn

from shallower.modules.edits import edits, perform, replay
from shallower.modules.prepared.absent import Absent, PassedOn, Zeros


def test_zeros_have_the_sizes_that_the_module_gave() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert torch.equal(Zeros()(mask=None, hidden=x), torch.zeros_like(x))
    for stride in (1, 2, 3):
        conv = nn.Conv2d(3, 4, 3, stride=stride, padding=1)
        assert Zeros(channels=4, stride=stride)(x).shape == conv(x.float()).shape
    zeros, *others = Zeros(returns=3)(x)
    assert others == [None, None]
    assert not zeros.any()


def test_a_layer_passes_on_what_it_reads() -> None:
    x = torch.randn(2, 3)
    assert PassedOn()(x) is x
    assert PassedOn(returns=2)(hidden=x) == (x, None)


class Cache:
    """A KV cache that says what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> None:
        self.given.append((tuple(keys.shape), tuple(values.shape), layer))

    def get_seq_length(self) -> int:
        return 0


def test_a_cache_is_given_one_number_for_each_token() -> None:
    x, cache = torch.randn(2, 5, 8), Cache()
    Zeros(cache=3)(x, past=cache)
    PassedOn(cache=4)(x, past=cache)
    Zeros()(x, past=cache)
    assert cache.given == [((2, 1, 5, 1), (2, 1, 5, 0), 3), ((2, 1, 5, 1), (2, 1, 5, 0), 4)]


def test_what_others_read_of_a_module_stays() -> None:
    model = nn.Sequential(nn.LayerNorm(3, eps=0.5, dtype=torch.float64), nn.Linear(3, 3, bias=False))
    model[1].attention_type = "full"
    for name in ("0", "1"):
        perform(model, Absent(name))
    assert (model[0].eps, model[0].weight.dtype) == (0.5, torch.float64)
    assert (model[1].attention_type, model[1].in_features, model[1].bias) == ("full", 3, None)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == 0
    assert not model.state_dict()


def test_encoders_call_what_stands_in_place_of_a_layer() -> None:
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for names in (("layers.0.self_attn",), ("layers.0.linear1", "layers.0.linear2"), ("layers.1.norm1",)):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        for name in names:
            perform(model, Absent(name))
        with torch.no_grad():
            assert model(x, src_key_padding_mask=padding).isfinite().all()


def test_the_edit_is_recorded_and_replayed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    perform(model, Absent("0", channels=2, stride=2))
    perform(model, Absent("1", passes=True))
    fresh = replay(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), edits(model))
    assert (fresh[0].channels, fresh[0].stride) == (2, 2)
    assert isinstance(fresh[1], PassedOn)
    assert not model[0].training

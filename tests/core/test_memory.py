"""Batches in pieces, and what a backward pass keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shallower.calibrating.fisher import output_metrics
from shallower.core.memory import free_bytes, give_back, halves, in_pieces, total_bytes


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 2))


@pytest.mark.parametrize(
    ("batch", "lengths"),
    [
        (torch.randn(5, 3), [2, 3]),
        ({"ids": torch.ones(4, 7), "mask": torch.ones(4, 7)}, [2, 2]),
        ((torch.ones(6, 2), torch.ones(6)), [3, 3]),
        (torch.randn(1, 3), [1]),
        ({"ids": torch.ones(4, 7), "scale": torch.ones(())}, [4]),
    ],
)
def test_a_batch_is_halved_where_all_its_tensors_are_of_one_length(batch: Any, lengths: list[int]) -> None:
    def length(part: Any) -> int:
        return len(part) if isinstance(part, Tensor) else len(next(iter(part.values() if type(part) is dict else part)))

    assert [length(part) for part in halves(batch)] == lengths


@pytest.mark.parametrize("room", [0, 1 << 12, 1 << 30])
def test_every_sample_gets_its_backward_pass_once(room: int) -> None:
    network = model()
    batches = [torch.randn(n, 4) for n in (3, 8, 16)]
    sizes = []

    def step(batch: Tensor) -> None:
        network(batch).square().sum().backward()
        sizes.append(len(batch))

    in_pieces(batches, network, room, step)
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network(torch.cat(batches)).square().sum().backward()
    assert sum(sizes) == 27
    for one, p in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_pieces_are_small_enough() -> None:
    network, sizes = model(), []
    one = 4 * (4 + 64 + 64)
    in_pieces([torch.randn(32, 4)], network, 9 * one, lambda x: (network(x).sum().backward(), sizes.append(len(x)))[1])
    assert sizes == [8, 8, 8, 8]


def test_the_sensitivity_of_a_layer_does_not_depend_on_the_size_of_batches() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.Linear(4, 3)).double()
    data = torch.randn(8000, 6, dtype=torch.float64)
    whole, split = (output_metrics(network, ["0"], list(torch.split(data, n)))["0"] for n in (4000, 100))
    torch.testing.assert_close(whole.zz, split.zz, rtol=0.1, atol=0.05)


def test_memory_can_be_given_back_anywhere() -> None:
    give_back()


def test_what_is_free_is_part_of_what_there_is() -> None:
    assert 0 <= free_bytes() <= total_bytes()

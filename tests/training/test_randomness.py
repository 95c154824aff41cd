"""A training seeds its own random numbers and gives the process its own back."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from shallower.training.randomness import generators, kept, seed, seed_order, set_state, state

CPU = torch.device("cpu")


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_afterwards_every_generator_continues_where_it_was() -> None:
    seed(1, CPU)
    expected = drawn()
    seed(1, CPU)
    with kept(CPU):
        seed(2, CPU)
        other = drawn()
    assert drawn() == expected
    assert other != expected


def test_it_is_put_back_after_an_error_too() -> None:
    seed(1, CPU)
    expected = drawn()
    seed(1, CPU)
    try:
        with kept(CPU):
            seed(2, CPU)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert drawn() == expected


def test_a_loaders_generator_and_epoch_are_put_back() -> None:
    data = TensorDataset(torch.arange(8))
    sampler: DistributedSampler[int] = DistributedSampler(data, num_replicas=1, rank=0)  # type: ignore[arg-type]
    for loader in (
        DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(3)),
        DataLoader(data, sampler=sampler),
    ):
        before = [g.get_state() for g in generators(loader)]
        with kept(CPU, loader):
            seed_order(loader, 5, epoch=4)
            list(loader)
        assert all(torch.equal(g.get_state(), s) for g, s in zip(generators(loader), before, strict=True))
    assert sampler.epoch == 0


def test_the_order_of_an_epoch_depends_on_its_number_alone() -> None:
    def order(number: int) -> list[int]:
        loader = DataLoader(TensorDataset(torch.arange(32)), shuffle=True, generator=torch.Generator())
        seed_order(loader, number, epoch=0)
        return [int(row) for (row,) in loader]

    assert order(7) == order(7)
    assert order(7) != order(8)


def test_a_state_is_plain_data_that_brings_the_numbers_back() -> None:
    found = state(CPU)
    expected = drawn()
    set_state(found, CPU)
    assert drawn() == expected

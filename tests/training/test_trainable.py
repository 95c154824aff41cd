"""The protocol between methods and training loops, and its neutral answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shallower.errors import MethodError
from shallower.training.trainable import Trainable


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_matrices_decay_and_vectors_do_not() -> None:
    decayed, plain = Trainable(network()).param_groups(weight_decay=0.1)
    assert [p.dim() for p in decayed["params"]] == [2, 2]
    assert [p.dim() for p in plain["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = network().requires_grad_(False)
    assert Trainable(model).param_groups() == []
    model[0].weight.requires_grad_(True)
    (group,) = Trainable(model).param_groups()
    assert group["params"][0] is model[0].weight


def test_by_default_nothing_is_added() -> None:
    method = Trainable(network())
    method.schedule(10)
    method.before_step()
    method.after_step()
    method.load_state_dict(method.state_dict())
    assert float(method.penalty()) == 0
    assert float(method.loss(lambda: torch.tensor(3.0))) == 3
    assert method.metrics() == {}
    assert method.undecayed() == []


def stepped(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def test_the_rate_is_that_of_the_followed_optimizers_last_step() -> None:
    model = network()
    method = Trainable(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    method.follow(optimizer)
    stepped(optimizer)
    scheduler.step()
    assert method.rate(None) == 0.5
    assert method.rate(0.25) == 0.25
    stepped(optimizer)
    assert method.rate(None) == pytest.approx(0.05)


def test_without_an_optimizer_to_follow_the_rate_is_asked_for() -> None:
    model = network()
    method = Trainable(model)
    with pytest.raises(MethodError, match=r"method\.follow\(optimizer\)"):
        method.rate(None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method.follow(optimizer)
    stepped(optimizer)
    method.unfollow()
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(MethodError):
        method.rate(None)

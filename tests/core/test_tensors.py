"""What a tensor holds."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from shallower.core.tensors import are_finite, content, has_no_numbers, nbytes_of


def test_meta_and_fake_tensors_hold_no_numbers() -> None:
    with FakeTensorMode():
        assert has_no_numbers(torch.zeros(2))
    assert has_no_numbers(torch.zeros(2, device="meta"))
    assert not has_no_numbers(torch.zeros(2))


def test_tensors_are_finite_where_all_their_numbers_are() -> None:
    assert are_finite([])
    assert are_finite([torch.zeros(0), torch.arange(3)])
    assert not are_finite([torch.zeros(2), torch.tensor([0.0, torch.nan])])
    assert not are_finite([torch.tensor(torch.inf), torch.zeros(2)])


def test_the_content_does_not_depend_on_the_layout() -> None:
    tensor = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert bytes(content(tensor)) == bytes(content(tensor.to(memory_format=torch.channels_last)))
    assert bytes(content(tensor)) != bytes(content(tensor.transpose(2, 3)))
    assert len(content(torch.zeros(3, dtype=torch.bfloat16))) == 6
    assert len(content(torch.zeros(0))) == 0


def test_bytes_are_those_of_the_numbers_in_their_types() -> None:
    assert nbytes_of([torch.zeros(3, 2), torch.zeros(5, dtype=torch.bool), torch.zeros(0)]) == 24 + 5
    assert nbytes_of([torch.zeros(1).expand(4)]) == 16

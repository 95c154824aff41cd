"""Nested batches of any kind are entered, changed and cut, and keep their type."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shallower.core.trees import cloned, cut, doubled, mapped, rows_of, tensors, to_device

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Output:
    logits: Tensor
    name: str = ""


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x, self.nodes = x, 3
        self.others: list[Graph] = []


A, B = torch.ones(4, 2), torch.zeros(4)

KINDS = {
    "tuple": (A, B),
    "list": [A, B],
    "dict": {"a": A, "b": B},
    "ordered": OrderedDict(a=A, b=B),
    "named": Pair(A, B),
    "user": UserDict(a=A, b=B),
    "proxy": MappingProxyType({"a": A, "b": B}),
    "dataclass": (Output(A, "x"), Output(B)),
    "object": [Graph(A), Graph(B)],
    "returned": [torch.return_types.max((A, B))],
    "nested": {"a": [(A, None), "text"], "b": {"c": B, "d": torch.Size([3])}},
}


@pytest.mark.parametrize("tree", KINDS.values(), ids=KINDS)
def test_tensors_in_any_kind_are_found_in_order(tree: Any) -> None:
    found = list(tensors(tree))
    assert [a is b for a, b in zip(found, (A, B), strict=True)] == [True, True]


@pytest.mark.parametrize("tree", KINDS.values(), ids=KINDS)
def test_a_changed_tree_keeps_its_type_and_the_old_one_its_tensors(tree: Any) -> None:
    changed = mapped(lambda t: t + 1, tree)
    assert type(changed) is type(tree)
    assert [t.sum().item() for t in tensors(changed)] == [16, 4]
    assert [t.sum().item() for t in tensors(tree)] == [8, 0]


@pytest.mark.parametrize("tree", KINDS.values(), ids=KINDS)
def test_rows_are_counted_and_cut(tree: Any) -> None:
    assert rows_of(tree) == 4
    assert rows_of(cut(tree, slice(1, 3))) == 2


def test_outputs_of_transformers_stay_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    output = outputs.BaseModelOutput(last_hidden_state=A, hidden_states=(B, B))
    changed = mapped(lambda t: t + 1, output)
    assert type(changed) is type(output)
    assert changed.last_hidden_state is changed["last_hidden_state"]
    assert changed.hidden_states[1].sum() == 4


def test_what_holds_no_tensor_stays_the_very_object() -> None:
    for tree in (None, "text", 3, ["a", 1], {"a": None}, nn.Linear(2, 2), lambda: 0, Pair(1, 2)):
        assert mapped(lambda t: t + 1, tree) is tree


def test_objects_that_hold_each_other_end() -> None:
    first, second = Graph(A), Graph(B)
    first.others, second.others = [second], [first]
    assert len(list(tensors([first]))) == 2
    assert len(list(tensors(mapped(lambda t: t + 1, first)))) >= 2


@pytest.mark.parametrize(
    "tree",
    [None, [], (A, torch.zeros(3)), (A, torch.tensor(1.0)), torch.eye(3).to_sparse(), "text"],
    ids=["none", "empty", "differ", "number", "sparse", "text"],
)
def test_what_has_no_common_rows_has_none(tree: Any) -> None:
    assert rows_of(tree) is None


def test_double_precision_leaves_whole_numbers_alone() -> None:
    tree = (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.complex64))
    assert [t.dtype for t in doubled(tree)] == [torch.float64, torch.int32, torch.complex128]


def test_a_clone_shares_no_memory_and_has_no_history() -> None:
    x = torch.ones(3, requires_grad=True)
    (copy,) = cloned((x * 2,))
    assert not copy.requires_grad
    copy.zero_()
    assert x.sum() == 3


def test_every_tensor_moves() -> None:
    assert {t.device.type for t in tensors(to_device({"a": [A], "b": (B, 1)}, "meta"))} == {"meta"}


TREES = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3), st.builds(torch.ones, st.integers(1, 3))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@given(TREES)
def test_mapping_is_the_same_as_changing_each_tensor(tree: Any) -> None:
    assert [t.tolist() for t in tensors(mapped(lambda t: t * 3, tree))] == [(t * 3).tolist() for t in tensors(tree)]

"""Some calls of a forward as a module of their own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from shallower.errors import Refusal
from shallower.modules.graphs import tensor_steps
from shallower.recording.names import canonical


@dataclass
class Region:
    """The nodes of a place in one graph, and the nodes they read from outside: one, or the two of a sum."""

    nodes: list[fx.Node]
    sources: list[fx.Node]


def region_of(graph: fx.Graph, calls: Collection[tuple[str, int]]) -> Region | Refusal:
    """The nodes of these calls, or why they cannot be one module."""
    counts: Counter[str] = Counter()
    wanted = set(calls)
    nodes: list[fx.Node] = []
    for name, node in tensor_steps(graph):
        if (name, counts[name]) in wanted:
            nodes.append(node)
        counts[name] += 1
    if len(nodes) != len(wanted):
        return Refusal("its forward does not make these calls")
    inside = set(nodes)
    sources = list(dict.fromkeys(other for node in nodes for other in node.all_input_nodes if other not in inside))
    if len(sources) != 1 and not _is_sum(nodes, sources):
        return Refusal("the operation reads more than one tensor of the forward")
    if any(user not in inside for node in nodes[:-1] for user in node.users):
        return Refusal("a tensor inside the operation is read elsewhere in the forward")
    if any(source.op == "get_attr" for source in sources):
        return Refusal("the operation reads a parameter")
    return Region(nodes, sources)


def _is_sum(nodes: Sequence[fx.Node], sources: Sequence[fx.Node]) -> bool:
    """Whether the nodes are one addition of two tensors."""
    return len(nodes) == 1 and canonical(nodes[0].target) == "add" and list(nodes[0].args) == list(sources)


class Sum(nn.Module):
    """a + b: what an addition of the forward becomes as a module."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The sum of two tensors."""
        return a + b


def module_of(owner: nn.Module, regions: Sequence[Region]) -> nn.Module | Refusal:
    """A module that does what the nodes do, in train and in eval mode."""
    train, evaluation = regions
    first = train.nodes[0]
    if len(train.nodes) == 1:
        if first.op == "call_module":
            return _of_the_same_weights(owner.get_submodule(str(first.target)))
        if len(train.sources) == 2:
            return Sum()
        name = canonical(first.target)
        if name == "dropout":
            given = {**dict(zip(("input", "p", "training", "inplace"), first.args, strict=False)), **first.kwargs}
            rate = given.get("p", 0.5)
            if given.get("training", True) is True and isinstance(rate, (int, float)):
                return nn.Dropout(float(rate))
            return Refusal("its dropout does not follow the mode of the module")
        plain = len(first.args) == 1 and not {k: v for k, v in first.kwargs.items() if k != "inplace"}
        if plain and name in STOCK:
            return STOCK[name]()
    if _listing(train) != _listing(evaluation):
        return Refusal("the operation differs between training and inference")
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {train.sources[0]: graph.placeholder("x")}
    children: dict[str, Any] = {}
    for node in train.nodes:
        if node.op == "call_module":
            children[str(node.target)] = _of_the_same_weights(owner.get_submodule(str(node.target)))
        copies[node] = graph.node_copy(node, lambda other: copies[other])
    graph.output(copies[train.nodes[-1]])
    return fx.GraphModule(children, graph, "Pointwise")


def _of_the_same_weights(module: nn.Module) -> nn.Module:
    """A copy that shares its parameters with the module: one activation that is called at several places stays one."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    return copy.deepcopy(module, memo)


def _listing(region: Region) -> list[Any]:
    """What a region computes, without the names of its nodes."""
    index = {node: i for i, node in enumerate(region.nodes)}

    def plain(value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: index.get(node, -1))

    return [(node.op, node.target, plain(node.args), plain(node.kwargs)) for node in region.nodes]


STOCK: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "log_sigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
}
"""The modules that are these functions, called without further arguments."""

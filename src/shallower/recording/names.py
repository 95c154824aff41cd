"""The names under which torch functions are known, however they are called.

canonical(torch.relu_)      # "relu"
is_metadata("size")         # True: it looks at a tensor's form only
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "rdiv": "div",
    "rtruediv": "div",
    "idiv": "div",
    "itruediv": "div",
    "multiply": "mul",
    "rmul": "mul",
    "imul": "mul",
    "radd": "add",
    "iadd": "add",
    "rsub": "sub",
    "isub": "sub",
    "subtract": "sub",
    "rpow": "pow",
    "ipow": "pow",
    "negative": "neg",
    "clip": "clamp",
    "absolute": "abs",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "expit": "sigmoid",
    "matmul": "matmul",
    "rmatmul": "matmul",
    "getitem": "getitem",
    "setitem": "setitem",
}

_INPLACE_OPERATORS = {"__imul__", "__iadd__", "__isub__", "__itruediv__", "__idiv__", "__ipow__", "__setitem__"}

_METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_floating_point", "is_complex",
    "is_contiguous", "get_device", "element_size", "data_ptr", "len", "is_inference", "is_signed", "is_pinned",
    "is_shared", "has_names", "is_same_size", "hash", "is_conj", "is_neg", "untyped_storage", "is_set_to",
    "dtype", "is_tensor", "is_nonzero_static", "broadcast_shapes", "result_type", "can_cast",
}  # fmt: skip


@lru_cache(maxsize=4096)
def canonical(function: Any) -> str:
    """The name under which a function is known, however it is called: "relu" for F.relu, torch.relu and Tensor.relu_.

    A property is "get." and its name.
    """
    if isinstance(function, str):
        name = function
    else:
        name = getattr(function, "__name__", None) or type(function).__name__
        if name == "__get__":
            return "get." + str(getattr(getattr(function, "__self__", None), "__name__", "?"))
        if name == "__set__":
            return "set." + str(getattr(getattr(function, "__self__", None), "__name__", "?"))
        if isinstance(function, torch._ops.OpOverload):
            name = str(name).split(".")[0]
    name = str(name)
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
    name = name.strip("_") or name
    return _ALIASES.get(name, name)


def is_metadata(name: str) -> bool:
    """Whether a function of this canonical name looks at a tensor's form only, where it returns no tensor."""
    return name in _METADATA or name.startswith(("get.", "set."))


def writes(function: Any, name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of this canonical name writes into its first argument."""
    raw = str(getattr(function, "__name__", ""))
    if raw in _INPLACE_OPERATORS or kwargs.get("inplace") is True:
        return True
    return raw.endswith("_") and not raw.endswith("__") and name != "requires_grad"

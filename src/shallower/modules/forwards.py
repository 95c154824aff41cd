"""Forwards on instances: ours, with some calls changed, and what somebody else has put on a module.

vars(owner)["forward"] = Forward(owner, forward_of)
foreign(module, "encoder.0")    # "encoder.0 has a forward hook, which would be lost; remove it first"
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what somebody has put on it, which another in its place would not have."""


class Forward:
    """The forward of a module with some of its calls changed, bound to the module.

    What was changed, the module records itself. A pickle holds no code: where it is read, the forward is made anew when
    it is called first.

    Args:
        owner: the module.
        make: makes the function for a module from what that records; found by its name where a pickle is read.
        function: what it made, where that is known.
    """

    __name__ = "forward"

    def __init__(
        self,
        owner: nn.Module,
        make: Callable[[nn.Module], Callable[..., Any]],
        function: Callable[..., Any] | None = None,
    ) -> None:
        self._owner, self._make, self._function = owner, make, function

    @property
    def __func__(self) -> Callable[..., Any]:
        if self._function is None:
            self._function = self._make(self._owner)
        return self._function

    @property
    def __self__(self) -> nn.Module:
        return self._owner

    def __getattr__(self, name: str) -> Any:
        """What inspect and torch.export ask of a function; of the instance alone, for the class has its own."""
        if name == "__signature__":
            return inspect.signature(types.MethodType(self.__func__, self._owner))
        if name == "__code__":
            return self.__func__.__code__
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self.__func__(self._owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        return Forward(copy.deepcopy(self._owner, memo), self._make, self._function)

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self._owner, self._make)


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether somebody else has replaced the forward on the instance."""
    return not isinstance(vars(module).get("forward", None), (Forward, types.NoneType))


def foreign(module: nn.Module, name: str = "") -> str:
    """What somebody else has put on a module, which another in its place would not have; "" where there is nothing.

    Args:
        module: any.
        name: for people; its class where "".
    """
    name = name or type(module).__name__
    for table in HOOKS:
        if getattr(module, table, None):
            return f"{name} has a {table.strip('_').replace('_', ' ')[:-1]}, which would be lost; remove it first"
    if has_foreign_forward(module):
        return f"the forward of {name} has been replaced on the instance"
    return ""

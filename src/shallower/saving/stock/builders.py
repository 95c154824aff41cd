"""Arguments with which timm or torchvision builds a model as it is after surgery, found by trying.

    call_that_builds("timm:convnext_atto", small).text   # "timm.create_model('convnext_atto', dims=[20, 40, 80, 160])"

What a builder passes to the class of its model is seen when it is called; those arguments may be given to it, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from shallower.errors import ModelError
from shallower.saving.hub import offline
from shallower.saving.sources import parse_options, timm, torchvision
from shallower.saving.stock.solving import NumberSearch, Structure, with_numbers

_BUILDERS = {"timm": (timm, "timm.create_model"), "torchvision": (torchvision, "torchvision.models.get_model")}

_MOST_BUILDS = 50


@dataclass(frozen=True)
class BuildingCall:
    """A call of a library, as code, and the model that it gives, on the meta device."""

    text: str
    model: nn.Module


def call_that_builds(source: str, small: nn.Module) -> BuildingCall | None:
    """The call of the library that builds a model with these tensors and settings; None where none was found.

        call_that_builds("timm:convnext_atto", small)

    Args:
        source: "timm:NAME?option=value" or "torchvision:NAME", of the model before surgery.
        small: after surgery, with or without numbers.
    """
    library, _, rest = source.partition(":")
    name, options = parse_options(rest)
    build, function = _BUILDERS[library]

    def built(arguments: Mapping[str, Any]) -> nn.Module | None:
        try:
            with offline(), torch.device("meta"):
                return build(name, {**options, **arguments}, False)
        except ModelError:
            return None

    plain = built({})
    if plain is None:
        return None
    given: dict[str, Any] = {}
    with _arguments_to(type(plain), given):
        built({})

    def structure(arguments: Mapping[str, Any]) -> Structure | None:
        model = built({key: value for key, value in arguments.items() if value != given[key]})
        if model is None:
            return None
        return Structure.of(model)

    search = NumberSearch(given, structure, Structure.of(small), most=_MOST_BUILDS)
    found = search.solved()
    if not search.whole(found) or search.unlike(found):
        return None
    arguments: dict[str, Any] = {}
    for key, value in with_numbers(given, found).items():
        if value != given[key]:
            arguments[key] = value
    model = built(arguments)
    if model is None:
        return None
    text = ", ".join(f"{key}={value!r}" for key, value in {**options, **arguments}.items())
    return BuildingCall(f"{function}({name!r}, {text})", model)


@contextmanager
def _arguments_to(kind: type[nn.Module], found: dict[str, Any]) -> Iterator[None]:
    """Note the plain arguments of the first call of a class meanwhile."""
    code = getattr(kind.__init__, "__code__", None)

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code and not found:
            for key in code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]:
                value = frame.f_locals.get(key)
                if isinstance(value, (int, float, tuple, list)) or value is None:
                    found[key] = value

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)

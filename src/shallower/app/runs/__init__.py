"""What each method does on the way of `shallower compress`, one file each; see `compression.MethodRun`."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING

from shallower.app.options import MethodOptions

if TYPE_CHECKING:
    from shallower.app.compression import MethodRun


def run_of(options: MethodOptions) -> MethodRun:
    """The run of the method whose options these are."""
    module, _, kind = options.home.partition(":")
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    run: MethodRun = getattr(import_module(module), kind)(**values)
    return run

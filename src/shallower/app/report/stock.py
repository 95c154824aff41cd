"""Whether a saved directory is a stock model of Transformers, which `from_pretrained` loads without this library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallower.core.codec import decode
from shallower.core.files import read_json
from shallower.errors import ReportError, ShallowerError

if TYPE_CHECKING:
    from torch import nn

_CONFIG, _DESCRIPTION = "config.json", "shallower.json"


def stock_class(directory: Path) -> tuple[str, str]:
    """The class whose `from_pretrained` loads the directory, or "" and the reason why there is none.

        name, reason = stock_class(Path("small"))

    The config is built on the meta device, and once more with the recorded surgery done to it: the class loads the
    directory where both are the same modules, and their tensors have the shapes of the files. Of a directory that is
    no Transformers model there is nothing to say: ("", "").

    Raises:
        ReportError: config.json cannot be read.
    """
    if not (directory / _CONFIG).is_file() or not (directory / _DESCRIPTION).is_file():
        return "", ""
    config = read_object(directory / _CONFIG)
    # PyTorch is loaded for such directories only.
    from shallower.modules.edits import replay
    from shallower.saving.reading import read_description
    from shallower.saving.skeletons import build_skeleton
    from shallower.saving.slots import check_tensors_fit

    try:
        description = read_description(directory)
        if not description.source.startswith("transformers:"):
            return "", ""
        stock = build_skeleton(description.source, config)
        check_tensors_fit(stock, description)
        ours = replay(build_skeleton(description.source, config), description.edits)
    except ShallowerError as error:
        return "", str(error)
    changed = _difference(stock, ours)
    if changed:
        return "", changed
    return type(stock).__name__, ""


def read_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file.

    Raises:
        ReportError: it cannot be read, or holds something else.
    """
    found: Mapping[str, Any] = decode(
        Mapping[str, Any], read_json(path, error=ReportError), at=str(path), error=ReportError
    )
    return found


def _difference(stock: nn.Module, ours: nn.Module) -> str:
    """The first module that surgery made something else than its class makes of the config."""
    known = dict(stock.named_modules())
    for name, module in ours.named_modules():
        if name not in known or type(known[name]) is not type(module):
            return f"{name} is a {type(module).__name__} after surgery"
        if _tensor_shapes(known[name]) != _tensor_shapes(module):
            return f"{name} has other numbers after surgery than its class gives it"
    return ""


def _tensor_shapes(module: nn.Module) -> Mapping[str, Any]:
    return {name: value for name, value in vars(module).items() if type(value) is int}

"""Whether a saved directory is a stock model of Transformers, which `from_pretrained` loads without this library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shallower.core.codec import decode
from shallower.core.files import read_json
from shallower.errors import ReportError, ShallowerError

if TYPE_CHECKING:
    from shallower.saving.description import Stock

_CONFIG, _DESCRIPTION = "config.json", "shallower.json"
_SAYS = 4
"""The version of shallower.json that says it."""


def stock_class(directory: Path) -> tuple[str, str]:
    """The class whose `from_pretrained` loads the directory, or "" and the reason why there is none.

        name, reason = stock_class(Path("small"))

    `save` has found out and written it down; of earlier files it is found out here. Of a directory that is no
    Transformers model there is nothing to say: ("", "").

    Raises:
        ReportError: config.json cannot be read.
    """
    if not (directory / _CONFIG).is_file() or not (directory / _DESCRIPTION).is_file():
        return "", ""
    read_object(directory / _CONFIG)
    try:
        stock = _stock_in(directory)
    except ShallowerError as error:
        return "", str(error)
    if stock.why:
        return "", stock.why
    return stock.name, ""


def stock_sentence(directory: Path) -> str:
    """Whether the library alone builds what a directory holds, in a sentence; "" where there is nothing to say.

        stock_sentence(Path("small"))       # "the stock class loads this: BertModel.from_pretrained"

    Raises:
        ShallowerError: shallower.json or config.json cannot be read.
    """
    if not (directory / _DESCRIPTION).is_file():
        return ""
    return str(_stock_in(directory))


def _stock_in(directory: Path) -> Stock:
    # PyTorch is loaded for such directories only.
    from shallower.saving.reading import read_config, read_description
    from shallower.saving.stock.statement import stock_of

    description = read_description(directory)
    if description.version >= _SAYS:
        return description.stock
    return stock_of(description, read_config(directory, description.source))


def read_object(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file.

    Raises:
        ReportError: it cannot be read, or holds something else.
    """
    found: Mapping[str, Any] = decode(
        Mapping[str, Any], read_json(path, error=ReportError), at=str(path), error=ReportError
    )
    return found

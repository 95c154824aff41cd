"""Write a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from shallower.errors import ReportError


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, flush it to the disk, and rename it.

    Raises:
        ReportError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ReportError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)

"""The model card of a directory of which nothing more is known."""

from __future__ import annotations

from pathlib import Path

NAME = "README.md"


def plain_card(name: str, source: str, stock: str = "") -> str:
    """The card of a directory that holds no numbers."""
    again, made = ", model=make_model()", ""
    hint = "# make_model: a fresh instance of the original,\n# whatever its weights\n"
    if source.partition(":")[0] in ("timm", "torchvision", "transformers"):
        again = hint = ""
    if source:
        made = f"The architecture before surgery is `{source}`.\n"
    if stock:
        stock = f"\n{stock[:1].upper()}{stock[1:]}.\n"
    return f"""---
library_name: shallower
tags:
- shallower
---
# {Path(name).name}

A PyTorch model, squeezed and saved by Shallower. {made}
```python
import shallower as sh

{hint}model = sh.load({name!r}{again})
```
{stock}"""

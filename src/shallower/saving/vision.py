"""Import torchvision, also where its compiled operators do not match the installed torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from shallower.errors import ModelError

# A FRAGMENT library deregisters its schemas when it is collected.
_schemas: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The torchvision package.

    A torchvision wheel that was built for CUDA fails to import beside a CPU build of torch, because it declares fake
    implementations of two detection operators that its binary did not register; transformers and timm import it
    too and fail with it. Where, and only where, that happens, the two schemas are declared here and the import is
    repeated. Classification models and transforms then work; detection operators do not.

    Raises:
        ModelError: torchvision is not installed, or fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except ImportError as error:
        raise ModelError(
            f"torchvision cannot be imported ({error}); install it with: pip install shallower[vision]"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise ModelError(f"torchvision cannot be imported: {error}") from error
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(  # type: ignore[no-untyped-call]
            f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    _schemas.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def repair_torchvision() -> None:
    """Make sure that libraries which import torchvision by themselves will find it working; nothing happens without it.

    Call before importing transformers, timm or lightning.
    """
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()

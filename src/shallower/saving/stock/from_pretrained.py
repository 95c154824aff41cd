"""`from_pretrained` of Transformers reads what surgery made, also where layers have widths of their own.

    import shallower
    model = AutoModelForSequenceClassification.from_pretrained("small/")

The config of such a model names the method "shallower" and holds its record (see `recorded.py`). The method is
registered as soon as Transformers imports its own. The loaded model is an ordinary one: it is trained, converted,
adapted and saved like any other.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

_AT = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the method with Transformers: now where its loading is imported, else as soon as it is."""
    if _AT in sys.modules:
        _register(sys.modules[_AT])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module, and registers the method when it has been imported."""

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """The usual one, with a loader that registers the method afterwards."""
        if fullname != _AT:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, after which the method is registered."""

    def __init__(self, usual: importlib.abc.Loader) -> None:
        self.usual = usual

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As usual."""
        return self.usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As usual; then the method is known."""
        self.usual.exec_module(module)
        _register(module)


def _register(auto: Any) -> None:
    """Make the method known to the module in which Transformers looks methods up."""
    # shallower itself is imported before PyTorch is
    from shallower.saving.stock.recorded import METHOD, rebuilt

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class SurgeryRecord(QuantizationConfigMixin):  # type: ignore[misc]
        """The record of surgery in a config."""

        def __init__(self, **recorded: Any) -> None:
            self.quant_method = METHOD
            self.recorded = {**recorded, "quant_method": METHOD}

        def to_dict(self) -> dict[str, Any]:
            """As it stands in config.json."""
            return dict(self.recorded)

    class Surgery(HfQuantizer):  # type: ignore[misc]
        """Does the recorded surgery on a model before its weights come."""

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            rebuilt(model, self.quantization_config.recorded)

        def postprocess_model(self, model: Any, **_: Any) -> None:
            """Nothing of it is left but the record: the model is not quantized."""
            model.config.quantization_config = self.quantization_config.to_dict()
            for name in ("hf_quantizer", "is_quantized", "quantization_method"):
                vars(model).pop(name, None)

        def is_serializable(self) -> bool:
            """It is saved like any other."""
            return True

        @property
        def is_trainable(self) -> bool:
            """It is trained like any other."""
            return True

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SurgeryRecord
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = Surgery

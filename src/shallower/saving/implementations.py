"""Which implementation of attention and of experts each part of a Transformers model computes with.

    Implementations.of(model).options()          # {"attention": "sdpa", "attention__backbone_config": "eager"}

They compute the same up to rounding, so a model that is loaded to the last bit needs its own. A part without an entry
has what the part around it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from shallower.errors import ModelError

_KNOWN = {
    "attention": ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "experts": ("eager", "batched_mm", "grouped_mm"),
}
_BELOW = "__"
_ATTRIBUTES = {"attention": "_attn_implementation", "experts": "_experts_implementation"}


@dataclass(frozen=True)
class Implementations:
    """By kind ("attention", "experts") and the dotted path of a config within the model's own ("" is the model's)."""

    by_path: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, model: nn.Module) -> Implementations:
        """Those of a Transformers model, where they differ from those of the part around."""
        chosen = {}
        for kind, attribute in _ATTRIBUTES.items():
            if kind == "experts" and not _has_experts(model):
                continue
            known: dict[str, str | None] = {}
            for path, config in configs_in(model.config):
                value = getattr(config, attribute, None)
                known[path] = value
                if value in _KNOWN[kind] and (path == "" or value != known[path.rpartition(".")[0]]):
                    chosen[kind, path] = value
        return cls(chosen)

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, object]) -> Implementations:
        """Those that the options of a source name.

        Raises:
            ModelError: an option is another, or a value names no implementation of Transformers' own.
        """
        chosen = {}
        for key, value in options.items():
            kind, _, path = key.partition(_BELOW)
            if kind not in _KNOWN or value not in _KNOWN[kind]:
                raise ModelError(
                    f"transformers:{name}: {key}={value!r:.40} is unknown; attention= is one of "
                    f"{', '.join(_KNOWN['attention'])}, experts= one of {', '.join(_KNOWN['experts'])}"
                )
            chosen[kind, path.replace(_BELOW, ".")] = str(value)
        return cls(chosen)

    def options(self) -> dict[str, str]:
        """As options of a source."""
        return {
            _BELOW.join([kind, *filter(None, path.split("."))]): value for (kind, path), value in self.by_path.items()
        }

    def set(self, config: Any) -> None:
        """Set them in a config of a model that is to be built."""
        for kind, attribute in _ATTRIBUTES.items():
            inherited: dict[str, str | None] = {}
            for path, part in configs_in(config):
                value = self.by_path.get((kind, path), inherited.get(path.rpartition(".")[0]))
                inherited[path] = value
                if value is not None:
                    # The public setter would change all configs below as well.
                    setattr(part, f"{attribute}_internal", value)


def implementations_of_parts(model: nn.Module) -> dict[str, tuple[str | None, str | None]]:
    """Dotted name of each part that is a Transformers model -> what it computes attention and experts with."""
    found = {}
    for name, part in model.named_modules():
        config = getattr(part, "config", None)
        if hasattr(type(part), "_can_set_attn_implementation") and config is not None:
            found[name] = tuple(getattr(config, attribute, None) for attribute in _ATTRIBUTES.values())
    return found  # type: ignore[return-value]


def configs_in(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The config and those within it, with their paths; outer ones first."""
    yield path, config
    for key in getattr(config, "sub_configs", ()):
        part = getattr(config, key, None)
        if part is not None and part is not config and path.count(".") < 8:
            yield from configs_in(part, f"{path}.{key}".removeprefix("."))


def _has_experts(model: nn.Module) -> bool:
    kinds = {type(part) for part in model.modules() if hasattr(type(part), "_can_set_experts_implementation")}
    return any(kind._can_set_experts_implementation() for kind in kinds)  # type: ignore[attr-defined]

"""Numbers in the configs of Transformers models that follow new widths, so that a stock class can be built from them.

    follow_widths(small, todo)
    follow_heads(small, todo)

A number is found by trying: the stock class is built without weights from the config with the number changed. It stays
changed only if every layer that it changes there has the very same shape and biases in the model after surgery.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Size, nn

from shallower.core.failures import is_out_of_memory
from shallower.errors import ShallowerError
from shallower.planning.forms import Step
from shallower.saving.skeletons import build_skeleton
from shallower.saving.sources import source_of
from shallower.sites import by_name

SizesByName = Mapping[str, Size]

_DERIVED = ("n_inner",)
"""Numbers that may be None, and then follow from others: a width by its default."""

_QUERIES, _GROUPS = "num_attention_heads", "num_key_value_heads"


@dataclass(frozen=True)
class _Owner:
    """A stock model, which has the config in question, and what it is built from."""

    name: str
    model: nn.Module
    config: Any
    source: str

    @property
    def prefix(self) -> str:
        """Before the names of its parts."""
        return f"{self.name}." * (self.name != "")

    def shapes(self) -> SizesByName:
        """Those of its parameters now."""
        return _parameter_shapes(self.model)

    def built(self, numbers: Mapping[str, int]) -> SizesByName | None:
        """Those that its class has with other numbers in the config; None where it does not take them."""
        trial = copy.deepcopy(self.config)
        for key, number in numbers.items():
            setattr(trial, key, number)
        try:
            plain = {key: value for key, value in trial.to_dict().items() if key != "transformers_version"}
            type(self.config)(**plain)
            return _parameter_shapes(build_skeleton(self.source, trial.to_dict()))
        except (
            ShallowerError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            RuntimeError,
            ZeroDivisionError,
        ) as error:
            if is_out_of_memory(error):
                raise
            return None
        except Exception as error:
            # the errors of strict configs are of no class that could be imported everywhere
            if "huggingface_hub" in type(error).__module__:
                return None
            raise


def follow_widths(model: nn.Module, todo: Sequence[Step]) -> None:
    """Set the width in every config of the model that describes all layers of that width, after surgery.

    Args:
        model: after surgery.
        todo: the steps that made it; no width is set of which one left a slope, a linear path or a new bias.
    """
    for owner in _config_owners(model):
        pairs = sorted({(step.entry.site.width, step.form.kept) for step in _narrowing_steps(owner, todo)})
        if not pairs:
            continue
        before = owner.built({})
        for key, old, new in _numbers_like(owner.config, pairs):
            after = owner.built({key: new})
            if before is None or after is None:
                continue
            if _describes(owner, before, after, todo) and getattr(owner.config, key) in (old, None):
                setattr(owner.config, key, new)
                before = after


def follow_heads(model: nn.Module, todo: Sequence[Step]) -> None:
    """Set the numbers of heads in every config that describes all attentions with these numbers, after surgery.

    Args:
        model: after surgery.
        todo: the steps that made it.
    """
    for owner in _config_owners(model):
        for numbers in _head_counts(owner, todo):
            before, after = owner.built({}), owner.built(numbers)
            if before is not None and after is not None and _describes(owner, before, after, todo):
                for key, number in numbers.items():
                    setattr(owner.config, key, number)


def _config_owners(model: nn.Module) -> Iterator[_Owner]:
    """The outermost stock model of each config."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if config is None or isinstance(config, nn.Module) or id(config) in seen:
            continue
        source = source_of(module)
        if source:
            seen.add(id(config))
            yield _Owner(name, module, config, source)


def _narrowing_steps(owner: _Owner, todo: Sequence[Step]) -> Iterator[Step]:
    """The steps that made a site of this model narrower and left nothing but stock layers."""
    for step in todo:
        producer = step.entry.site.producer
        inside = producer is not None and producer.name.startswith(owner.prefix)
        if inside and step.form.kind == "narrower" and step.form.kept < step.entry.site.width:
            yield step


def _numbers_like(config: Any, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """Numbers of a config that may be a width, with the width before and after."""
    for key, value in sorted(config.to_dict().items()):
        for old, new in pairs:
            if (type(value) is int and value == old) or (value is None and key in _DERIVED):
                yield key, old, new


def _head_counts(owner: _Owner, todo: Sequence[Step]) -> Iterator[dict[str, int]]:
    """The numbers of query heads and key-value heads that attentions of this model have now."""
    widths: set[tuple[int, int]] = set()
    for step in todo:
        site = step.entry.site
        if site.kind == "heads" and site.name.startswith(owner.prefix):
            widths.add((site.width, len(step.entry.kept)))
    for groups, new_groups in sorted(widths):
        own_queries, own_groups = getattr(owner.config, _QUERIES, None), getattr(owner.config, _GROUPS, None)
        if new_groups == groups or own_groups not in (groups, None) or not own_queries or own_queries % groups:
            continue
        numbers = {_QUERIES: own_queries // groups * new_groups}
        if own_groups is not None:
            numbers[_GROUPS] = new_groups
        yield numbers


def _describes(owner: _Owner, before: SizesByName, after: SizesByName, todo: Sequence[Step]) -> bool:
    """Whether everything that a number changes in the stock class is in the model as it is there."""
    now = owner.shapes()
    layers: set[str] = set()
    for name, shape in after.items():
        if before.get(name) == shape:
            continue
        if now.get(name) != shape:
            return False
        layers.add(name.rpartition(".")[0])
    if not layers or any(_parameters(now, layer) != _parameters(after, layer) for layer in layers):
        return False
    for step in todo:
        maps = by_name(step.entry.site.maps)
        changes = any(owner.prefix + layer in maps for layer in layers)
        if changes and (step.form.kind not in ("narrower", "cut") or step.form.slopes):
            return False
    return True


def _parameters(shapes: SizesByName, layer: str) -> set[str]:
    return {name for name in shapes if name.rpartition(".")[0] == layer}


def _parameter_shapes(model: nn.Module) -> SizesByName:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}

"""Architectures without weights, built from what a file says: hostile files end in an error, soon and without network.

    skeleton = build_skeleton("timm:resnet18?num_classes=10")

Constructors of libraries do what they like: loop, allocate, run a forward, ask a server. So a draft is built on the
meta device first, which costs no memory, its parts are counted, a deadline ends it, and the hub is offline.
"""

from __future__ import annotations

import copy
import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from shallower.core.failures import failing
from shallower.errors import ModelError
from shallower.saving.hub import offline
from shallower.saving.implementations import Implementations
from shallower.saving.sources import (
    LIBRARIES,
    Option,
    import_timm,
    import_transformers,
    model_class,
    parse_options,
    timm,
    torchvision,
)

# Numbers that are values rather than sizes; nothing is as long as they are.
_NO_SIZES = re.compile(r"(theta|base|_ids?|max_length|max_position_embeddings|sliding_window)\Z")
_LARGE = 1 << 20
_LARGE_OPTION = 1 << 14
_REMOTE = re.compile(r"(hf[-_]hub|local-dir|https?):")


@dataclass(frozen=True)
class Limits:
    """How large an architecture may be, judged by the tensors that are to fill it.

        Limits(parameters=200, largest=4096)

    Attributes:
        parameters: most parameter tensors.
        largest: the largest dimension of a tensor; whole numbers beyond it are refused where they are no mere values.
    """

    parameters: int
    largest: int

    @property
    def modules(self) -> int:
        """Most modules; many have no parameters."""
        return 40 * self.parameters + 4000

    @property
    def seconds(self) -> float:
        """Most time that a constructor may take."""
        return 12 + self.parameters / 200


def build_skeleton(
    source: str,
    config: Mapping[str, Any] | None = None,
    *,
    limits: Limits | None = None,
    fits: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """The architecture that a source names, with its parameters on the meta device; buffers are real.

        build_skeleton("transformers:BertModel?attention=sdpa", config)

    Only classes and functions of Transformers, timm and torchvision are called; nothing is fetched, and no file is
    read. A constructor that computes with its parameters has its buffers on the meta device, too.

    Args:
        source: "transformers:CLASS", "timm:NAME" or "torchvision:NAME", with options.
        config: of a Transformers model, as its config.json has it.
        limits: of a source that comes from a file.
        fits: called with a draft whose tensors are all on the meta device, before anything is allocated; raises where
            it is not the right one. It may change the draft.

    Raises:
        ModelError: the source does not name such an architecture, the library cannot build it, or it is beyond the
            limits.
    """
    make = _maker(source, config or {}, limits)
    with offline():
        # The draft is checked before anything real is made; some constructors cannot do without numbers.
        draft, problem = _attempt(lambda: _draft(make, limits))
        if draft is not None and fits is not None:
            with torch.device("meta"):
                fits(draft)
        skeleton, problem = _attempt(lambda: _real_buffers(make, limits))
        if skeleton is None and problem is not None:
            # A constructor that runs a forward needs all of its tensors on one device.
            skeleton, _ = _attempt(lambda: _draft(make, limits))
            if skeleton is None:
                raise problem
    assert skeleton is not None
    return skeleton


def sketch(source: str, config: Mapping[str, Any] | None = None) -> nn.Module:
    """The architecture that a source names with all its tensors on the meta device, where its constructor can do so.

        sketch("transformers:BertModel", config)        # in milliseconds; only shapes and settings are of use

    Raises:
        ModelError: as `build_skeleton`.
    """
    make = _maker(source, config or {}, None)
    with offline():
        draft, problem = _attempt(lambda: _draft(make, None))
        if problem is not None:
            draft = _real_buffers(make, None)
    assert draft is not None
    return draft


def _attempt(build: Callable[[], nn.Module]) -> tuple[nn.Module | None, ModelError | None]:
    try:
        return build(), None
    except _LimitError:
        raise
    except ModelError as error:
        return None, error


class _LimitError(ModelError):
    """An architecture that is too large for its files."""


def _maker(source: str, config: Mapping[str, Any], limits: Limits | None) -> Callable[[], nn.Module]:
    """What builds the architecture; the texts and numbers that it is built from have been checked."""
    library, _, rest = source.partition(":")
    if library not in LIBRARIES or not rest:
        raise ModelError(f"{source!r:.200} names no architecture of Transformers, timm or torchvision")
    name, options = parse_options(rest)
    if library == "transformers":
        return _transformers_maker(name, options, config, limits)
    if limits is not None:
        for key, value in options.items():
            _check_number(key, value, max(_LARGE_OPTION, limits.largest))
    build = {"timm": timm, "torchvision": torchvision}[library]
    return lambda: build(name, options, False)


def _transformers_maker(
    name: str, options: Mapping[str, Option], config: Mapping[str, Any], limits: Limits | None
) -> Callable[[], nn.Module]:
    library = import_transformers()
    architecture = model_class(library, name)
    if architecture is None or architecture.config_class is None:
        raise ModelError(f"transformers has no model class {name!r:.200}")
    implementations = Implementations.from_options(name, options)
    most = None
    if limits is not None:
        most = max(_LARGE, limits.largest)
    with failing(ModelError, f"transformers:{name}: its config cannot be read"):
        plain = _inert("config", config, most)

    def make() -> nn.Module:
        with failing(ModelError, f"transformers:{name} cannot be built from its config"):
            settings = architecture.config_class.from_dict(copy.deepcopy(plain))
            implementations.set(settings)
            model: nn.Module = architecture(settings)
        return model

    return make


def _inert(key: str, value: Any, most: int | None) -> Any:
    """A value of a config without what would make Transformers fetch weights or code.

    Raises:
        ModelError: it names something that would be fetched, or a number is out of proportion.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:  # Transformers' way of writing numbers that JSON does not know
            return float(value["__float__"])
        _check_backbone(value)
        inert = {}
        for name, item in value.items():
            if name == "auto_map" or str(name).endswith(("attn_implementation", "experts_implementation")):
                continue
            inert[name] = False
            if name != "use_pretrained_backbone":
                inert[name] = _inert(str(name), item, most)
        return inert
    if isinstance(value, list):
        return [_inert(key, item, most) for item in value]
    if isinstance(value, str) and _REMOTE.match(value):
        raise ModelError(f"its config has {key} = {value!r:.80}, which would be fetched")
    if most is not None and not _NO_SIZES.search(key):
        _check_number(key, value, most)
    return value


def _check_backbone(config: Mapping[str, Any]) -> None:
    """Only timm's architecture of a name needs nothing fetched."""
    name = config.get("backbone")
    if not isinstance(name, str):
        return
    if config.get("model_type") != "timm_backbone" or name.partition(".")[0] not in import_timm().list_models():
        raise ModelError(
            f"its config names the backbone {name!r:.80}, which would be fetched; only a backbone_config builds one"
        )


def _check_number(key: str, value: object, most: int) -> None:
    if isinstance(value, int) and abs(value) > most:
        raise ModelError(f"{key} = {value!r:.40} is out of proportion: no tensor in the files is as large")


# ------------------------------------------------------------------------------------------------------- contexts


def _draft(make: Callable[[], nn.Module], limits: Limits | None) -> nn.Module:
    """Everything on the meta device."""
    with torch.device("meta"), _limited(limits), _deadline(limits):
        return make()


def _real_buffers(make: Callable[[], nn.Module], limits: Limits | None) -> nn.Module:
    """Parameters on the meta device as soon as they are made; buffers and other tensors are computed."""

    def emptied(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return parameter
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        vars(empty).update(vars(parameter))
        return empty

    thread = threading.get_ident()
    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        with _limited(limits), _deadline(limits), torch.random.fork_rng(devices=[]):
            return make()
    finally:
        hook.remove()


@contextmanager
def _limited(limits: Limits | None) -> Iterator[None]:
    """Raise where more parameters or modules are made than the limits allow."""
    if limits is None:
        yield
        return
    thread = threading.get_ident()
    left = {"parameters": limits.parameters, "modules": limits.modules}

    def counting(what: str) -> Callable[[nn.Module, str, Any], None]:
        def count(_module: nn.Module, _name: str, made: object) -> None:
            if made is not None and threading.get_ident() == thread:
                left[what] -= 1
                if left[what] < 0:
                    raise _LimitError(
                        f"the architecture has more than {getattr(limits, what)} {what}, and the files far fewer"
                    )

        return count

    with ExitStack() as stack:
        stack.callback(register_module_parameter_registration_hook(counting("parameters")).remove)
        stack.callback(register_module_module_registration_hook(counting("modules")).remove)
        yield


class _DeadlineError(BaseException):
    """Raised in the middle of a constructor; no BaseException is caught there."""


@contextmanager
def _deadline(limits: Limits | None) -> Iterator[None]:
    """End what runs here after a time.

    A loop in a library's own Python code has nothing else that could end it: neither counts nor sizes are known before.
    """
    if limits is None:
        yield
        return
    thread = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    state = {"over": False, "late": False}

    def raise_in_thread() -> None:
        with lock:
            if not state["over"]:
                state["late"] = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_DeadlineError))

    timer = threading.Timer(limits.seconds, raise_in_thread)
    timer.daemon = True
    timer.start()
    try:
        yield
    except _DeadlineError:
        raise _LimitError(f"the architecture takes longer than {limits.seconds:.0f} s to build") from None
    finally:
        with lock:
            state["over"] = True
            if state["late"]:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
        timer.cancel()

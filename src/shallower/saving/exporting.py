"""Write a model so that it runs without this library: ONNX, or PyTorch's own .pt2.

    sh.export(small, example_inputs, "model.onnx")
    sh.export(small, example_inputs, "model.pt2")

Batch and length are dynamic where the model allows it, and what was written is run and compared with the model, also on
inputs of other sizes, before it takes its name.
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from shallower.core.inputs import Inputs, call, tensors, to_device
from shallower.errors import ExportError
from shallower.modules.attachment import detached_copy

Dynamic = Literal["auto"] | Mapping[str, Mapping[int, str]] | Sequence[Mapping[int, str]] | None
"""Which dimensions stay open: for each input, by name or in order, {dimension: its name}."""

_SINGLE_FILE = 1 << 30
"""ONNX files of more bytes than this keep their weights beside them (protobuf ends at 2 GiB)."""

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file to load.
        files: all files, with the weights where they lie beside it.
        dynamic: open dimensions of each input: {"input_ids": {0: "batch", 1: "length"}}.
        error: greatest difference from the model's outputs, relative to the greatest output; None where not checked.
        checked: sizes of the inputs on which it was compared.
    """

    path: Path
    files: tuple[Path, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    error: float | None
    checked: tuple[str, ...]

    def __str__(self) -> str:
        """For people, in a line or two."""
        size = sum(file.stat().st_size for file in self.files)
        names = sorted({name for dims in self.dynamic.values() for name in dims.values()})
        opened = f"{' and '.join(names)} may vary" if names else "all sizes are fixed"
        lines = [f"{', '.join(map(str, self.files))}: {size / 1e6:.3g} MB, {opened}"]
        if self.error is not None:
            lines.append(f"answers as the model does up to {self.error:.1e}, on inputs of {', '.join(self.checked)}")
        return "\n".join(lines)


def export(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | Path,
    *,
    dynamic: Dynamic = "auto",
    check: bool = True,
    opset: int | None = None,
) -> Exported:
    """Write `model` as ONNX or as .pt2; the ending of `path` says which.

        sh.export(small, {"input_ids": ids, "attention_mask": mask}, "model.onnx")
        sh.export(small, pictures, "model.onnx", dynamic=[{0: "batch"}])

    Args:
        model: any model; it is not changed. What is attached to it is left out, and a language model is exported
            without its cache.
        example_inputs: as the model is called. Sizes of 1 are doubled first, since tracing would take them for fixed.
        path: ends in .onnx or .pt2. A file of that name is replaced, at the end and at once.
        dynamic: "auto" opens the first dimension of every input ("batch") and the second of matrices of integers
            ("length"), as far as the model allows. A mapping or sequence opens exactly what it names. None fixes all.
        check: run what was written and compare it with the model on the example inputs and, where dimensions are open,
            on larger ones. ONNX needs onnxruntime for it.
        opset: ONNX operator set; PyTorch's choice by default.

    Returns:
        What was written, and how it compares.

    Raises:
        ExportError: a package is missing, the model cannot be traced, a dimension that `dynamic` names is fixed by the
            model, or the answers differ.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".onnx", ".pt2"):
        raise ExportError(f"{path}: the name must end in .onnx or .pt2, which says what to write")
    if opset is not None and path.suffix == ".pt2":
        raise ExportError("opset= is ONNX's; a .pt2 file has none")
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent}: there is no such directory")
    onnx = path.suffix == ".onnx"
    if onnx:
        _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    plain = _ready(model)
    dtype = next((p.dtype for p in plain.parameters() if p.is_floating_point()), torch.float32)
    if onnx and dtype == torch.bfloat16:
        raise ExportError("ONNX Runtime does not compute in bfloat16 on the CPU: export model.float() or model.half()")
    inputs = _enlarged(to_device(example_inputs, "cpu"))
    shapes = _shapes(inputs, dynamic)
    tolerance = _TOLERANCES.get(dtype, 1e-4)
    with (
        tqdm(total=3, desc=f"exporting {path.name}", delay=2) as bar,
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
        _quiet(),
    ):
        partial = Path(folder) / path.name
        if onnx:
            program, opened = _write_onnx(plain, inputs, shapes, partial, opset)
        else:
            program, opened = _write_pt2(plain, inputs, shapes, partial)
        _check_opened(shapes, opened, dynamic)
        bar.update(2)
        error, checked = None, []
        if check:
            run = _onnx_runtime(partial, program) if onnx else _pt2_program(partial)
            for sized in _sizes(inputs, opened):
                checked.append(_told(sized))
                error = max(error or 0.0, _difference(plain, run, sized, tolerance, checked[-1]))
        bar.update()
        files = _put(sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name), path)
    return Exported(path, files, opened, error, tuple(checked))


# ------------------------------------------------------------------------------------------------ writing


def _write_onnx(
    model: nn.Module, inputs: Inputs, shapes: Any, path: Path, opset: int | None
) -> tuple[Any, dict[str, dict[int, str]]]:
    args, kwargs = _arguments(inputs)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    try:
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=shapes if shapes is None or kwargs else tuple(shapes.values()),
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=size > _SINGLE_FILE)
    except Exception as error:  # torch raises what it likes here
        raise ExportError(f"{path.name}: this model cannot be written as ONNX: {_first_line(error)}") from error
    opened = {}
    for name, value in zip(_names(inputs), program.model.graph.inputs, strict=True):
        dims = {} if value.shape is None else {i: str(d) for i, d in enumerate(value.shape) if not isinstance(d, int)}
        if dims:
            opened[name] = dims
    return program, opened


def _write_pt2(model: nn.Module, inputs: Inputs, shapes: Any, path: Path) -> tuple[Any, dict[str, dict[int, str]]]:
    args, kwargs = _arguments(inputs)
    auto = None if shapes is None else {n: dict.fromkeys(d, torch.export.Dim.AUTO) for n, d in shapes.items()}
    try:
        with torch.no_grad():
            program = torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=auto if auto is None or kwargs else tuple(auto.values()),
                strict=False,
            )
        torch.export.save(program, path)
    except Exception as error:  # torch raises what it likes here
        raise ExportError(f"{path.name}: this model cannot be traced by torch.export: {_first_line(error)}") from error
    given = set(program.graph_signature.user_inputs)
    places = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in given]
    opened = {}
    for name, node in zip(_names(inputs), places, strict=True):
        wanted = (shapes or {}).get(name, {})
        dims = {i: wanted.get(i, "open") for i, d in enumerate(node.meta["val"].shape) if not is_concrete_int(d)}
        if dims:
            opened[name] = dims
    return program, opened


def _put(files: Sequence[Path], path: Path) -> tuple[Path, ...]:
    """Move finished files to their place, the one that refers to the others last."""
    targets = [path.parent / file.name for file in files]
    for file, target in zip(files, targets, strict=True):
        file.replace(target)
    weights = path.with_name(path.name + ".data")
    if path.suffix == ".onnx" and weights not in targets:
        weights.unlink(missing_ok=True)  # of an earlier, larger model of this name
    return tuple(reversed(targets))


# ------------------------------------------------------------------------------------------------ inputs


def _ready(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, nothing attached; a Transformers model without its cache."""
    plain = detached_copy(getattr(model, "_orig_mod", model)).cpu().eval()
    for module in plain.modules():
        config = vars(module).get("config")
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
    return plain


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def _named(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs by name, or by position as text."""
    args, kwargs = _arguments(inputs)
    named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"input {name} is a {type(value).__name__}: only tensors can be exported as inputs")
    return named


def _names(inputs: Inputs) -> list[str]:
    return list(_named(inputs))


def _enlarged(inputs: Inputs) -> Inputs:
    """Every leading dimension at least 2, and the lengths of matrices of integers."""
    _named(inputs)
    dims = {name: [0, 1] if _is_tokens(value) else [0] for name, value in _named(inputs).items()}
    twice = {n: {d: 2 * v.shape[d] for d in dims[n] if v.dim() and v.shape[d] == 1} for n, v in _named(inputs).items()}
    return _resized(inputs, twice)


def _is_tokens(value: Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


def _resized(inputs: Inputs, sizes: Mapping[str, Mapping[int, int]]) -> Inputs:
    """The inputs with some dimensions of another size, filled by going round."""

    def one(name: str, value: Tensor) -> Tensor:
        for dim, size in sizes.get(name, {}).items():
            value = value.index_select(dim, torch.arange(size) % value.shape[dim])
        return value

    if isinstance(inputs, Tensor):
        return one("0", inputs)
    if isinstance(inputs, Mapping):
        return {name: one(name, value) for name, value in inputs.items()}
    return tuple(one(str(i), value) for i, value in enumerate(inputs))


def _shapes(inputs: Inputs, dynamic: Dynamic) -> dict[str, dict[int, str]] | None:
    """The dimensions to open of every input, by name or by position as text."""
    if dynamic is None:
        return None
    named = _named(inputs)
    if isinstance(dynamic, str):
        if dynamic != "auto":
            raise ExportError(f"dynamic={dynamic!r}: give 'auto', None, or the dimensions of each input")
        return {
            name: {0: "batch", 1: "length"} if _is_tokens(value) else {0: "batch"} if value.dim() else {}
            for name, value in named.items()
        }
    given = dynamic if isinstance(dynamic, Mapping) else {str(i): dims for i, dims in enumerate(dynamic)}
    for name, dims in given.items():
        if name not in named:
            raise ExportError(f"dynamic names the input {name!r}; the inputs are {', '.join(named)}")
        for dim in dims:
            if not 0 <= dim < named[name].dim():
                raise ExportError(f"dynamic: input {name} has no dimension {dim}; its shape is {_shape(named[name])}")
    return {name: dict(given.get(name, {})) for name in named}


def _sizes(inputs: Inputs, opened: Mapping[str, Mapping[int, str]]) -> Iterator[Inputs]:
    """The inputs, and where dimensions are open the same with others: one row more, and three fewer or more columns."""
    yield inputs
    if opened:
        named = _named(inputs)
        yield _resized(inputs, {n: {d: _other(d, named[n].shape[d]) for d in dims} for n, dims in opened.items()})


def _other(dim: int, size: int) -> int:
    return size + 1 if dim == 0 else size - 3 if size > 5 else size + 3


def _check_opened(shapes: Any, opened: Mapping[str, Mapping[int, str]], dynamic: Dynamic) -> None:
    if dynamic is None or isinstance(dynamic, str):
        return
    for name, dims in shapes.items():
        for dim, called in dims.items():
            if dim not in opened.get(name, {}):
                raise ExportError(
                    f"input {name}: the model fixes dimension {dim} ({called}) to the size it has in the example "
                    "inputs. Leave it out of dynamic, or use dynamic='auto'"
                )


# ----------------------------------------------------------------------------------------------- checking


Run = Callable[[Inputs], list[Tensor]]


def _onnx_runtime(path: Path, program: Any) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in program.model.graph.inputs]

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [value.numpy() for value in _named(inputs).values()]
        return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def _pt2_program(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: list(tensors(call(module, inputs)))


@torch.no_grad()
def _difference(model: nn.Module, run: Run, inputs: Inputs, tolerance: float, told: str) -> float:
    try:
        expected = [leaf for leaf in pytree.tree_leaves(call(model, inputs)) if isinstance(leaf, Tensor)]
    except Exception as error:  # the model's own
        raise ExportError(f"the model itself does not take inputs of {told}: {_first_line(error)}") from error
    try:
        found = run(inputs)
    except Exception as error:  # the runtime's own
        raise ExportError(f"what was written does not run on inputs of {told}: {_first_line(error)}") from error
    if [tuple(a.shape) for a in expected] != [tuple(a.shape) for a in found]:
        raise ExportError(f"on inputs of {told} the shapes of the outputs differ from the model's")
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        if not ours.numel():
            continue
        ours, theirs = ours.double(), theirs.double()
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12)))
    if not worst <= tolerance:
        raise ExportError(
            f"on inputs of {told} the answers differ from the model's by {worst:.1e} (relative), allowed "
            f"{tolerance:.0e}. Name fewer open dimensions (dynamic=), or none (dynamic=None)"
        )
    return worst


# ------------------------------------------------------------------------------------------------- words


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(f"ONNX needs {package}: pip install 'shallower[export]'") from error


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape))


def _told(inputs: Inputs) -> str:
    return " and ".join(dict.fromkeys(_shape(value) for value in _named(inputs).values()))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause).strip():
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause or error).__name__}: {lines[0] if lines else 'no message'}"[:400]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the exporters, which nobody who calls `export` can act on."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

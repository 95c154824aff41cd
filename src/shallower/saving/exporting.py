"""Write a model so that it runs without this library: ONNX, or PyTorch's own .pt2.

    sh.export(small, example_inputs, "model.onnx")
    sh.export(small, example_inputs, "model.pt2")

Batch and length are dynamic where the model allows it, and what was written is run and compared with the model, also on
inputs of other sizes, before it takes its name.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from tqdm.auto import tqdm

from shallower.core.failures import failing
from shallower.core.files import folder_beside
from shallower.core.inputs import Inputs, call
from shallower.core.modes import evaluating
from shallower.core.tensors import has_no_numbers, nbytes_of
from shallower.core.trees import cloned, tensors, to_device
from shallower.errors import ExportError
from shallower.modules.attachment import detached_copy
from shallower.saving.opening import (
    Dimensions,
    Dynamic,
    arguments_of,
    check_opened,
    enlarged,
    shape_of,
    shapes_of,
    sizes_to_check,
    symbol_names,
    tensors_by_name,
    wanted,
)
from shallower.saving.slots import unwrapped

_SINGLE_FILE = 1 << 30
"""ONNX files of more bytes than this keep their weights beside them (protobuf ends at 2 GiB)."""

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")

Runner = Callable[[Inputs], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """What was written.

        written = sh.export(model, inputs, "model.onnx")
        written.dynamic                 # {"input_ids": {0: "batch", 1: "length"}, ...}

    Attributes:
        path: the file to load.
        files: all files, with the weights where they lie beside it.
        dynamic: open dimensions of each input; those of equal names always have equal sizes.
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
        opened = "all sizes are fixed"
        if names:
            opened = f"{' and '.join(names)} may vary"
        lines = [f"{', '.join(map(str, self.files))}: {size / 1e6:.3g} MB, {opened}"]
        if self.error is not None:
            lines.append(f"matches the model to within {self.error:.1e}, on inputs of {', '.join(self.checked)}")
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
            ("length", or a name of its own for each input where the lengths may differ), as far as the model allows.
            A mapping or sequence opens exactly what it names. None fixes all.
        check: run what was written and compare it with the model on the example inputs and, where dimensions are open,
            on others, in which every dimension that may differ does. ONNX needs onnxruntime for it.
        opset: ONNX operator set; PyTorch's choice by default.

    Returns:
        What was written, and how it compares.

    Raises:
        ExportError: a package is missing, the model cannot be traced, a dimension that `dynamic` names is fixed by the
            model, or the outputs differ.
        ForwardError: the model does not take the example inputs.
    """
    path = Path(path).expanduser()
    onnx = path.suffix == ".onnx"
    _check_path(path, opset)
    if onnx:
        _need("onnx", "onnxscript")
    if onnx and check:
        _need("onnxruntime")
    plain = _copy_to_export(model)
    dtype = _dtype_of(plain)
    if onnx and dtype == torch.bfloat16:
        raise ExportError("ONNX Runtime does not compute in bfloat16 on the CPU: export model.float() or model.half()")
    # A tensor of its own for each input: one that is passed twice would be taken for inputs that are always equal.
    inputs = enlarged(cloned(to_device(example_inputs, "cpu")))
    names = wanted(inputs, dynamic)
    with evaluating(plain):
        outputs = call(plain, inputs)
    with (
        tqdm(total=3, desc=f"exporting {path.name}", delay=2) as bar,
        folder_beside(path, error=ExportError) as folder,
        _quiet(),
    ):
        program = _traced(plain, inputs, names, path)
        opened = _open_dimensions(program, inputs, names, dynamic)
        check_opened(names, opened, dynamic)
        bar.update()
        partial = folder / path.name
        run = _write_onnx(program, opened, outputs, partial, opset) if onnx else _write_pt2(program, partial)
        bar.update()
        error, checked = None, []
        if check:
            for sized in sizes_to_check(inputs, opened):
                checked.append(shapes_of(sized))
                error = max(error or 0.0, _worst_difference(plain, run(), sized, _TOLERANCES.get(dtype, 1e-4)))
        bar.update()
        files = _put(folder, path)
    return Exported(path, files, opened, error, tuple(checked))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The type of its weights."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _check_path(path: Path, opset: int | None) -> None:
    if path.suffix not in (".onnx", ".pt2"):
        raise ExportError(f"{path}: the name must end in .onnx or .pt2, which says what to write")
    if opset is not None and path.suffix == ".pt2":
        raise ExportError("opset= is ONNX's; a .pt2 file has none")
    with failing(ExportError, f"{path}: cannot be written"):
        if not path.parent.is_dir():
            raise ExportError(f"{path.parent}: there is no such directory")
        if path.is_dir():
            raise ExportError(f"{path}: this is a directory; give the name of a file")


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(f"ONNX needs {package}: pip install 'shallower[export]'") from error


def _copy_to_export(model: nn.Module) -> nn.Module:
    """A copy on the CPU in eval mode, nothing attached; a Transformers model without its cache."""
    inner = unwrapped(model)
    if any(map(has_no_numbers, (*inner.parameters(), *inner.buffers()))):
        raise ExportError("the model is on the meta device and has no weights to export; load it first")
    plain = detached_copy(inner).cpu().eval()
    for module in plain.modules():
        config: Any = vars(module).get("config")
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return plain


# ------------------------------------------------------------------------------------------------ writing


def _traced(model: nn.Module, inputs: Inputs, names: Dimensions | None, path: Path) -> ExportedProgram:
    """The model as a program whose wanted dimensions are open as far as it allows."""
    args, kwargs = arguments_of(inputs)
    shapes: Any = None
    if names is not None:
        # AUTO, not a name: the tracer finds out which dimensions are open, and which of them always equal.
        shapes = {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in names.items()}
        if not kwargs:
            shapes = tuple(shapes.values())
    with failing(ExportError, f"{path.name}: this model cannot be traced by torch.export"), torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _open_dimensions(
    program: ExportedProgram, inputs: Inputs, names: Dimensions | None, dynamic: Dynamic
) -> dict[str, dict[int, str]]:
    """The dimensions of the inputs that the program leaves open, by name."""
    shapes = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in program.graph_signature.user_inputs:
            shapes[node.name] = node.meta["val"].shape
    owners = list(tensors_by_name(inputs))
    if set(shapes) == set(owners):  # keywords
        owners = list(shapes)
    titles = dict(zip(owners, shapes, strict=True))
    symbols: dict[str, dict[int, str]] = {}
    for owner, title in titles.items():
        for dim, size in enumerate(shapes[title]):
            if not is_concrete_int(size):
                symbols.setdefault(owner, {})[dim] = str(size)
    apart = []
    if dynamic == "auto":  # nobody chose these names, so lengths that differ may have others
        apart.append("length")
    name_of = symbol_names(symbols, names or {}, titles, apart)
    for dims in symbols.values():
        for dim, symbol in dims.items():
            dims[dim] = name_of[symbol]
    return symbols


def _write_onnx(
    program: ExportedProgram, opened: Dimensions, outputs: Any, path: Path, opset: int | None
) -> Callable[[], Runner]:
    size = nbytes_of(program.state_dict.values())
    with failing(ExportError, f"{path.name}: this model cannot be written as ONNX"):
        written = torch.onnx.export(program, output_names=_output_names(outputs), opset_version=opset, verbose=False)
        assert written is not None
        names: list[str] = []
        renamed: dict[Any, str] = {}
        for i, value in enumerate(written.model.graph.inputs):
            symbols: Any = value.shape
            for dim, name in opened.get(str(value.name), opened.get(str(i), {})).items():
                if str(symbols[dim]) != name:
                    renamed[str(symbols[dim])] = name
            names.append(str(value.name))
        written.rename_axes(renamed)
        written.save(path, external_data=size > _SINGLE_FILE)
    return lambda: _onnx_runtime(path, names)


def _output_names(outputs: Any) -> list[str] | None:
    """The keys of a mapping of tensors, what a Transformers model returns; None where outputs have no names."""
    if not isinstance(outputs, Mapping) or not all(isinstance(value, Tensor) for value in outputs.values()):
        return None
    return list(map(str, outputs))


def _write_pt2(program: ExportedProgram, path: Path) -> Callable[[], Runner]:
    torch.export.save(program, path)
    return lambda: _pt2_program(path)


def _put(folder: Path, path: Path) -> tuple[Path, ...]:
    """Move finished files to their place, the one that refers to the others last."""
    placed: list[Path] = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
        placed.insert(0, file.replace(path.parent / file.name))
    weights = path.with_name(path.name + ".data")
    if path.suffix == ".onnx" and weights not in placed:
        weights.unlink(missing_ok=True)  # of an earlier, larger model of this name
    return tuple(placed)


# ----------------------------------------------------------------------------------------------- checking


def _onnx_runtime(path: Path, names: Sequence[str]) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        given = tensors_by_name(inputs)
        if set(given) != set(names):  # positional arguments
            given = dict(zip(names, given.values(), strict=True))
        arrays = dict(zip(given, map(Tensor.numpy, given.values()), strict=True))
        return list(map(torch.from_numpy, session.run(None, arrays)))

    return run


def _pt2_program(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda inputs: list(tensors(call(module, inputs)))


@torch.no_grad()
def _worst_difference(model: nn.Module, run: Runner, inputs: Inputs, tolerance: float) -> float:
    """The greatest difference from the model's outputs, relative to the greatest output."""
    shapes = shapes_of(inputs)
    with failing(ExportError, f"the model itself does not take inputs of {shapes}"):
        expected = list(tensors(call(model, inputs)))
    with failing(ExportError, f"what was written does not run on inputs of {shapes}", "Name fewer open dimensions"):
        found = run(inputs)
    if list(map(shape_of, expected)) != list(map(shape_of, found)):
        raise ExportError(f"on inputs of {shapes} the shapes of the outputs differ from the model's")
    worst = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        if ours.numel():
            ours, theirs = ours.double(), theirs.double()
            worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12)))
    if not worst <= tolerance:
        raise ExportError(
            f"on inputs of {shapes} the outputs differ from the model's by {worst:.1e} (relative), allowed "
            f"{tolerance:.0e}. Name fewer open dimensions (dynamic=), or none (dynamic=None)"
        )
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the exporters, which nobody who calls `export` can act on."""
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, _LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield

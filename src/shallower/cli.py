"""The command line: inspect, compress, demo.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shallower.errors import DataError, ShallowerError, SiteError

if TYPE_CHECKING:
    from shallower.models import LoadedModel
    from shallower.sites import Sites

app = typer.Typer(
    name="shallower",
    help="Squeeze the depth and the width out of trained PyTorch networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="A MODEL is a directory (of Transformers, or one that a command here wrote), a name on the hub, timm:NAME, "
    "torchvision:NAME or package.module:factory; the last three with options, NAME?num_classes=10.",
)

_MODEL_HELP = "A directory, a hub name, timm:NAME, torchvision:NAME or package.module:factory."


class TaskOption(str, Enum):
    """What --task takes."""

    text = "text-classification"
    image = "image-classification"
    language = "causal-lm"


class MethodOption(str, Enum):
    """What --method takes."""

    layer_collapse = "layer-collapse"


class OrderOption(str, Enum):
    """What --order takes."""

    sensitivity = "sensitivity"
    last_first = "last-first"


class PrecisionOption(str, Enum):
    """What --precision takes."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class DeviceOption(str, Enum):
    """What --device takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def main() -> None:
    """Run the command line. An error raised on purpose is one line on stderr, and the exit status is 1."""
    try:
        app(prog_name="shallower")
    except (ShallowerError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shallower {version('shallower')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    batch: Annotated[int, typer.Option(min=1, help="Rows of the example input.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a row of it.")] = 32,
    shape: Annotated[str, typer.Option(help="Shape of a row of it, for a factory: 3,32,32.")] = "",
    places: Annotated[bool, typer.Option("--places", help="List activations outside of sites, too.")] = False,
    meta: Annotated[bool, typer.Option("--meta", help="Read no weights: for very large models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what can be squeezed in MODEL, what it costs now, and what was skipped and why.

    \b
    Examples:
      shallower inspect bert-base-uncased
      shallower inspect timm:vit_tiny_patch16_224 --batch 8
      shallower inspect meta-llama/Llama-2-7b-hf --meta --length 512
      shallower inspect my_project.nets:make_net --shape 3,32,32
    """
    from shallower.matching import find_sites

    loaded = _loaded(model, meta)
    example = _example(loaded, batch, length, shape)
    sites = find_sites(loaded.model, example, places=places)
    print(json.dumps(_sites_json(sites), indent=2) if as_json else sites)
    if not len(sites):
        raise SiteError(f"{model} has no site that can be squeezed")


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    data: Annotated[str, typer.Option(help="A file, a folder or a name on the hub, to train on.")],
    target: Annotated[str, typer.Option(help="params:60%, macs:50%, memory:40MB, latency:1.5x or drop:1%.")],
    output: Annotated[Path, typer.Option(help="Folder for the result.")],
    task: Annotated[TaskOption | None, typer.Option(help="By default what the model was made for.")] = None,
    method: Annotated[MethodOption, typer.Option(help="How to squeeze.")] = MethodOption.layer_collapse,
    eval_data: Annotated[str, typer.Option(help="Other data to choose on.")] = "",
    text_column: Annotated[str, typer.Option(help="Column of the text; two with a comma for pairs.")] = "",
    label_column: Annotated[str, typer.Option(help="Column of the class.")] = "",
    image_column: Annotated[str, typer.Option(help="Column of the picture.")] = "",
    limit: Annotated[int | None, typer.Option(min=2, help="At most so many rows of each part.")] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Part to choose on, if there is none.")] = 0.1,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a row at most.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width of pictures.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data in each stage.")] = 3,
    dense_epochs: Annotated[int, typer.Option(min=0, help="Passes before, with the model as it is.")] = 0,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 32,
    strength: Annotated[float, typer.Option(min=0, help="Of the pull on the slopes.")] = 0.5,
    tolerance: Annotated[float, typer.Option(min=0, max=1, help="How near to 1 a slope is linear.")] = 0.05,
    order: Annotated[OrderOption, typer.Option(help="Which sites go first.")] = OrderOption.sensitivity,
    stages: Annotated[int, typer.Option(min=1, help="Rounds among which the sites are divided.")] = 1,
    sites: Annotated[str, typer.Option(help="Only sites with such names: 'encoder.layer.*'.")] = "*",
    quality_floor: Annotated[
        float | None, typer.Option(help="Least accuracy (0.9), or greatest perplexity (20), allowed.")
    ] = None,
    precision: Annotated[PrecisionOption, typer.Option(help="Of the training.")] = PrecisionOption.no,
    device: Annotated[DeviceOption, typer.Option(help="Where to train.")] = DeviceOption.auto,
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on after an interruption, or not.")] = True,
) -> None:
    """Train MODEL on DATA until layers merge, and write the smaller model.

    The result is in --output: model.safetensors and shallower.json (shallower.load reads them), the tokenizer, the
    plan, and result.json with all numbers. It is written at the end, and only if the target was met.

    \b
    Examples:
      shallower compress ./my-bert --data reviews.csv --target params:80% \\
        --output smaller
      shallower compress 'timm:vit_tiny_patch16_224?num_classes=10' \\
        --data photos/ --target macs:60% --epochs 10 --output smaller
      shallower compress ./my-llama --data stories.txt --target drop:2% \\
        --stages 5 --output smaller
    """
    from shallower.budget import Target
    from shallower.jobs import Job, run

    job = Job(
        model=model,
        data=data,
        target=Target.parse(target),
        output=output.expanduser(),
        task=task.value if task else None,
        method=method.value,
        eval_data=eval_data,
        text_column=text_column,
        label_column=label_column,
        image_column=image_column,
        limit=limit,
        held_out=held_out,
        length=length,
        image_size=image_size,
        epochs=epochs,
        dense_epochs=dense_epochs,
        lr=lr,
        batch_size=batch_size,
        strength=strength,
        tolerance=tolerance,
        order=order.value,
        stages=stages,
        sites=sites,
        quality_floor=quality_floor,
        precision=precision.value,
        device=device.value,
        seed=seed,
    )
    try:
        print(run(job, resume=resume))
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {job.progress}", file=sys.stderr)
        raise


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Train for a moment only.")] = False,
) -> None:
    """Train two small networks on scanned digits, squeeze both, save them and check them.

    \b
    Example:
      shallower demo --output demo-out
    """
    from shallower.demo import run

    print(run(output.expanduser(), seed=seed, quick=quick))


def _loaded(model: str, meta: bool) -> LoadedModel:
    from shallower.models import load_model

    if not meta:
        return load_model(model)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return load_model(model, pretrained=False)


def _example(loaded: LoadedModel, batch: int, length: int, shape: str) -> Any:
    if not shape:
        return loaded.make_example_inputs(batch=batch, length=length)
    import torch

    try:
        sizes = [int(size) for size in shape.split(",")]
        return torch.zeros(batch, *sizes)
    except (ValueError, RuntimeError):
        raise DataError(f"--shape {shape!r}: give the sizes of one row, for example 3,32,32") from None


def _sites_json(sites: Sites) -> dict[str, Any]:
    costs = ("params", "macs", "params_collapsed", "macs_collapsed")
    return {
        "params": sites.params,
        "macs": sites.macs,
        "sites": [{**site.to_json(), **{cost: getattr(site, cost) for cost in costs}} for site in sites],
        "skipped": dict(sites.skipped),
    }

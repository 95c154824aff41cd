"""The command line: inspect, compress, pick, compare, bench, export, report, demo.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from shallower.errors import ShallowerError, SiteError, TargetError

if TYPE_CHECKING:
    from shallower.app.compression import MethodRun
    from shallower.app.models import LoadedModel
    from shallower.sites import Sites


class Sections(TyperCommand):
    """A command whose help lists its options under the titles that `rich_help_panel` gives them."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                plain = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or plain, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


app = typer.Typer(
    name="shallower",
    help="Squeeze the depth and the width out of trained PyTorch networks.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="A MODEL is a directory (of Transformers, or one that a command here wrote), a name on the hub, timm:NAME, "
    "torchvision:NAME or package.module:factory; the last three with options, NAME?num_classes=10. "
    "Exit status: 0 done, 1 an error, told in one line, 2 wrong usage, 3 the target was not met, 130 interrupted.",
)

_MODEL_HELP = "A directory, a hub name, timm:NAME, torchvision:NAME or package.module:factory."


class TaskOption(str, Enum):
    """What --task takes."""

    text = "text-classification"
    image = "image-classification"
    language = "causal-lm"
    features = "feature-extraction"
    image_features = "image-feature-extraction"


class MethodOption(str, Enum):
    """What --method takes."""

    squeeze = "squeeze"
    layer_collapse = "layer-collapse"
    tlc = "tlc"
    structural_dropout = "structural-dropout"


class CriterionOption(str, Enum):
    """What --criterion takes."""

    batchnorm = "batchnorm"
    loss = "loss"
    entropy = "entropy"
    random = "random"


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


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def main() -> None:
    """Run the command line. An error raised on purpose is one line on stderr, and the exit status is 1, or 3."""
    try:
        app(prog_name="shallower")
    except (ShallowerError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(3 if isinstance(error, TargetError) else 1)


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


@app.command(cls=Sections)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    batch: Annotated[int, typer.Option(min=1, help="Rows of the example input.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a row of it.")] = 32,
    shape: Annotated[str, typer.Option(help="Shape of a row of it, for a factory: 3,32,32.")] = "",
    places: Annotated[bool, typer.Option("--places", help="List activations outside of sites, too.")] = False,
    meta: Annotated[bool, typer.Option("--meta", help="Read no weights: for very large models.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what can be squeezed in MODEL, what it costs now, and what was skipped and why.

    \b
    Examples:
      shallower inspect bert-base-uncased
      shallower inspect timm:vit_tiny_patch16_224 --batch 8
      shallower inspect meta-llama/Llama-2-7b-hf --meta --length 512
      shallower inspect my_project.nets:make_net --shape 3,32,32
    """
    from shallower.app.bench import example_of
    from shallower.finding.matching import find_sites

    with _speaking(as_json):
        loaded = _loaded(model, meta)
        example = example_of(loaded, Path(model), batch=batch, length=length, shape=shape)
        sites = find_sites(loaded.model, example, places=places)
    _tell(str(sites), _sites_json(sites), as_json)
    if not len(sites):
        raise SiteError(f"{model} has no site that can be squeezed")


_DATA, _TRAINING, _RUN = "Data", "Training", "The run"
_SQUEEZE = "Squeezing: a few hundred rows, no training (--method squeeze)"
_COLLAPSE = "Collapsing: train until layers merge (--method layer-collapse)"
_TLC = "Taking activations away, a few at a time (--method tlc)"
_DROPOUT = "All widths at once, to pick from (--method structural-dropout)"


@app.command(cls=Sections)
def compress(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    data: Annotated[str, typer.Option("--data", "-d", help="A file, a folder or a name on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the result.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="params:60%, macs:50%, memory:40MB, latency:1.5x or drop:1%.")
    ] = "",
    method: Annotated[MethodOption, typer.Option("--method", "-m", help="How to squeeze.")] = MethodOption.squeeze,
    task: Annotated[
        TaskOption | None,
        typer.Option(
            metavar="TASK",
            help="What the model is for, where it does not say so itself: text-classification, image-classification, "
            "causal-lm, feature-extraction or image-feature-extraction.",
        ),
    ] = None,
    sites: Annotated[str, typer.Option(help="Only sites with such names: 'encoder.layer.*'.")] = "*",
    quality_floor: Annotated[
        float | None, typer.Option(help="Least accuracy (0.9), or greatest perplexity (20), allowed.")
    ] = None,
    eval_data: Annotated[str, typer.Option(help="Other data to choose on.", rich_help_panel=_DATA)] = "",
    text_column: Annotated[
        str, typer.Option(help="Column of the text; two with a comma for pairs.", rich_help_panel=_DATA)
    ] = "",
    label_column: Annotated[str, typer.Option(help="Column of the class.", rich_help_panel=_DATA)] = "",
    image_column: Annotated[str, typer.Option(help="Column of the picture.", rich_help_panel=_DATA)] = "",
    limit: Annotated[
        int | None, typer.Option(min=2, help="At most so many rows of each part.", rich_help_panel=_DATA)
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Part to choose on, if there is none.", rich_help_panel=_DATA)
    ] = 0.1,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a row at most.", rich_help_panel=_DATA)] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of pictures.", rich_help_panel=_DATA)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.", rich_help_panel=_DATA)] = 32,
    samples: Annotated[int, typer.Option(min=16, help="Rows to calibrate on.", rich_help_panel=_SQUEEZE)] = 512,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same share of every site is kept.", rich_help_panel=_SQUEEZE)
    ] = False,
    round_to: Annotated[int, typer.Option(min=1, help="Widths are multiples of it.", rich_help_panel=_SQUEEZE)] = 1,
    linear_path: Annotated[
        bool,
        typer.Option("--linear-path", help="A linear map beside kept channels, if it pays.", rich_help_panel=_SQUEEZE),
    ] = False,
    vary: Annotated[
        bool, typer.Option("--vary", help="Calibrate on rearranged text, too.", rich_help_panel=_SQUEEZE)
    ] = False,
    heal: Annotated[int, typer.Option(min=0, help="Passes of distillation afterwards.", rich_help_panel=_SQUEEZE)] = 0,
    strength: Annotated[float, typer.Option(min=0, help="Of the pull on the slopes.", rich_help_panel=_COLLAPSE)] = 0.5,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="How near to 1 a slope is linear.", rich_help_panel=_COLLAPSE)
    ] = 0.05,
    order: Annotated[
        OrderOption, typer.Option(help="Which sites go first.", rich_help_panel=_COLLAPSE)
    ] = OrderOption.sensitivity,
    stages: Annotated[
        int, typer.Option(min=1, help="Rounds among which the sites are divided.", rich_help_panel=_COLLAPSE)
    ] = 1,
    criterion: Annotated[
        CriterionOption, typer.Option(help="Which activations go first.", rich_help_panel=_TLC)
    ] = CriterionOption.batchnorm,
    per_round: Annotated[int | None, typer.Option(min=1, help="So many go at a time.", rich_help_panel=_TLC)] = None,
    lower_bound: Annotated[str, typer.Option(help="Smallest width that is trained.", rich_help_panel=_DROPOUT)] = "25%",
    points: Annotated[int, typer.Option(min=2, help="Of the curve.", rich_help_panel=_DROPOUT)] = 8,
    heads: Annotated[bool, typer.Option("--heads", help="Attention heads, too.", rich_help_panel=_DROPOUT)] = False,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the data in each stage.", rich_help_panel=_TRAINING)
    ] = 3,
    dense_epochs: Annotated[
        int, typer.Option(min=0, help="Passes before, with the model as it is.", rich_help_panel=_TRAINING)
    ] = 0,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.", rich_help_panel=_TRAINING)] = 1e-4,
    augment: Annotated[
        bool, typer.Option("--augment", help="Move and mirror pictures at random.", rich_help_panel=_TRAINING)
    ] = False,
    precision: Annotated[
        PrecisionOption, typer.Option(help="Of the training.", rich_help_panel=_TRAINING)
    ] = PrecisionOption.no,
    device: Annotated[DeviceOption, typer.Option(help="Where to compute.", rich_help_panel=_RUN)] = DeviceOption.auto,
    seed: Annotated[int, typer.Option(help="Of everything that is random.", rich_help_panel=_RUN)] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on after an interruption, or not.", rich_help_panel=_RUN)
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", "-n", help="Tell the plan, and write nothing.", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, and nothing else.", rich_help_panel=_RUN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_RUN)] = False,
) -> None:
    """Make MODEL smaller with the help of DATA, and write the smaller model.

    Squeezing, the default, needs a few hundred rows, no labels and no training. The other methods train the model on
    DATA. The result is in --output: model.safetensors and shallower.json (shallower.load reads them), the tokenizer,
    the plan, and result.json with all numbers. It is written at the end, and only if the target was met. Ctrl-C leaves
    what was done beside the output, and the same command goes on from there.

    \b
    Examples:
      shallower compress ./my-bert --data reviews.csv --target params:80% \\
        --output smaller
      shallower compress timm:resnet18 --data photos/ --target latency:1.5x \\
        --heal 1 --output smaller
      shallower compress ./my-llama --data stories.txt --target drop:2% \\
        --output smaller --dry-run
      shallower compress ./my-bert --data reviews.csv --target macs:60% \\
        --method layer-collapse --epochs 3 --output smaller
    """
    from shallower.app.jobs import Job, run
    from shallower.app.jobs import dry_run as tell_only

    options = {
        "samples": samples,
        "uniform": uniform,
        "round_to": round_to,
        "linear_path": linear_path,
        "vary": vary,
        "heal": heal,
        "strength": strength,
        "tolerance": tolerance,
        "order": order.value,
        "stages": stages,
        "criterion": criterion.value,
        "per_round": per_round,
        "lower_bound": lower_bound,
        "points": points,
        "heads": heads,
    }
    method_run = _run(ctx, method.value, options)
    job = Job(
        model=model,
        data=data,
        target=_target(target) if target else None,
        output=output.expanduser(),
        run=method_run,
        task=task.value if task else None,
        eval_data=eval_data,
        text_column=text_column,
        label_column=label_column,
        image_column=image_column,
        limit=limit,
        held_out=held_out,
        length=length,
        image_size=image_size,
        augment=augment,
        epochs=epochs,
        dense_epochs=dense_epochs,
        lr=lr,
        batch_size=batch_size,
        sites=sites,
        quality_floor=quality_floor,
        precision=precision.value,
        device=device.value,
        seed=seed,
    )
    try:
        with _speaking(as_json, quiet):
            told = tell_only(job) if dry_run else run(job, resume=resume)
        _tell(told.text, told.data, as_json, quiet)
    except KeyboardInterrupt:
        if not dry_run:
            print(f"interrupted; the same command goes on from {job.progress}", file=sys.stderr)
        raise


@app.command(cls=Sections)
def pick(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a network trained at all widths.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="params:60%, macs:50%, memory:40MB, latency:1.5x or drop:1%.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the chosen model.")],
    original: Annotated[str, typer.Option(help="The factory, for a model of your own class.")] = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the model of the width that suits, out of DIR, where all were trained.

    Neither data nor training is needed. DIR is what compress --method structural-dropout wrote; its report.html
    shows the curve.

    \b
    Examples:
      shallower pick all-widths --target memory:50% --output half
      shallower pick all-widths --target drop:1% --output good
    """
    from shallower.app.picking import pick as picked

    goal = _target(target)
    with _speaking(as_json, quiet):
        told = picked(directory, goal, output.expanduser(), original=original)
    _tell(told.text, told.data, as_json, quiet)


@app.command(cls=Sections)
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")],
    as_json: JsonOption = False,
) -> None:
    """Several results in one table, each original model once.

    \b
    Example:
      shallower compare small-50 small-25 collapsed
    """
    from shallower.app.results import comparison, read_result

    with _speaking(as_json):
        results = {str(directory): read_result(directory.expanduser()) for directory in directories}
        text = comparison([directory.expanduser() for directory in directories])
    _tell(text, results, as_json)


@app.command(cls=Sections)
def bench(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a result.")],
    original: Annotated[str, typer.Option(help="The MODEL it was made of; by default what DIR says.")] = "",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas; by default torch's.")] = "",
    length: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 128,
    shape: Annotated[str, typer.Option(help="Shape of a row, for a factory: 3,32,32.")] = "",
    rounds: Annotated[int, typer.Option(min=2, help="How often each is timed.")] = 30,
    device: Annotated[DeviceOption, typer.Option(help="Where to compute.")] = DeviceOption.cpu,
    as_json: JsonOption = False,
) -> None:
    """Time a result against the model it was made of, over batch sizes and threads.

    The two are timed in turn, in one run; the ratios are taken within a round.

    \b
    Examples:
      shallower bench small
      shallower bench small --batch 1,8,32 --threads 1,4 --length 256
    """
    import torch

    from shallower.app.bench import bench as timed
    from shallower.app.bench import bench_json, bench_table, example_of, pair
    from shallower.app.jobs import device_named

    counts = _counts(batch, "--batch")
    runs = _counts(threads, "--threads") if threads else [torch.get_num_threads()]
    with _speaking(as_json):
        before, after = pair(directory, original)
        examples = [example_of(before, directory, batch=rows, length=length, shape=shape) for rows in counts]
        place = device_named(device.value)
        timings = timed(before.model.to(place), after.to(place), examples, runs, rounds=rounds)
    _tell(bench_table(timings), {"directory": str(directory), "timings": bench_json(timings)}, as_json)


@app.command(cls=Sections)
def export(
    directory: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .onnx or .pt2.")],
    original: Annotated[str, typer.Option(help="The factory, for a model of your own class.")] = "",
    length: Annotated[int, typer.Option(min=2, help="Tokens in a row of the example.")] = 16,
    shape: Annotated[str, typer.Option(help="Shape of a row, for a factory: 3,32,32.")] = "",
    fixed: Annotated[bool, typer.Option("--fixed", help="Only for batches and rows of the example's size.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a result, or any MODEL, as ONNX or .pt2, to run without this library.

    The file is run and compared with the model, on other batch sizes too.

    \b
    Examples:
      shallower export small small.onnx
      shallower export small small.pt2 --fixed
    """
    from shallower.app.bench import example_of, loaded_with
    from shallower.saving.exporting import export as exported

    with _speaking(as_json):
        loaded = loaded_with(directory, original)
        example = example_of(loaded, Path(directory), batch=2, length=length, shape=shape)
        told = exported(loaded.model, example, path.expanduser(), dynamic=None if fixed else "auto")
    data = {"files": list(map(str, told.files)), "dynamic": told.dynamic, "error": told.error, "checked": told.checked}
    _tell(str(told), data, as_json)


@app.command(cls=Sections)
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a result.")],
) -> None:
    """Write report.html of a result anew; every run writes one.

    \b
    Example:
      shallower report small
    """
    from shallower.app.report.page import write_report

    print(write_report(directory.expanduser()))


@app.command(cls=Sections)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of everything that is random.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Train for a moment only.")] = False,
) -> None:
    """Train two small networks on scanned digits, squeeze both, save them and check them.

    \b
    Example:
      shallower demo --output demo-out
    """
    from shallower.app.demo import run

    print(run(output.expanduser(), seed=seed, quick=quick))


@contextlib.contextmanager
def _speaking(as_json: bool, quiet: bool = False) -> Iterator[None]:
    """Keep stdout for the one JSON object, or the terminal quiet."""
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if as_json or quiet:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _tell(text: str, data: Mapping[str, Any], as_json: bool, quiet: bool = False) -> None:
    if as_json:
        print(json.dumps(data, indent=2))
    elif not quiet:
        print(text)


def _target(text: str) -> Any:
    from shallower.planning.targets import Target

    try:
        return Target.parse(text)
    except TargetError as error:
        raise typer.BadParameter(str(error), param_hint="'--target'") from error


def _counts(text: str, option: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{text!r}: give numbers from 1, with commas: 1,8,32", param_hint=f"'{option}'")
    return counts


def _run(ctx: typer.Context, method: str, options: Mapping[str, Any]) -> MethodRun:
    """The method with its own options; options of another method are wrong usage."""
    from dataclasses import fields

    from shallower.app.runs import run_named, run_names

    # By its name, since typer may bring a click of its own.
    given = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    own = {field.name for field in fields(run_named(method))}  # type: ignore[arg-type]
    for other in run_names():
        for field in fields(run_named(other)):  # type: ignore[arg-type]
            if field.name in given - own:
                option = "--" + field.name.replace("_", "-")
                raise typer.BadParameter(
                    f"it is for --method {other}; --method {method} does not know it", param_hint=f"'{option}'"
                )
    run = run_named(method, **{name: options[name] for name in own})
    trains = run.needs_labels or (options["heal"] and "heal" in own) or ctx.params["dense_epochs"]
    if run.needs_target and not ctx.params["target"]:
        raise typer.BadParameter("say how small, how fast or how good: params:60%", param_hint="'--target'")
    if not run.needs_target and ctx.params["target"]:
        raise typer.BadParameter(
            f"--method {method} trains all sizes at once: choose one afterwards, with shallower pick "
            f"{ctx.params['output']} --target {ctx.params['target']}",
            param_hint="'--target'",
        )
    if "epochs" in given and not run.needs_labels:
        raise typer.BadParameter(
            f"--method {method} does not train; --heal {ctx.params['epochs']} distils the result from the original",
            param_hint="'--epochs'",
        )
    for name in ("lr", "augment", "precision"):
        if name in given and not trains:
            raise typer.BadParameter(
                f"--method {method} does not train, unless with --heal or --dense-epochs", param_hint=f"'--{name}'"
            )
    if "held_out" in given and ctx.params["eval_data"]:
        raise typer.BadParameter(
            "--eval-data says what to choose on: leave one of the two out", param_hint="'--held-out'"
        )
    return run


def _loaded(model: str, meta: bool) -> LoadedModel:
    from shallower.app.models import load_model

    if not meta:
        return load_model(model)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return load_model(model, pretrained=False)


def _sites_json(sites: Sites) -> dict[str, Any]:
    costs = ("params", "macs", "params_collapsed", "macs_collapsed")
    return {
        "params": sites.params,
        "macs": sites.macs,
        "sites": [{**site.to_json(), **{cost: getattr(site, cost) for cost in costs}} for site in sites],
        "skipped": dict(sites.skipped),
    }

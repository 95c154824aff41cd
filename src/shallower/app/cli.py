"""The command line: inspect, compress, pick, compare, bench, export, report, demo.

Nothing heavy is imported before a command runs, so that --help answers at once. Every failure ends in `main` as one
line on stderr; see `failures`.
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

from shallower.app.failures import DEBUG, on_stderr, one_line, plain_warnings, print_traceback, terminable
from shallower.app.options import (
    METHODS,
    MOST_SEED,
    TARGET_TEXT,
    DataOptions,
    Goal,
    Manner,
    MethodOptions,
    RunOptions,
    Scope,
    TrainingOptions,
)
from shallower.app.parameters import given_options, with_options, wrong_usage
from shallower.errors import ShallowerError, SiteError, TargetError

if TYPE_CHECKING:
    from shallower.app.models import LoadedModel
    from shallower.planning.targets import Target
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

    def invoke(self, ctx: Any) -> Any:
        """Run the command. What ends the process in code of the user's is a failure, not a silent exit."""
        try:
            return super().invoke(ctx)
        except SystemExit as error:
            raise ShallowerError(
                f"the model's or the data's own code ended the program: sys.exit({error.code!r}) was called"
            ) from error


app = typer.Typer(
    name="shallower",
    help="Make trained PyTorch networks shallower and narrower.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="A MODEL is a directory (of Transformers, or one that a command here wrote), a name on the hub, timm:NAME, "
    "torchvision:NAME or package.module:factory; the last three with options, 'NAME?num_classes=10'. "
    "Exit codes: 0 success, 1 error (one line on stderr), 2 wrong usage, 3 target not met, "
    "4 far below the original (with --strict), 130 interrupted.",
)

FAR_BELOW = 4
"""The exit status of `compress --strict` where the result is far below the original."""

_KINDS_HELP = "Which sites: hidden, heads, stream, experts, activation, branch; several with commas, or all."
_MODEL_HELP = "A directory, a hub name, timm:NAME, torchvision:NAME or package.module:factory."


class DeviceOption(str, Enum):
    """What --device takes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


def main() -> None:
    """Run the command line. Whatever fails is one line on stderr, and the exit status is 1, or 3 for a target."""
    try:
        with terminable(), plain_warnings():
            app(prog_name="shallower")
    except Exception as error:
        print_traceback(error)
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(3 if isinstance(error, TargetError) else 1)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shallower {version('shallower')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks, too.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"
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
    kinds: Annotated[str, typer.Option(help=_KINDS_HELP)] = "hidden",
    meta: Annotated[bool, typer.Option("--meta", help="Read no weights: for very large models.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what can be squeezed in MODEL, what it costs now, and what was skipped and why.

    \b
    Examples:
      shallower inspect bert-base-uncased
      shallower inspect timm:vit_tiny_patch16_224 --batch 8
      shallower inspect meta-llama/Llama-2-7b-hf --meta --length 512
      shallower inspect torchvision:resnet18 --kinds hidden,stream
      shallower inspect my_project.nets:make_mixture --kinds experts
      shallower inspect my_project.nets:make_net --shape 3,32,32
    """
    from shallower.app.bench import example_of
    from shallower.app.report.stock import stock_sentence
    from shallower.finding.kinds import find_sites, kinds_of
    from shallower.methods.offered import LEGEND, lettered, offered

    chosen = kinds_of(kinds)
    with _speaking(as_json):
        loaded = _loaded(model, meta)
        example = example_of(loaded, Path(model), batch=batch, length=length, shape=shape)
        sites = find_sites(loaded.model, example, kinds=chosen)
    said = stock_sentence(Path(model).expanduser())
    text = f"{sites.described(lettered(sites), LEGEND)}\n{said}"
    _tell(text.rstrip(), {**_sites_json(sites), "methods": offered(sites), "stock": said}, as_json)
    if not len(sites):
        raise SiteError(f"{model} has no site that can be squeezed")


@app.command(cls=Sections)
@with_options(variants={MethodOptions: METHODS})
def compress(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    goal: Goal,
    rows: DataOptions,
    method: MethodOptions,
    scope: Scope,
    training: TrainingOptions,
    machine: RunOptions,
    manner: Manner,
) -> None:
    """Make MODEL smaller with the help of DATA, and write the smaller model.

    It takes --minutes: channels are squeezed on a few hundred rows, what is left of the time heals the result by
    distillation, and where DATA has labels and time is left even then, layers that collapse by training are tried.
    No labels are needed. The last words are what was done, what it cost, and what more time would bring. Other
    methods do only what they say (--method).

    The result is in --output: model.safetensors and shallower.json (shallower.load reads them), the tokenizer, the
    plan, a report, and result.json with all numbers. It is written at the end, and only if the target was met. After
    Ctrl-C the work so far is kept beside the output, and the same command continues from there.

    A result far below the original (more than a third of what that has above chance is lost, or the perplexity
    doubled) is a warning in red, and with --strict the exit status 4.

    \b
    Examples:
      shallower compress ./my-bert --data reviews.csv --target params:80% \\
        --output smaller
      shallower compress timm:resnet18 --data photos/ --target latency:1.5x \\
        --minutes 10 --output smaller
      shallower compress ./my-llama --data stories.txt --target drop:2% \\
        --output smaller --dry-run
      shallower compress ./my-bert --data reviews.csv --target macs:80% \\
        --method layer-collapse --epochs 3 --output smaller
    """
    given = given_options(context)
    _check_usage(given, method, goal, training, rows)
    from shallower.app.jobs import Job, dry_run, run
    from shallower.app.runs import run_of

    target = _target(goal.target) if goal.target else None
    output = goal.output.expanduser()
    job = Job(model, goal.data, target, output, run_of(method), scope, rows, training, machine, goal.minutes)
    try:
        with _speaking(manner.as_json, manner.quiet):
            answer = dry_run(job) if manner.dry_run else run(job, resume=manner.resume, tell=on_stderr)
    except KeyboardInterrupt:
        if not manner.dry_run:
            print(f"interrupted; the same command continues from {job.progress}", file=sys.stderr)
        raise
    _tell(answer.text, answer.data, manner.as_json, manner.quiet)
    for alarm in () if manner.quiet else answer.alarms:
        typer.secho(f"warning: {alarm}", fg=typer.colors.RED, bold=True, err=True)
    if answer.alarms and manner.strict:
        raise typer.Exit(FAR_BELOW)


@app.command(cls=Sections)
def pick(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run that made several sizes.")],
    target: Annotated[str, typer.Option("--target", "-t", help=TARGET_TEXT)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the chosen model.")],
    original: Annotated[str, typer.Option(help="The MODEL, if it is a factory or was moved.")] = "",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write another size of the same run, in seconds: the best one that meets the target.

    Neither data nor training is needed. DIR is what compress --sizes 5 wrote, or compress --method
    structural-dropout, which trains all widths; its report.html shows the curve. Sizes that were squeezed are made of
    the original model again, which has to be where it was.

    \b
    Examples:
      shallower pick smaller --target size:50% --output half
      shallower pick smaller --target drop:1% --output good
    """
    from shallower.app.picking import pick_into

    goal = _target(target)
    with _speaking(as_json, quiet):
        told = pick_into(directory, goal, output.expanduser(), original=original)
    _tell(told.text, told.data, as_json, quiet)


@app.command("compare", cls=Sections)
def compare_results(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of results.")],
    as_json: JsonOption = False,
) -> None:
    """Several results in one table, each original model once.

    \b
    Example:
      shallower compare small-50 small-25 collapsed
    """
    from shallower.app.results import comparison, read_record
    from shallower.core.codec import encode

    with _speaking(as_json):
        results = {str(directory): read_record(directory.expanduser()) for directory in directories}
        text = comparison(results)
    _tell(text, encode(results), as_json)


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

    counts = _parsed_counts(batch, "--batch")
    runs = _parsed_counts(threads, "--threads") if threads else [torch.get_num_threads()]
    with _speaking(as_json):
        before, after = pair(directory, original)
        examples = [example_of(before, directory, batch=rows, length=length, shape=shape) for rows in counts]
        place = device_named(device.value)
        timings = timed(before.model.to(place), after.to(place), examples, runs, rounds=rounds)
    _tell(bench_table(timings), {"directory": str(directory), "timings": bench_json(timings)}, as_json)


@app.command("export", cls=Sections)
def export_model(
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
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Random seed.")] = 0,
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


def _target(text: str) -> Target:
    from shallower.planning.targets import Target

    try:
        return Target.parse(text)
    except TargetError as error:
        raise typer.BadParameter(str(error), param_hint="'--target'") from error


def _parsed_counts(text: str, option: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{text!r}: give numbers from 1, with commas: 1,8,32", param_hint=f"'{option}'")
    return counts


def _check_usage(
    given: set[str], method: MethodOptions, goal: Goal, training: TrainingOptions, rows: DataOptions
) -> None:
    """Refuse options that mean nothing together.

    Raises:
        BadParameter: the first of them; the exit status is then 2.
    """
    if method.needs_target and not goal.target:
        raise wrong_usage("say how small, how fast or how good: params:60%", "target")
    if "minutes" in given and not method.decides:
        raise wrong_usage(f"--method {method.name} is not bounded by minutes: leave --method out", "minutes")
    if not method.needs_target and goal.target:
        raise wrong_usage(
            f"--method {method.name} trains all sizes at once: choose one afterwards, with shallower pick "
            f"{goal.output} --target {goal.target}",
            "target",
        )
    if "epochs" in given and method.decides:
        raise wrong_usage(f"--method {method.name}: the --minutes say how long it trains", "epochs")
    if "epochs" in given and not method.needs_labels:
        raise wrong_usage(
            f"--method {method.name} does not train; --heal {training.epochs} distils the result from the original",
            "epochs",
        )
    for name in ("lr", "augment", "precision"):
        if name in given and not method.trains and not training.dense_epochs:
            raise wrong_usage(f"--method {method.name} does not train, unless with --heal or --dense-epochs", name)
    if "held_out" in given and rows.eval_data:
        raise wrong_usage("--eval-data is the validation data: leave one of the two out", "held_out")


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

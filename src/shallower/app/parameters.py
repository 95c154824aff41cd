"""Options of the command line made of the fields of dataclasses.

    @app.command()
    @with_options(variants={MethodOptions: METHODS})
    def compress(context: typer.Context, model: str, rows: DataOptions, method: MethodOptions) -> None: ...

`--help` then shows every field of `DataOptions`, `--method`, and the fields of every method under its title. The
function gets whole objects; an option of a method that was not chosen is wrong usage.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from shallower.core.codec import field_names
from shallower.core.options import Options, choices_of, hints_of, kinds_of
from shallower.errors import ShallowerError

Variants = Mapping[Any, Mapping[str, type[Options]]]


def with_options(variants: Variants | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator of commands: each parameter that is a dataclass of options becomes the options of its fields.

    Args:
        variants: for a base class the classes one of which is chosen, by the name that chooses it; the first is the
            default. The option that chooses is called as the parameter; the base class has its help in `about` and
            other names in `short`. The command takes a `typer.Context`.
    """
    known = variants or {}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        context = next((name for name, parameter in own.items() if parameter.annotation is typer.Context), "")

        @functools.wraps(function)
        def command(**values: Any) -> None:
            given: dict[str, Any] = {}
            for name, parameter in own.items():
                kind = parameter.annotation
                if kind in known:
                    given[name] = _chosen(known[kind], name, values, values[context])
                elif _is_options(kind):
                    given[name] = _made(kind, values)
                else:
                    given[name] = values[name]
            function(**given)

        parameters = [expanded for parameter in own.values() for expanded in _expanded(parameter, known)]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def given_options(context: typer.Context) -> set[str]:
    """The names of the parameters that stand on the command line, not those that have their default."""
    # By the name of the source, since typer may bring a click of its own.
    return {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def flag_of(name: str) -> str:
    """The option that a field is: `--per-round` for `per_round`."""
    return "--" + name.replace("_", "-")


def wrong_usage(message: str, name: str) -> typer.BadParameter:
    """The error, to be raised, that exits with 2 and names an option."""
    return typer.BadParameter(message, param_hint=f"'{flag_of(name)}'")


def _is_options(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Options)


def _expanded(parameter: inspect.Parameter, variants: Variants) -> Iterator[inspect.Parameter]:
    kind = parameter.annotation
    if kind in variants:
        names = tuple(variants[kind])
        told = typer.Option(flag_of(parameter.name), *kind.short, help=kind.about)
        yield _parameter(parameter.name, names[0], _enum(names), told)
        seen: set[str] = set()
        for variant in variants[kind].values():
            for field in _fields(variant):
                # an option that several variants have stands with the first
                if field.name not in seen:
                    yield field
                seen.add(field.name)
    elif _is_options(kind):
        yield from _fields(kind)
    else:
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _fields(kind: type[Options]) -> Iterator[inspect.Parameter]:
    """The fields with a text, as parameters of a command."""
    for field in dataclasses.fields(kind):
        about = field.metadata
        if not about.get("text"):
            continue
        hint = hints_of(kind)[field.name]
        flags = about["flags"]
        # Without a name of its own, a switch that is off has no --no-... form.
        if not flags and hint is bool:
            flags = (flag_of(field.name),)
        told = typer.Option(
            *flags,
            help=about["text"],
            min=about["least"],
            max=about["most"],
            metavar=about["metavar"] or None,
            rich_help_panel=getattr(kind, "title", None),
        )
        yield _parameter(field.name, field.default, _hint_of(hint), told)


def _parameter(name: str, default: Any, hint: Any, told: Any) -> inspect.Parameter:
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, told])


def _hint_of(hint: Any) -> Any:
    """The hint as typer reads it: an Enum in the place of a Literal."""
    choices = choices_of(hint)
    if not choices:
        return hint
    enum = _enum(choices)
    return enum | None if kinds_of(hint) != (hint,) else enum


def _enum(names: tuple[str, ...]) -> Any:
    return Enum("Choice", {name: name for name in names}, type=str)


def _made(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """The options of a class, out of all values that were read.

    Raises:
        BadParameter: a value is out of range.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in values:
            found[field.name] = _plain_default(values[field.name])
    try:
        return kind(**found)
    except ShallowerError as error:
        raise typer.BadParameter(str(error)) from error


def _chosen(
    variants: Mapping[str, type[Options]], choice: str, values: Mapping[str, Any], context: typer.Context
) -> Options:
    """The options of the variant that was chosen.

    Raises:
        BadParameter: an option of another variant was given.
    """
    name = _plain_default(values[choice])
    given = given_options(context) - field_names(variants[name])
    for other, kind in variants.items():
        for field in dataclasses.fields(kind):
            if field.name in given:
                raise wrong_usage(
                    f"{flag_of(choice)} {name} has no such option (it belongs to {flag_of(choice)} {other})", field.name
                )
    # a default is the chosen variant's own, whatever the others with such an option have
    return _made(variants[name], {field: values[field] for field in given_options(context) if field in values})


def _plain_default(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value

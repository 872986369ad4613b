"""Options that formats declare, as options of commands; and what they turn into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from ..convert.format import Format
from ..convert.options import Command as CommandName
from ..convert.options import FormatOptions, Option, options_of
from ..convert.registry import format_named, format_naming, format_nearly_naming, formats
from ..tables import listed
from .types import EXISTING_DIRECTORY, EXISTING_FILE, MIB, MODEL, SIZE, Names

__all__ = ["FORMAT_OPTION", "FormatChoice", "chosen_formats", "format_options", "owners", "take_recipe"]

Command = TypeVar("Command", bound=Callable[..., Any])

FORMAT_OPTION = click.option(
    "--format",
    "output_format",
    type=Names(list(formats())),
    metavar=f"[{'|'.join(formats())}][,...]",
    help="Output format. Several formats make every size in each.  [default: what OUTPUT's name, --type or --size-of "
    f"implies, else {next(iter(formats()))}]",
)


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """The formats that a command is about, and the options of all formats that its user gave.

    Attributes:
        formats: The formats, at least one.
        all: Options by name of a format.
    """

    formats: tuple[Format, ...]
    all: Mapping[str, FormatOptions]

    @property
    def format(self) -> Format:
        """The only format, or the first."""
        return self.formats[0]

    @property
    def options(self) -> FormatOptions:
        """Options of that format."""
        return self.all[self.format.name]

    @property
    def each(self) -> tuple[FormatOptions, ...]:
        """Options of every chosen format."""
        return tuple(self.all[each.name] for each in self.formats)

    def weighted_by(self, measurement: Path) -> FormatChoice:
        """Return the choice where a measurement only weighs errors; see ``FormatOptions.weighted_by``."""
        return replace(self, all={name: options.weighted_by(measurement) for name, options in self.all.items()})


def chosen_formats(parameters: Mapping[str, Any]) -> tuple[Format, ...]:
    """Return the formats that a command's parameters ask for.

    That is ``--format``, else OUTPUT's ending, else an option that only goes with one, else the first of all.

    Raises:
        click.UsageError: OUTPUT has nearly the ending of a format's files.
    """
    named, output = parameters.get("output_format"), parameters.get("output")
    if named is not None:
        chosen = tuple(map(format_named, dict.fromkeys([named] if isinstance(named, str) else named)))
    else:
        naming = None if output is None else format_naming(output)
        chosen = (naming or _implied(parameters) or next(iter(formats().values())),)
    near = format_nearly_naming(output) if output is not None and "output_format" in parameters else None
    if output is not None and near is not None and (near in chosen or named is None):
        raise click.UsageError(
            f"{output} ends in {output.suffix}. Did you mean {near.suffix}? Otherwise choose a --format."
        )
    return chosen


def _implied(parameters: Mapping[str, Any]) -> Format | None:
    # Targets may be one argument already.
    names = parameters.get("size_of") or getattr(parameters.get("targets"), "size_of", None)
    for each in formats().values():
        if names and set(names) <= set(each.size_names):
            return each
        declared = options_of(each.Options, "quantize").values()
        if any(option.implies and parameters.get(option.name) for option in declared):
            return each
    return None


def owners(command: str) -> dict[str, list[Format]]:
    """Return the formats that declare each of a command's parameters, by name of the parameter."""
    found: dict[str, list[Format]] = {}
    for each in formats().values():
        for declared in options_of(each.Options, command).values():  # type: ignore[arg-type]
            found.setdefault(declared.name, []).append(each)
    return found


def format_options(name: CommandName) -> Callable[[Command], Command]:
    """Give a command the options of all formats; it gets a ``FormatChoice`` as ``choice``."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**parameters: Any) -> Any:
            asked = chosen_formats(parameters)
            given = {parameter: parameters.pop(parameter) for parameter in owners(name)}
            _refuse_two_meanings(name, asked, given)
            # A command without --format is for all formats.
            chosen = [each.name for each in asked] if "output_format" in parameters else formats()
            sized = "targets" not in parameters or bool(parameters["targets"].count)
            options = {
                each.name: _read(each, name, given, chosen=each.name in chosen, sized=sized)
                for each in formats().values()
            }
            parameters.pop("output_format", None)
            return command(**parameters, choice=FormatChoice(asked, options))

        declared: dict[str, list[tuple[Format, Option]]] = {}
        for each in formats().values():
            for option in options_of(each.Options, name).values():
                declared.setdefault(option.name, []).append((each, option))
        for group in reversed(declared.values()):
            run = _click_option(group)(run)
        return run  # type: ignore[return-value]  # it takes what the command takes, from click

    return decorate


def _click_option(group: list[tuple[Format, Option]]) -> Callable[[Command], Command]:
    # One option, though several formats may declare it.
    first = group[0][1]
    titles: dict[str, list[str]] = {}
    for each, option in group:
        titles.setdefault(option.described, []).append(each.title)
    text = " ".join(f"{', '.join(titled)}: {said}" if len(titles) > 1 else said for said, titled in titles.items())
    if first.kind in ("flag", "negated"):
        return click.option(*first.flags, is_flag=True, default=None, help=text)
    choices = [choice for _, option in group for choice in option.choices]
    kinds: dict[str, Any] = {
        "file": EXISTING_FILE,
        "directory": EXISTING_DIRECTORY,
        "model": MODEL,
        "integer": click.INT,
        "mebibytes": click.IntRange(1),
        "size": SIZE,
    }
    kind = click.Choice(list(dict.fromkeys(choices))) if choices else kinds.get(first.kind, click.STRING)
    return click.option(
        *first.flags, type=kind, multiple=first.repeatable, metavar=first.metavar, default=None, help=text
    )


def _read(
    format_: Format, command: CommandName, given: Mapping[str, Any], *, chosen: bool, sized: bool
) -> FormatOptions:
    # Of other formats only what can be read: an option of several may be meant for another.
    values: dict[str, Any] = {}
    for field, option in options_of(format_.Options, command).items():
        value = given[option.name]
        if value is None or value == () or (not chosen and len(owners(command)[option.name]) > 1):
            continue
        values[field] = _value(option, value)
    options: FormatOptions = format_.completed(format_.Options(**values), sized=sized)
    return options


def _refuse_two_meanings(command: CommandName, chosen: Sequence[Format], given: Mapping[str, Any]) -> None:
    for name, declared in owners(command).items():
        readings = {
            option.parse
            for each in chosen
            if each in declared
            for option in options_of(each.Options, command).values()
            if option.name == name
        }
        if given[name] and len(readings) > 1:
            raise click.UsageError(
                f"--{name.replace('_', '-')} means different things for {listed([each.title for each in chosen])}. "
                "Make one format after the other, from the same --measurement."
            )


def _value(option: Option, value: Any) -> Any:
    if option.kind == "negated":
        return not value
    if option.kind == "mebibytes":
        return value * MIB
    if option.repeatable:
        return tuple(value) if option.parse is None else tuple(map(option.parse, value))
    return value if option.parse is None else option.parse(value)


def take_recipe(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take what a recipe says as defaults of a command: the command line goes first. A callback of an option.

    Raises:
        UsageError: The recipe names options that the command does not have.
        ConfigError: It cannot be read.
    """
    from ..quantize.recipe import read_recipe

    if path is None:
        return
    options = [each for each in context.command.params if isinstance(each, click.Option)]
    known = {each.opts[-1].removeprefix("--"): each for each in options if each.name != "config"}
    entries = read_recipe(path)
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise click.UsageError(
            f"{path}: unknown options. Got {', '.join(unknown)}. Expected long names of options, such as bpw. Leave "
            f"{'it' if len(unknown) == 1 else 'them'} out."
        )
    context.default_map = {
        str(known[name].name): _of_recipe(known[name], value, context) for name, value in entries.items()
    }


def _of_recipe(option: click.Option, value: str | list[str], context: click.Context) -> Any:
    if option.multiple:
        return value if isinstance(value, list) else [value]
    text = ",".join(value) if isinstance(value, list) else value
    return click.BOOL.convert(text, option, context) if option.is_flag else text

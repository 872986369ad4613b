"""Options that formats declare, as options of commands; and what they turn into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from ..convert.format import Format
from ..convert.options import Command as CommandName
from ..convert.options import FormatOptions, Option, options_of
from ..convert.registry import format_named, format_naming, formats
from .types import EXISTING_DIRECTORY, EXISTING_FILE, MIB

__all__ = ["FORMAT_OPTION", "FormatChoice", "chosen_format", "format_options", "owners"]

Command = TypeVar("Command", bound=Callable[..., Any])

FORMAT_OPTION = click.option(
    "--format",
    "output_format",
    type=click.Choice(list(formats())),
    help=f"Format of OUTPUT.  [default: as OUTPUT is named, else {next(iter(formats()))}]",
)


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """The format that a command is about, and the options of all formats that its user gave.

    Attributes:
        format: The format.
        all: Options by name of a format.
    """

    format: Format
    all: Mapping[str, FormatOptions]

    @property
    def options(self) -> FormatOptions:
        """Options of the chosen format."""
        return self.all[self.format.name]


def chosen_format(parameters: Mapping[str, Any]) -> Format:
    """Return the format that a command's parameters ask for: by ``--format``, else by OUTPUT's ending."""
    if parameters.get("output_format") is not None:
        return format_named(parameters["output_format"])
    output = parameters.get("output")
    named = None if output is None else format_naming(output)
    return named or next(iter(formats().values()))


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
            format_ = chosen_format(parameters)
            given = {parameter: parameters.pop(parameter) for parameter in owners(name)}
            chosen = {format_.name} if "output_format" in parameters else formats()  # a command for all formats
            options = {each.name: _read(each, name, given, chosen=each.name in chosen) for each in formats().values()}
            parameters.pop("output_format", None)
            return command(**parameters, choice=FormatChoice(format_, options))

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
        "integer": click.INT,
        "mebibytes": click.IntRange(1),
    }
    kind = click.Choice(list(dict.fromkeys(choices))) if choices else kinds.get(first.kind, click.STRING)
    return click.option(
        *first.flags, type=kind, multiple=first.repeatable, metavar=first.metavar, default=None, help=text
    )


def _read(format_: Format, command: CommandName, given: Mapping[str, Any], *, chosen: bool) -> FormatOptions:
    # Of other formats only what can be read: an option of several may be meant for another.
    values = {}
    for field, option in options_of(format_.Options, command).items():
        value = given[option.name]
        if value is None or value == () or (not chosen and len(owners(command)[option.name]) > 1):
            continue
        values[field] = _value(option, value)
    return format_.Options(**values)


def _value(option: Option, value: Any) -> Any:
    if option.kind == "negated":
        return not value
    if option.kind == "mebibytes":
        return value * MIB
    if option.repeatable:
        return tuple(value) if option.parse is None else tuple(map(option.parse, value))
    return value if option.parse is None else option.parse(value)

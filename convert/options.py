"""Options that only one format knows, declared once: as fields of its ``Options``, from which commands take theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError

__all__ = [
    "Conflict",
    "Effort",
    "FormatOptions",
    "Option",
    "check_effort",
    "effort_option",
    "option",
    "options_of",
    "read_texts",
]

Effort = Literal["normal", "high"]
"""What is done after rounding: ``high`` fits the decoder's scales to the original's predictions."""

Kind = Literal["text", "flag", "negated", "file", "directory", "model", "mebibytes", "size", "integer"]
Command = Literal["measure", "plan", "quantize"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How a command offers a field.

    Attributes:
        flags: Its names on the command line, the long one last.
        help: What it does; begins with a verb or a noun and names units.
        commands: The commands that take it.
        kind: What its text is: ``flag`` is false unless given, ``negated`` true unless given, ``file`` and
            ``directory`` must exist, a ``model`` must or be on the Hub.
        choices: The texts that are allowed; empty for any.
        repeatable: Whether it may be given several times; the field is a tuple then.
        metavar: What help calls the value; None for the usual.
        parse: Makes the field's value of the text, or of each of the texts.
        recorded: Whether a recipe tells it: not what only says where something lies on a machine.
        implies: Whether giving it chooses the format, where nothing else does.
        default: The field's default.
    """

    flags: tuple[str, ...]
    help: str
    commands: tuple[Command, ...] = ("quantize",)
    kind: Kind = "text"
    choices: tuple[str, ...] = ()
    repeatable: bool = False
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None
    recorded: bool = True
    implies: bool = False
    default: Any = None

    @property
    def described(self) -> str:
        """The help, with the default as a user would give it; without where leaving the option out says it all."""
        if self.kind in ("flag", "negated") or self.default in (None, ()):
            return self.help
        default = self.default
        if self.kind == "mebibytes":
            default //= _MIB
        elif self.kind == "size":
            default = f"{default / 1e9:g}GB"
        return f"{self.help}  [default: {default}]"

    @property
    def name(self) -> str:
        """Name of the command's parameter."""
        return self.flags[-1].lstrip("-").replace("-", "_")


@dataclass(frozen=True, slots=True)
class Conflict:
    """A way to use a command, and the options that have no effect then.

    Attributes:
        when: What it is called in a message, after "has no effect".
        applies: Whether a command's parameters, by name, ask for it.
        options: Names of the parameters without effect.
        reason: Goes on after a colon.
    """

    when: str
    applies: Callable[[Mapping[str, Any]], bool]
    options: tuple[str, ...]
    reason: str


class FormatOptions:
    """Base of every format's ``Options``: a frozen, keyword-only dataclass whose fields were made by ``option``."""

    __slots__ = ()

    @property
    def measures(self) -> bool:
        """Whether plans are made from a measurement, for a target."""
        return True

    @property
    def equalizes(self) -> bool:
        """Whether the format takes an original whose channels were equalized."""
        return True

    def weighted_by(self, measurement: Path) -> FormatOptions:
        """Return the options of a run beside a measurement that its plan is not made from."""
        return self

    @property
    def label(self) -> str | None:
        """The size in names of outputs where the options say it; None where a target does."""
        return None


def option(*flags: str, default: Any, help: str, **settings: Any) -> Any:
    """Return a dataclass field that commands offer as an option.

    Args:
        *flags: As for ``Option``.
        default: The field's default.
        help: As for ``Option``.
        **settings: The other attributes of ``Option``.
    """
    declared = Option(flags=flags, default=default, help=help, **settings)
    return dataclasses.field(default=default, metadata={"option": declared})


def effort_option() -> Any:
    """Return the field of formats that offer ``Effort``."""
    return option(
        "--effort",
        default="normal",
        choices=get_args(Effort),
        help="high also fits scales to the original's predictions at the end; worth it at 3 bits and below.",
    )


def read_texts(options: FormatOptions) -> None:
    """Make the values of fields that were given as text, as a command does: paths, overrides; for ``__post_init__``."""
    for field in dataclasses.fields(options):  # type: ignore[arg-type]  # formats' options are dataclasses
        declared, value = field.metadata["option"], getattr(options, field.name)
        if declared.kind in ("file", "directory") and isinstance(value, str):
            object.__setattr__(options, field.name, Path(value))
        elif declared.repeatable and declared.parse is not None:
            read = tuple(declared.parse(each) if isinstance(each, str) else each for each in value)
            object.__setattr__(options, field.name, read)


def check_effort(effort: str) -> None:
    """Refuse what is no ``Effort``.

    Raises:
        ConfigError: It is not.
    """
    if effort not in get_args(Effort):
        raise ConfigError(f"effort: not usable. Got {effort!r}. Expected one of {get_args(Effort)}. Choose another.")


def options_of(options: type[FormatOptions], command: Command) -> dict[str, Option]:
    """Return the options of a command that a format's ``Options`` declare, by field."""
    declared = {each.name: each.metadata["option"] for each in dataclasses.fields(options)}  # type: ignore[arg-type]
    return {name: each for name, each in declared.items() if command in each.commands}

"""Types of arguments that commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
from click.shell_completion import CompletionItem

__all__ = [
    "DIRECTORY",
    "EXISTING_DIRECTORY",
    "EXISTING_FILE",
    "EXISTING_PATH",
    "FILE",
    "LENGTHS",
    "MIB",
    "MODEL",
    "NAMES",
    "PATH",
    "RATES",
    "SIZE",
    "TOKENS",
    "Names",
]

MIB = 1 << 20


class Place(click.Path):
    """A path; ``~`` is the user's home directory, as a shell leaves it in ``--option=~/x``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..checkpoint.files.paths import named

        text = os.path.expanduser(value)  # noqa: PTH111 - Path's raises where there is no home
        if not text:
            self.fail("the path is empty: is a variable of the shell not set?", param, ctx)
        # "." and ".." get a name, which files beside them are named after.
        return super().convert(named(Path(text)), param, ctx)


class ModelName(Place):
    """A path that exists, or the name of a model on the Hub, which ``locate_model`` downloads."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..checkpoint.model.hub_name import HubName
        from ..convert.registry import format_naming

        name = HubName.parse(value) if isinstance(value, str) else None
        on_hub = name is not None and "/" in name.repo and format_naming(Path(name.repo)) is None
        return value if on_hub and not Path(value).exists() else super().convert(value, param, ctx)


FILE = Place(dir_okay=False, path_type=Path)
EXISTING_FILE = Place(exists=True, dir_okay=False, path_type=Path)
DIRECTORY = Place(file_okay=False, path_type=Path)
EXISTING_DIRECTORY = Place(exists=True, file_okay=False, path_type=Path)
EXISTING_PATH = Place(exists=True, path_type=Path)
MODEL = ModelName(exists=True, path_type=Path)
PATH = Place(path_type=Path)


class Size(click.ParamType[int]):
    """A number of bytes, with a unit or without."""

    name = "size"
    _UNITS: ClassVar = {
        "": 1,
        "b": 1,
        "kb": 10**3,
        "mb": 10**6,
        "gb": 10**9,
        "kib": 1 << 10,
        "mib": 1 << 20,
        "gib": 1 << 30,
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) *([a-z]*)", str(value).lower())
        if match is None or match[2] not in self._UNITS:
            self.fail(f"{value!r} is not a valid size. Use 5GB, 700MiB or a number of bytes.", param, ctx)
        return int(float(match[1]) * self._UNITS[match[2]])


class Tokens(click.ParamType[int]):
    """A number of tokens, in units of 1024 where it ends in ``k``."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([1-9][0-9]{0,17})(k?)", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a valid number of tokens. Use 32768 or 32k.", param, ctx)
        return int(match[1]) * (1024 if match[2] else 1)


class Rates(click.ParamType[tuple[float, ...]]):
    """Bitrates, separated by commas."""

    name = "bpw[,bpw...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a valid bitrate. Use 4.5, or several as 8.0,6.0,4.5.", param, ctx)
        if len(set(rates)) < len(rates):
            self.fail(f"{value!r} names a bitrate twice.", param, ctx)
        return rates


class Lengths(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens, separated by commas."""

    name = "tokens[,tokens...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found = [re.fullmatch(r"([1-9][0-9]{0,17}) *(k?)", part.strip().lower()) for part in str(value).split(",")]
        lengths = tuple(int(match[1]) * (1024 if match[2] else 1) for match in found if match)
        if len(lengths) < len(found):
            self.fail(f"{value!r} is not a valid list of lengths. Use 1k,4k,16k (1k is 1024).", param, ctx)
        return lengths


class Names(click.ParamType[tuple[str, ...]]):
    """Names, separated by commas."""

    name = "name[,name...]"

    def __init__(self, known: Sequence[str] = ()) -> None:
        """Set the valid names.

        Args:
            known: Valid names, in whatever case they are given; empty accepts any.
        """
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names."""
        if isinstance(value, tuple):
            return value
        known_as = {name.lower(): name for name in self._known}
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        names = tuple(known_as.get(part.lower(), part) for part in parts)
        if self._known and not (names and set(names) <= set(self._known)):
            known = ", ".join(self._known)
            self.fail(
                f"{value!r} is not a valid list of names. Expected one or more of {known}, separated by commas.",
                param,
                ctx,
            )
        return names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer the names that the last of the list may become."""
        before, comma, last = incomplete.rpartition(",")
        return [CompletionItem(f"{before}{comma}{name}") for name in self._known if name.startswith(last)]


SIZE = Size()
TOKENS = Tokens()
LENGTHS = Lengths()
RATES = Rates()
NAMES = Names()

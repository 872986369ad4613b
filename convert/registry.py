"""All formats, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.files.schemas import check_checksum, read_json
from ..errors import ConfigError, FormatError
from .format import Format
from .plan import Plan

if TYPE_CHECKING:
    from .exl2.options import Exl2Options
    from .gguf.engine.library import EngineModel, LlamaLibrary, load_library
    from .gguf.engine.stored import stored_model
    from .gguf.llama_cpp.importance import export_imatrix
    from .gguf.options import GgufOptions
    from .mlx.options import MlxOptions

__all__ = [
    "PLAN_KEY",
    "EngineModel",
    "Exl2Options",
    "GgufOptions",
    "LlamaLibrary",
    "MlxOptions",
    "export_imatrix",
    "format_asking",
    "format_named",
    "format_naming",
    "format_nearly_naming",
    "format_of",
    "formats",
    "is_older_plan",
    "is_plan",
    "load_library",
    "load_plan",
    "registered",
    "require_format",
    "stored_model",
]

_FORMATS: dict[str, str | Format] = {
    "exl2": ".exl2.format",
    "gguf": ".gguf.format",
    "mlx": ".mlx.format",
}
"""By name, the module that holds the format as ``FORMAT``; it is imported when it is first asked for."""

_PUBLIC = {
    "EngineModel": ".gguf.engine.library",
    "Exl2Options": ".exl2.options",
    "GgufOptions": ".gguf.options",
    "LlamaLibrary": ".gguf.engine.library",
    "MlxOptions": ".mlx.options",
    "export_imatrix": ".gguf.llama_cpp.importance",
    "load_library": ".gguf.engine.library",
    "stored_model": ".gguf.engine.stored",
}
"""Homes of the public names that belong to one format."""

_SLIP = 0.75
"""How alike two endings are, 0 to 1, that are taken for one: .ggu, .guff and .ggfu for .gguf, .ggml not."""

PLAN_KEY = "bpwise_plan"
"""Where a plan's file says of which version it is; beside it, ``format`` says of which format."""

_OLDER_KEY = "bpwise_type_plan"
"""The same in some plans of an earlier version."""


def formats() -> dict[str, Format]:
    """Return all formats by name; the first is that of an output whose name says nothing."""
    return {name: format_named(name) for name in _FORMATS}


def format_named(name: str) -> Format:
    """Return a format by its name."""
    found = _FORMATS[name]
    if isinstance(found, str):
        loaded: Format = import_module(found, __package__).FORMAT
        _FORMATS[name] = found = loaded
    return found


def format_of(path: Path) -> Format | None:
    """Return the format of a finished model, by what is in its file or directory; None if it has none of them.

    Raises:
        FormatError: A file in it is damaged.
    """
    return next((each for each in formats().values() if each.recognises(path)), None)


def require_format(path: Path) -> Format:
    """Return the format of a finished model.

    Raises:
        FormatError: It has none of them, or a file in it is damaged.
    """
    found = format_of(path)
    if found is None:
        titles = ", ".join(each.title for each in formats().values())
        raise FormatError(f"{path}: not a quantized model. Expected one of the formats {titles}. Check the path.")
    return found


def format_naming(output: Path) -> Format | None:
    """Return the format whose files are named as an output is; None if its name says nothing."""
    ending = output.suffix.lower()
    return next((each for each in formats().values() if each.suffix and each.suffix == ending), None)


def format_nearly_naming(output: Path) -> Format | None:
    """Return the format whose ending an output's name has but for a slip of the finger, as ``.guff``; else None."""
    endings = {each.suffix: each for each in formats().values() if each.suffix}
    near = get_close_matches(output.suffix.lower(), endings, n=1, cutoff=_SLIP)
    return endings[near[0]] if near and near[0] != output.suffix.lower() else None


def format_asking(options: Any) -> Format:
    """Return the format that options belong to.

    Raises:
        ConfigError: They are no format's.
    """
    for each in formats().values():
        if each.Options is type(options):
            return each
    known = ", ".join(each.Options.__name__ for each in formats().values())
    raise ConfigError(f"options: not a format's. Got {options!r}. Expected an object of {known}. Make one.")


def is_plan(path: Path) -> bool:
    """Return whether a file is a plan, of any format and version."""
    try:
        return not {PLAN_KEY, _OLDER_KEY}.isdisjoint(read_json(path, FormatError))
    except FormatError:
        return False


def is_older_plan(path: Path) -> bool:
    """Return whether a file is a plan of an earlier version, which did not say its format."""
    return is_plan(path) and "format" not in read_json(path, FormatError)


def load_plan(path: Path) -> Plan:
    """Read a plan, of whatever format.

    Raises:
        FormatError: It is none, is damaged, has changed since it was written, or is of another version.
    """
    raw = read_json(path, FormatError)
    name = raw.get("format")
    if PLAN_KEY not in raw or not isinstance(name, str) or name not in _FORMATS:
        raise FormatError(
            f"{path}: not a plan. Got format {name!r}. Expected one of {', '.join(_FORMATS)}. "
            "Make it again with `bpwise plan`."
        )
    check_checksum(raw, FormatError, where=str(path), remedy="Make it again with `bpwise plan`.")
    return format_named(name).load_plan(raw, str(path))


@contextmanager
def registered(format: Format) -> Iterator[None]:
    """Add a format while the body runs: for trying one out."""
    before = dict(_FORMATS)
    _FORMATS[format.name] = format
    try:
        yield
    finally:
        _FORMATS.clear()
        _FORMATS.update(before)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __package__), name)

"""Recipes: the options of a run by their long names on the command line, in a file that repeats it.

Every output has one. It names files without their folders, and says nothing of the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.files.atomic import write_text
from ..checkpoint.files.disk_errors import explained_reading
from ..checkpoint.files.paths import companion
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.hub import snapshot_commit
from ..convert.conversion import Target
from ..convert.names import RECIPE_FILE
from ..convert.options import FormatOptions, Option, options_of
from ..errors import ConfigError
from ..eval.config import EvalConfig
from ..measure.run import MeasureConfig
from ..measure.text.mixture import BUILT_IN, TextOptions, without_folders
from ..version import __version__
from .config import QuantizeConfig

__all__ = ["is_recipe", "read_recipe", "recipe_of", "write_recipe"]

_MARK = "# Made with bpwise"
_NOT_TOLD = "# The calibration text is not recorded: its rows do not say how they were made, or had another seed.\n"
_MOST_BYTES = 1 << 14
_MOST_BRACKETS = 200
"""The time that YAML's parser takes grows with the square of their depth."""

_MIB = 1 << 20


def recipe_of(
    config: QuantizeConfig, target: Target | None, checkpoint: Checkpoint, text: TextOptions | None
) -> dict[str, Any]:
    """Return the options that make an output again, by their long names.

    Args:
        config: Options of the run; their target is not read.
        target: How large the output may be; None where the format's options say it.
        checkpoint: The original.
        text: What the calibration rows were made with; None if that is not known.
    """
    adapters = checkpoint.changes.get("adapters", [])
    entries = {
        "format": config.format.name,
        **({} if target is None else _target(target)),
        **_format(config.options),
        "base-model": config.base_model,
        "lora": adapters[0]["name"] if adapters else None,
        "revision": snapshot_commit(checkpoint.directory),
        **(_measuring(config.measure, text) if config.options.measures else {}),
        **_evaluating(config.evaluate),
    }
    return {name: value for name, value in entries.items() if value is not None and value is not False and value != []}


def write_recipe(output: Path, entries: Mapping[str, Any]) -> Path:
    """Write a recipe into an output's directory, or beside its file; return where.

    Args:
        output: The output, which is there.
        entries: As ``recipe_of`` returns them.

    Raises:
        WorkDirectoryError: It cannot be written.
    """
    path = companion(output, RECIPE_FILE)
    head = f"{_MARK} {__version__}. Repeat it with `bpwise quantize MODEL OUTPUT --config FILE`.\n"
    told = "calibration" in entries or "type" in entries
    write_text(path, head + ("" if told else _NOT_TOLD) + yaml.safe_dump(dict(entries), sort_keys=False))
    return path


def read_recipe(path: Path) -> dict[str, str | list[str]]:
    """Read options from a file: every value as it would stand on the command line, several as a list.

    Raises:
        ConfigError: It cannot be read, or is no list of options.
    """
    with explained_reading(path, ConfigError), path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    try:
        text = data.decode("utf-8")
        small = len(data) <= _MOST_BYTES and text.count("[") + text.count("{") <= _MOST_BRACKETS
        entries = yaml.load(text, Loader=yaml.BaseLoader) if small else None  # strings, lists and mappings only
    except (yaml.YAMLError, RecursionError, ValueError):
        entries = None
    if not isinstance(entries, dict) or not all(map(_is_option, entries.items())):
        raise ConfigError(
            f"{path}: not a recipe. Expected at most {_MOST_BYTES >> 10} KiB of YAML with a line for each option, such "
            "as `bpw: 4.5`. Correct it."
        )
    return entries


def is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe that bpwise wrote."""
    try:
        return path.read_bytes()[: len(_MARK)] == _MARK.encode()
    except OSError:
        return False


def _is_option(entry: tuple[Any, Any]) -> bool:
    name, value = entry
    values = value if isinstance(value, list) else [value]
    return isinstance(name, str) and all(isinstance(each, str) for each in values)


def _target(target: Target) -> dict[str, Any]:
    return {
        "bpw": target.bpw,
        "max-size": target.max_bytes,
        "vram": target.vram_bytes,
        "context": target.context_tokens,
        "size-of": target.size_of,
    }


def _format(options: FormatOptions) -> dict[str, Any]:
    declared = options_of(type(options), "quantize")
    return {
        option.flags[-1].removeprefix("--"): _typed(option, getattr(options, field))
        for field, option in declared.items()
        if option.recorded
    }


def _typed(option: Option, value: Any) -> Any:
    # As on the command line.
    if option.kind == "negated":
        return not value
    if option.kind == "mebibytes":
        return value // _MIB
    if isinstance(value, tuple):
        return list(map(str, value))
    return value.name if isinstance(value, Path) else value


def _measuring(config: MeasureConfig, text: TextOptions | None) -> dict[str, Any]:
    # The command line has one seed, for rows and probes.
    told = asdict(text) if text is not None and text.seed == config.seed else {}
    return {
        "calibration": told.pop("source", None),
        **{name.replace("_", "-"): value for name, value in told.items()},
        "seed": config.seed,
        "damping": config.damping,
        "moe-calibrate-all": config.moe_calibrate_all,
        "equalize": config.equalize,
        "precision": config.precision,
    }


def _evaluating(config: EvalConfig | None) -> dict[str, Any]:
    if config is None:
        return {"no-eval": True}
    return {
        "eval-text": None if config.text is None else without_folders(config.text),
        "eval-rows": config.rows,
        "eval-row-tokens": config.row_tokens,
        "eval-domains": config.domains == BUILT_IN,
        "force-eval-text": config.allow_calibration_text,
    }

"""Options and types that commands share, and what they turn into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from ..measure.calibration import CalibrationSet
    from ..measure.run import MeasureConfig
    from ..quantize.plan import HeadBits

__all__ = [
    "DIRECTORY",
    "EXISTING_DIRECTORY",
    "EXISTING_FILE",
    "EXISTING_PATH",
    "FILE",
    "HEAD_BITS_OPTION",
    "MIB",
    "RATES",
    "SIZE",
    "calibration_options",
    "progress_bar",
    "read_head_bits",
    "read_measure_config",
    "refuse_beside",
]


MIB = 1 << 20


Command = TypeVar("Command", bound=Callable[..., Any])


FILE = click.Path(dir_okay=False, path_type=Path)


EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


DIRECTORY = click.Path(file_okay=False, path_type=Path)


EXISTING_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


EXISTING_PATH = click.Path(exists=True, path_type=Path)


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
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", str(value).lower())
        if match is None or match[2] not in self._UNITS:
            self.fail(f"{value!r} is no size, expected for example 5GB, 700MiB or a number of bytes.", param, ctx)
        return int(float(match[1]) * self._UNITS[match[2]])


class Rates(click.ParamType[tuple[float, ...]]):
    """Bitrates, separated by commas."""

    name = "bpw[,bpw...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            rates = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no bitrate, expected for example 4.5, or several as 8.0,6.0,4.5.", param, ctx)
        if len(set(rates)) < len(rates):
            self.fail(f"{value!r} names a bitrate twice.", param, ctx)
        return rates


SIZE = Size()


RATES = Rates()


HEAD_BITS_OPTION = click.option(
    "-hb",
    "--head-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8", "16", "auto"]),
    default="6",
    help="Bits of the output head; 16: unquantized; auto: as many as pay, out of --bpw for decoder and head together.",
)


def calibration_options(command: Command) -> Command:
    """Give a command the options that describe calibration and measuring."""
    for option in reversed(
        (
            click.option(
                "-c",
                "--calibration",
                help="Calibration text: .txt/.jsonl/.parquet/.arrow file or directory, Hub data set "
                "NAME[:CONFIG][:SPLIT], a saved calibration set (.safetensors), or self: rows that the model writes, "
                "all of it in memory.  [default: Python's own text]",
            ),
            click.option("--column", help="Column of the data set that holds the text."),
            click.option("--chat-template", is_flag=True, help="Render chat turns with the model's chat template."),
            click.option("-r", "--rows", type=click.IntRange(1), default=32, help="Calibration rows."),
            click.option("-l", "--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row."),
            click.option("--seed", type=int, default=0, help="Seed of rows and of sampled targets."),
            click.option("--group-size", type=int, default=32, help="Input features that share a width and a scale."),
            click.option(
                "--damping",
                type=float,
                help="Damping of the Gram matrices, relative.  [default: chosen for each stage on held-out rows]",
            ),
            click.option(
                "--moe-calibrate-all", is_flag=True, help="Run all tokens through all experts, not only few-used ones."
            ),
            click.option("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto."),
            click.option("--work-dir", type=DIRECTORY, help="Where finished blocks are kept.  [default: OUTPUT.work]"),
        )
    ):
        command = option(command)
    return command


def read_measure_config(options: dict[str, Any], *, types: bool) -> tuple[MeasureConfig, CalibrationSet | None]:
    """Return what ``calibration_options`` were given as: the config, and the calibration set if one is named."""
    from ..measure.calibration import CalibrationConfig, CalibrationSet
    from ..measure.run import MeasureConfig

    source = options["calibration"]
    saved = CalibrationSet.load(Path(source)) if source and source.endswith(".safetensors") else None
    calibration = CalibrationConfig(
        source=None if saved else source,
        column=options["column"],
        chat_template=options["chat_template"],
        rows=options["rows"],
        row_tokens=options["row_tokens"],
        seed=options["seed"],
    )
    config = MeasureConfig(
        calibration=calibration,
        group_size=options["group_size"],
        damping=options["damping"],
        moe_calibrate_all=options["moe_calibrate_all"],
        seed=options["seed"],
        types=types,
        device=options["device"],
    )
    return config, saved


def read_head_bits(option: str) -> HeadBits:
    """Return the value of ``--head-bits``."""
    return "auto" if option == "auto" else int(option)


def refuse_beside(what: str, others: Sequence[str], why: str) -> None:
    """Refuse options that the user gave though they do not go with another.

    Args:
        what: The other.
        others: Names of their parameters.
        why: Goes on after a colon.
    """
    context = click.get_current_context()
    flags = {parameter.name: parameter.opts[-1] for parameter in context.command.params}
    for name in others:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flags[name]} cannot go with {what}: {why}. Leave one of the two out.")


def progress_bar(items: Sequence[Any], stage: str) -> Iterable[Any]:
    """Show on stderr how far a stage is; see ``Progress``."""
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, desc=stage, unit="block", dynamic_ncols=True)
    return bar

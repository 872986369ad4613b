"""Options and types that commands share, and what they turn into."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from ..errors import printable
from .output import say

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import TensorSource
    from ..checkpoint.source.original import Original
    from ..convert.exl2.plan.problem import HeadBits
    from ..measure.run import MeasureConfig
    from ..measure.text.calibration import CalibrationSet

__all__ = [
    "DIRECTORY",
    "EXISTING_DIRECTORY",
    "EXISTING_FILE",
    "EXISTING_PATH",
    "FILE",
    "FORCE_OPTION",
    "HEAD_BITS_OPTION",
    "KEEP_FP16_OPTION",
    "LENGTHS",
    "MIB",
    "OFFLOAD_OPTION",
    "OVERRIDE_OPTION",
    "PATH",
    "RATES",
    "ROW_TOKENS_DEFAULT",
    "SIZE",
    "TASK_OPTIONS",
    "TOKENS",
    "calibration_options",
    "extra_options",
    "open_original",
    "original_options",
    "progress_bar",
    "read_head_bits",
    "read_measure_config",
    "say_shortened",
]


MIB = 1 << 20

_MOST_LABEL_CHARACTERS = 60


ROW_TOKENS_DEFAULT = "[default: 1024, or the model's context if that is shorter]"


Command = TypeVar("Command", bound=Callable[..., Any])


class Place(click.Path):
    """A path; ``~`` is the user's home directory, as a shell leaves it in ``--option=~/x``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..checkpoint.files.paths import named

        text = os.path.expanduser(value)  # noqa: PTH111 - Path's raises where there is no home
        if not text:
            self.fail("the path is empty: is a variable of the shell not set?", param, ctx)
        # "." and ".." get a name, which files beside them are named after.
        return super().convert(named(Path(text)), param, ctx)


FILE = Place(dir_okay=False, path_type=Path)


EXISTING_FILE = Place(exists=True, dir_okay=False, path_type=Path)


DIRECTORY = Place(file_okay=False, path_type=Path)


EXISTING_DIRECTORY = Place(exists=True, file_okay=False, path_type=Path)


EXISTING_PATH = Place(exists=True, path_type=Path)


PATH = Place(path_type=Path)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
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


class Tokens(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A number of tokens, in units of 1024 where it ends in ``k``."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([1-9][0-9]{0,17})(k?)", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a valid number of tokens. Use 32768 or 32k.", param, ctx)
        return int(match[1]) * (1024 if match[2] else 1)


class Rates(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
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


class Lengths(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
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


class Names(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """Names, separated by commas."""

    name = "name[,name...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in str(value).split(",") if part.strip())


SIZE = Size()


TOKENS = Tokens()
LENGTHS = Lengths()


RATES = Rates()


HEAD_BITS_OPTION = click.option(
    "-hb",
    "--head-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8", "16", "auto"]),
    default="6",
    help="Bits of the output head; 16: unquantized; auto: as many as pay, out of --bpw for decoder and head together.",
)


OVERRIDE_OPTION = click.option(
    "--override",
    multiple=True,
    metavar="PATTERN=WHAT",
    help="What linears get whose names match: EXL2, bits of every row group (6 exactly, 5: at least, :6 at most, 4:6); "
    "GGUF, a type. Repeatable; the last match counts.",
)


KEEP_FP16_OPTION = click.option(
    "--keep-fp16",
    multiple=True,
    metavar="PATTERN",
    help="EXL2: linears to leave in float16, counted in --bpw: all of an attention block or MLP, as '*.0.mlp.*', or "
    "lm_head. Repeatable.",
)


FORCE_OPTION = click.option("--force", is_flag=True, help="Replace a file of any kind at OUTPUT.")


OFFLOAD_OPTION = click.option(
    "--offload-dir",
    type=DIRECTORY,
    help="Keep hidden states of all rows in files here, which are gone afterwards, and not in memory.",
)


def original_options(command: Command) -> Command:
    """Give a command the options that change a model while it is read."""
    lora = click.option("--lora", type=EXISTING_DIRECTORY, help="PEFT adapter to merge into the model while reading.")
    return lora(command)


def open_original(model: str, options: dict[str, Any]) -> Original:
    """Take what ``original_options`` were given out of a command's options; return the model with those changes."""
    from ..checkpoint.source.original import open_model

    lora = options.pop("lora")
    return model if lora is None else open_model(model, lora=lora)


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
            click.option(
                "--chat-template",
                is_flag=True,
                help="Render chats (OpenAI's, ShareGPT's, Alpaca's) with the model's template.",
            ),
            click.option("-r", "--rows", type=click.IntRange(1), default=32, help="Calibration rows."),
            click.option(
                "-l", "--row-tokens", type=click.IntRange(2), help=f"Tokens in each row.  {ROW_TOKENS_DEFAULT}"
            ),
            click.option("--seed", type=int, default=0, help="Seed of rows and of Fisher probes."),
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
            OFFLOAD_OPTION,
            click.option("--work-dir", type=DIRECTORY, help="Where finished blocks are kept.  [default: OUTPUT.work]"),
        )
    ):
        command = option(command)
    return command


TASK_OPTIONS = ("tasks", "num_fewshot", "limit", "include_path", "batch_size", "apply_chat_template")
"""What ``TaskConfig`` takes of ``extra_options``."""


def extra_options(command: Command) -> Command:
    """Give a command the options that describe benchmarks and needles; those of benchmarks are named as in lm-eval."""
    for option in reversed(
        (
            click.option(
                "--tasks", type=Names(), help="Benchmarks to run too, as lm-eval names them: mmlu,arc_challenge,gsm8k."
            ),
            click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question of --tasks."),
            click.option("--limit", type=float, help="First questions of each of --tasks, or a share below 1."),
            click.option("--include-path", type=EXISTING_DIRECTORY, help="Directory with more definitions of --tasks."),
            click.option("--batch-size", default="1", help="Requests of --tasks run together, or auto."),
            click.option("--apply-chat-template", is_flag=True, help="Put --tasks as turns of a chat."),
            click.option(
                "--needle", type=LENGTHS, help="Look for needles in haystacks of these lengths too: 1k,4k,16k tokens."
            ),
            click.option("--needle-samples", type=click.IntRange(1), default=4, help="Haystacks of each length."),
        )
    ):
        command = option(command)
    return command


def read_measure_config(options: dict[str, Any], *, types: bool) -> tuple[MeasureConfig, CalibrationSet | None]:
    """Return what ``calibration_options`` were given as: the config, and the calibration set if one is named."""
    from ..measure.run import MeasureConfig
    from ..measure.text.calibration import CalibrationConfig, CalibrationSet

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
        offload_dir=options["offload_dir"],
    )
    return config, saved


def say_shortened(source: TensorSource, **asked: int | None) -> None:
    """Say on stderr which rows are shorter than by default, because the model's context is.

    Args:
        source: The model.
        **asked: Tokens in each row as asked for, None for the default, by what the rows are for: ``calibration``,
            ``evaluation``.

    Raises:
        ConfigError: Rows are longer than the model's context.
    """
    from ..measure.text.context import shortened_line

    for use, row_tokens in asked.items():
        line = shortened_line(row_tokens, source, use)
        if line is not None:
            say(line, err=True)


def read_head_bits(option: str) -> HeadBits:
    """Return the value of ``--head-bits``."""
    return "auto" if option == "auto" else int(option)


def progress_bar(items: Sequence[Any], stage: str) -> Iterable[Any]:
    """Show on stderr how far a stage is; see ``Progress``."""
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, desc=printable(stage, _MOST_LABEL_CHARACTERS), unit="block", dynamic_ncols=True)
    return bar

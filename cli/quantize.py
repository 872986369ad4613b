"""``bpwise quantize``: the whole pipeline, to any format."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..convert.registry import format_naming, formats
from .format_options import FORMAT_OPTION, FormatChoice, format_options
from .group import WAIT_OPTION, cli
from .options import (
    Command,
    MeasuringArguments,
    OriginalArguments,
    calibration_options,
    evaluation_options,
    grouped,
    original_options,
    say_shortened,
)
from .output import JSON_OPTION, RunBar, progress_bar, say, say_json, time_lines
from .types import EXISTING_FILE, MIB, PATH, RATES, SIZE, TOKENS

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import Checkpoint
    from ..convert.conversion import Target
    from ..quantize.config import QuantizeConfig
    from ..quantize.forecast import Forecast
    from .options import EvaluationArguments

__all__ = ["quantize"]

_BPW_MEANS = "; ".join(f"{each.title}, {each.bpw_means}" for each in formats().values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetArguments:
    """What ``_target_options`` were given."""

    bpw: tuple[float, ...] | None
    max_size: int | None
    vram: int | None
    context: int | None

    @property
    def count(self) -> int:
        """Number of ways in which a size was given."""
        return sum(each is not None for each in (self.bpw, self.max_size, self.vram))

    @property
    def rates(self) -> tuple[float, ...]:
        """The bitrates."""
        return self.bpw or ()

    @property
    def several(self) -> bool:
        """Whether there are several outputs to make."""
        return len(self.rates) > 1

    def all(self) -> list[Target]:
        """Return the target of every output; none where nothing was given."""
        from ..convert.conversion import Target

        if self.rates or not self.count:
            return [Target(bpw=rate) for rate in self.rates]
        return [Target(max_bytes=self.max_size, vram_bytes=self.vram, context_tokens=self.context)]


def _target_options(command: Command) -> Command:
    # Options that say how large an output may be; the command gets them as ``targets``.
    declared = (
        click.option(
            "-b",
            "--bpw",
            type=RATES,
            help=f"Bits per weight, overheads included: {_BPW_MEANS}. Several (8.0,6.0,4.5) make several outputs in "
            "the directory OUTPUT from one measurement.",
        ),
        click.option("--max-size", type=SIZE, help="Largest size of the file or files, instead of --bpw: 5GB, 700MiB."),
        click.option("--vram", type=SIZE, help="Memory of the GPU to fit into, cache included, instead of --bpw: 8GB."),
        click.option(
            "--context",
            type=TOKENS,
            help="With --vram: length of the context in tokens, such as 32k.  [default: the model's]",
        ),
    )
    return grouped(command, declared, "targets", ("bpw", "max_size", "vram", "context"), TargetArguments)


@cli.command()
@click.argument("model")
@click.argument("output", type=PATH)
@FORMAT_OPTION
@_target_options
@click.option(
    "-m",
    "--measurement",
    type=EXISTING_FILE,
    help="Use this measurement of MODEL instead of measuring again.",
)
@click.option("--base-model", metavar="ORG/NAME", help="Hub id of the original, for the card.  [default: MODEL's]")
@click.option("--dry-run", is_flag=True, help="Print size, possible bpw, memory, disk and time; write nothing.")
@JSON_OPTION
@format_options("quantize")
@evaluation_options
@original_options
@calibration_options
@WAIT_OPTION
def quantize(
    model: str,
    output: Path,
    targets: TargetArguments,
    measurement: Path | None,
    base_model: str | None,
    dry_run: bool,
    as_json: bool,
    choice: FormatChoice,
    evaluation: EvaluationArguments,
    changes: OriginalArguments,
    measuring: MeasuringArguments,
) -> None:
    """Quantize MODEL to OUTPUT, and compare the two.

    MODEL is a directory or a Hub id. OUTPUT is a GGUF file if its name ends in .gguf, else an EXL2 directory. Several
    bitrates make OUTPUT/MODEL-8.0bpw.gguf or OUTPUT/MODEL-8.0bpw-6hb-exl2 and so on, and one report over all.

    Interrupted? Run the same command again and it resumes. An output whose predictions are useless is marked with
    BROKEN.md, and the exit code is 1.
    """
    from ..checkpoint.source.original import open_model
    from ..quantize.config import QuantizeConfig
    from ..quantize.run import quantize_model
    from ..quantize.series import quantize_series

    _check_usage(output, choice, targets)
    wanted = targets.all()
    evaluate = evaluation.config(measuring.config)
    config = QuantizeConfig(
        target=wanted[0] if wanted else None,
        options=choice.options,
        measure=measuring.config,
        evaluate=evaluate,
        base_model=base_model,
    )
    source = open_model(changes.open(model))
    if evaluate is not None:
        say_shortened(source, evaluation=evaluate.row_tokens)
    if measuring.saved is None and measurement is None and choice.options.measures:
        say_shortened(source, calibration=measuring.config.calibration.row_tokens)
    warnings = choice.format.conversion(source, choice.options).warnings
    _print_warnings(warnings)
    if dry_run:
        forecasts = _forecasts(source, output, config, targets.rates, measurement, measuring)
        if as_json:
            outputs = [{"output": str(path), **each.to_dict()} for path, each in forecasts.items()]
            say_json("quantize", {"outputs": outputs, "warnings": warnings})
        else:
            _print_forecasts(forecasts.values())
        return
    shared = {
        "measurement": measurement,
        "calibration": measuring.saved,
        "work": measuring.work_dir,
        "progress": RunBar(),
    }
    if targets.several:
        lines = quantize_series(source, output, config, targets.rates, **shared).summary_lines()  # type: ignore[arg-type]
    else:
        lines = quantize_model(source, output, config, **shared).summary_lines()  # type: ignore[arg-type]
    for line in lines:
        say(line)


def _check_usage(output: Path, choice: FormatChoice, targets: TargetArguments) -> None:
    # One target, and an OUTPUT that is named as what it is.
    if choice.options.measures and targets.count != 1:
        raise click.UsageError("an output needs one target. Give one of --bpw, --max-size and --vram.")
    if targets.count and not choice.options.measures:
        raise click.UsageError("these options say all of an output. Leave --bpw, --max-size and --vram out.")
    named = format_naming(output)
    if named is not None and named is not choice.format:
        raise click.UsageError(
            f"{output} is named as a {named.title} file, but --format {choice.format.name} makes something else. Name "
            "it otherwise."
        )
    if named is not None and targets.several:
        raise click.UsageError(f"several bitrates make several files: name a directory, with --format {named.name}.")


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        say(f"warning     {warning}", err=True)


def _forecasts(
    model: Checkpoint,
    output: Path,
    config: QuantizeConfig,
    rates: tuple[float, ...],
    measurement: Path | None,
    measuring: MeasuringArguments,
) -> dict[Path, Forecast]:
    from ..checkpoint.files.paths import work_beside
    from ..convert.conversion import Target
    from ..eval.models import model_name
    from ..quantize.checks import forecast_outputs
    from ..quantize.measuring import load_measurement
    from ..quantize.series import output_paths
    from ..quantize.times import with_times

    outputs: dict[Path, Target | None] = {output: config.target}
    if len(rates) > 1:
        paths = output_paths(config.base_model or model_name(model), output, config, rates)
        outputs = {path: Target(bpw=bpw) for bpw, path in paths.items()}
    conversion = config.format.conversion(model, config.options)
    work = measuring.work_dir or work_beside(output)
    measured = None if measurement is None else load_measurement(measurement, model, progress_bar)
    forecasts = forecast_outputs(
        conversion,
        outputs,
        config.measure,
        config.evaluate,
        work,
        measured=measured,
        measurement=measurement,
        rows=measuring.saved,
    )
    known = measured or measuring.saved
    return with_times(forecasts, conversion, config, work, known=known, measurement=measurement, series=len(rates) > 1)


def _print_forecasts(forecasts: Collection[Forecast]) -> None:
    for forecast in forecasts:
        _print_forecast(forecast)
    for line in time_lines(part for forecast in forecasts for part in forecast.parts):
        say(line)


def _print_forecast(forecast: Forecast) -> None:
    from ..convert.plan import shown_range

    size = forecast.size
    say(f"original      {forecast.original_bytes / MIB:10.1f} MiB")
    say(f"quantized     {size.output_bytes / MIB:10.1f} MiB at {size.bpw:g} bpw")
    say(f"possible bpw  {shown_range(size.lowest_bpw, size.highest_bpw):>20}")
    for line in size.facts:
        say(f"              {line}")
    say(f"memory        {forecast.memory_bytes / MIB:10.0f} MiB at most, roughly")
    say(f"work on disk  {forecast.disk_bytes / MIB:10.0f} MiB at most, roughly")

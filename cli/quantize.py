"""``bpwise quantize``: the whole pipeline, to any format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..convert.registry import format_naming, formats
from ..tables import bytes_text, listed
from .format_options import FORMAT_OPTION, FormatChoice, format_options, take_recipe
from .group import WAIT_OPTION, cli
from .options import (
    Command,
    MeasuringArguments,
    OriginalArguments,
    calibration_options,
    evaluation_options,
    grouped,
    original_options,
)
from .output import JSON_OPTION, RunBar, note, progress_bar, say, say_json, say_shortened, time_lines
from .types import EXISTING_FILE, PATH, RATES, SIZE, TOKENS, Names

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import Checkpoint
    from ..convert.conversion import Conversion, Target
    from ..quantize.config import QuantizeConfig
    from ..quantize.result import QuantizeResult
    from ..quantize.series import SeriesResult
    from ..quantize.timing.forecast import Forecast
    from .options import EvaluationArguments

__all__ = ["quantize"]

_BPW_MEANS = "; ".join(f"{each.title}, {each.bpw_means}" for each in formats().values())
_DEFAULTS = ", ".join(
    " with ".join(
        (
            f"{each.title} {each.default_bpw:g}",
            *(f"--{name.replace('_', '-')} {value}" for name, value in each.default_options.items()),
        )
    )
    for each in formats().values()
)
_SIZES = "--bpw, --max-size, --vram and --size-of"
_SIZE_NAMES = [name for each in formats().values() for name in each.size_names]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetArguments:
    """What ``_target_options`` were given."""

    bpw: tuple[float, ...] | None
    max_size: int | None
    vram: int | None
    context: int | None
    size_of: tuple[str, ...] | None

    @property
    def count(self) -> int:
        """Number of ways in which a size was given."""
        return sum(each is not None for each in (self.bpw, self.max_size, self.vram, self.size_of))

    @property
    def several(self) -> bool:
        """Whether there are several outputs to make."""
        return len(self.bpw or self.size_of or ()) > 1

    def all(self, choice: FormatChoice) -> list[Target]:
        """Return the target of every output: the format's own if no size was given, none where its options say it."""
        from ..convert.conversion import Target

        if not choice.options.measures:
            return []
        if self.size_of:
            return [Target(size_of=name) for name in self.size_of]
        if self.bpw or not self.count:
            return [Target(bpw=rate) for rate in self.bpw or (choice.format.default_bpw,)]
        return [Target(max_bytes=self.max_size, vram_bytes=self.vram, context_tokens=self.context)]


def _targets(**given: Any) -> TargetArguments:
    # A size on the command line takes the place of a recipe's.
    context = click.get_current_context()
    typed = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if typed - {"context"}:
        given = {name: value if name in typed else None for name, value in given.items()}
    return TargetArguments(**given)


def _target_options(command: Command) -> Command:
    # Options that say how large an output may be; the command gets them as ``targets``.
    declared = (
        click.option(
            "-b",
            "--bpw",
            type=RATES,
            help=f"Bits per weight, overhead included ({_BPW_MEANS}). Several sizes, such as 8.0,6.0,4.5, make several "
            f"models in the folder OUTPUT.  [default: {_DEFAULTS}]",
        ),
        click.option("--max-size", type=SIZE, help="Maximum size on disk, instead of --bpw: 5GB, 700MiB."),
        click.option("--vram", type=SIZE, help="GPU memory to fit into, context included, instead of --bpw: 8GB."),
        click.option(
            "--context",
            type=TOKENS,
            help="With --vram: context length in tokens, such as 32k.  [default: the model's maximum]",
        ),
        click.option(
            "--size-of",
            type=Names(_SIZE_NAMES),
            metavar="NAME[,NAME...]",
            help="Match the size of llama.cpp's file of this name, such as Q4_K_M, but stay closer to the original; "
            "instead of --bpw. Several names make several models.",
        ),
    )
    return grouped(command, declared, "targets", ("bpw", "max_size", "vram", "context", "size_of"), _targets)


@cli.command()
@click.argument("model")
@click.argument("output", type=PATH, required=False)
@FORMAT_OPTION
@_target_options
@click.option(
    "-m",
    "--measurement",
    type=EXISTING_FILE,
    help="Reuse this measurement of MODEL. With --type, use it as the importance matrix.",
)
@click.option(
    "--config",
    type=EXISTING_FILE,
    is_eager=True,
    expose_value=False,
    callback=take_recipe,
    help="Read options from this file, such as an output's recipe.yaml. Options given here override it.",
)
@click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="Hub id of the original, for the model card.  [default: MODEL, if it is one]",
)
@click.option("--dry-run", is_flag=True, help="Print expected size, memory, disk and time; write nothing.")
@JSON_OPTION
@format_options("quantize")
@evaluation_options
@original_options
@calibration_options
@WAIT_OPTION
def quantize(
    model: str,
    output: Path | None,
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
    """Quantize MODEL to OUTPUT, then compare the two.

    MODEL is a directory or a Hub id. If OUTPUT ends in .gguf, or --format gguf, --type or --size-of is given, the
    output is a GGUF file; otherwise it is an EXL2 directory. Leave OUTPUT out to get a conventional name in the current
    folder: MODEL-8.0bpw-8hb-exl2, MODEL-4.5bpw-Q4_K_S.gguf. With several sizes or formats OUTPUT is a folder: the
    models in it are made from one measurement and share one report.

    Interrupted? Run the same command again and it resumes. If the output turns out to be useless, it is marked with
    BROKEN.md and the exit code is 1.
    """
    from ..quantize.config import QuantizeConfig, original_for
    from ..quantize.run import quantize_model
    from ..quantize.series import quantize_series

    series = _check_usage(output, choice, targets)
    if measurement is not None and not choice.options.measures:
        choice, measurement = choice.weighted_by(measurement), None
    wanted = targets.all(choice)
    evaluate = evaluation.config(measuring.config)
    settings: Any = {"options": choice.options, "measure": measuring.config, "base_model": base_model}
    config = QuantizeConfig(target=wanted[0] if wanted else None, evaluate=evaluate, **settings)
    source = original_for(changes.open(model), measuring.config, measurement, options=choice.each)
    output = _completed(output, source, config, series=series)
    if evaluate is not None:
        say_shortened(source, evaluation=evaluate.row_tokens)
    if measuring.saved is None and measurement is None and choice.options.measures:
        say_shortened(source, calibration=measuring.config.calibration.row_tokens)
    conversions = [each.conversion(source, choice.all[each.name]) for each in choice.formats]
    warnings = list(dict.fromkeys(warning for each in conversions for warning in each.warnings))
    _print_warnings(warnings)
    if dry_run:
        forecasts = _forecasts(conversions, output, config, wanted if series else [], measurement, measuring)
        if as_json:
            outputs = [{"output": str(path), **each.to_dict()} for path, each in forecasts.items()]
            say_json("quantize", {"outputs": outputs, "warnings": warnings})
        else:
            _print_forecasts(forecasts)
        return
    settings |= {
        "evaluate": evaluate or False,
        "cache": not evaluation.no_cache,
        "measurement": measurement,
        "calibration": measuring.saved,
        "work": measuring.work_dir,
        "progress": RunBar(),
    }
    result: QuantizeResult | SeriesResult
    if series:
        result = quantize_series(source, output, wanted, **{**settings, "options": choice.each})
    else:
        target = asdict(wanted[0]) if wanted else {}
        result = quantize_model(source, output, **target, **settings)
    for line in result.summary_lines():
        say(line)


def _completed(output: Path | None, source: Checkpoint, config: QuantizeConfig, *, series: bool) -> Path:
    # The conventional name where none is given, and the format's ending where that lacks; says so.
    from ..eval.models import model_name

    if output is not None:
        if not config.format.suffix or series or format_naming(output) is not None:
            return output
        completed = output.with_name(f"{output.name}{config.format.suffix}")
    else:
        completed = Path(config.conversion(source).output_name(config.base_model or model_name(source), config.target))
    note(f"output      {completed}")
    return completed


def _check_usage(output: Path | None, choice: FormatChoice, targets: TargetArguments) -> bool:
    # At most one target, and an OUTPUT that is named as what it is; returns whether there are several outputs.
    if targets.count > 1:
        raise click.UsageError(f"give only one of {_SIZES}.")
    measures = all(each.measures for each in choice.each)
    if targets.count and not measures:
        raise click.UsageError(f"these options already determine the size. Leave out {_SIZES}.")
    several = "several formats" if len(choice.formats) > 1 else "several sizes" if targets.several else ""
    if several and measures and not targets.count:
        raise click.UsageError(f"several formats need a size. Give one of {_SIZES}.")
    if several and not measures:
        raise click.UsageError("these options determine a single output. Leave them out, or the other formats.")
    without = [each.title for each in choice.formats if not set(targets.size_of or ()) <= set(each.size_names)]
    if without:
        raise click.UsageError(f"--size-of does not work for {listed(without)}. Use --bpw.")
    if several and output is None:
        raise click.UsageError(f"{several} make several models. Name a folder for them: OUTPUT.")
    named = None if output is None else format_naming(output)
    if named is not None and named not in choice.formats:
        raise click.UsageError(
            f"{output} is the name of a {named.title} file, but --format {choice.format.name} makes something else. "
            "Choose another name."
        )
    if named is not None and several:
        formats_ = ",".join(each.name for each in choice.formats)
        raise click.UsageError(f"{several} make several models. Name a folder, and add --format {formats_}.")
    return bool(several)


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        say(f"warning     {warning}", err=True)


def _forecasts(
    conversions: Sequence[Conversion],
    output: Path,
    config: QuantizeConfig,
    series: Sequence[Target],
    measurement: Path | None,
    measuring: MeasuringArguments,
) -> dict[Path, Forecast]:
    from ..checkpoint.files.paths import work_beside
    from ..eval.models import model_name
    from ..quantize.checks import forecast_outputs, require_together
    from ..quantize.measuring import load_measurement
    from ..quantize.series import output_targets
    from ..quantize.times import with_times

    model = conversions[0].checkpoint
    work = measuring.work_dir or work_beside(output)
    measured = None if measurement is None else load_measurement(measurement, model, progress_bar)
    lines: list[tuple[Conversion, dict[Path, Forecast]]] = []
    for conversion in conversions:
        outputs: Mapping[Path, Target | None] = {output: config.target}
        if series:
            outputs = output_targets(config.base_model or model_name(model), output, conversion, series)
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
        lines.append((conversion, forecasts))
    require_together(lines, work, measurement)
    made_by = {path: conversion for conversion, made in lines for path in made}
    forecasts = {path: forecast for _, made in lines for path, forecast in made.items()}
    known = measured or measuring.saved
    return with_times(forecasts, made_by, config, work, known=known, measurement=measurement, series=bool(series))


def _print_forecasts(forecasts: Mapping[Path, Forecast]) -> None:
    for output, forecast in forecasts.items():
        if len(forecasts) > 1:
            say(f"output        {output}")
        _print_forecast(forecast)
    for line in time_lines(part for forecast in forecasts.values() for part in forecast.parts):
        say(line)


def _print_forecast(forecast: Forecast) -> None:
    from ..convert.plan import shown_range

    size = forecast.size
    say(f"original      {bytes_text(forecast.original_bytes):>10}")
    say(f"quantized     {bytes_text(size.output_bytes):>10} at {size.bpw:g} bpw")
    say(f"possible bpw  {shown_range(size.lowest_bpw, size.highest_bpw):>20}")
    for line in size.facts:
        say(f"              {line}")
    say(f"memory        {bytes_text(forecast.memory_bytes):>10} at most, roughly")
    say(f"work on disk  {bytes_text(forecast.disk_bytes):>10} at most, roughly")

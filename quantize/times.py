"""Forecasts of runs with the time that their parts take on this machine."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.files.resume import ResumeStore
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.language import language_model
from ..convert.conversion import Conversion
from ..convert.registry import format_asking
from ..errors import BpwiseError
from ..eval.models import model_name
from ..linalg.work import Rates, rates_of
from ..measure.calibrated import CALIBRATION_FILE
from ..measure.device import resolve_device
from ..measure.measurement import Measurement
from ..measure.run import CALIBRATED, MeasureConfig, calibrated_identity
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import CALIBRATION, fit_row_tokens
from ..progress import ExpectedPart, Progress, RunForecast, RunProgress
from .checks import has_report, is_made, require_convertible
from .config import QuantizeConfig
from .measuring import MEASUREMENT_FILE, MEASURING
from .timing.forecast import Forecast
from .timing.parts import (
    CountedPart,
    OutputState,
    evaluation_parts,
    expected_parts,
    measuring_parts,
    output_parts,
    preparing_part,
    writing_parts,
)

__all__ = ["announce", "announce_measuring", "measuring_forecast", "with_times"]

_log = logging.getLogger(__name__)

_RESUMED = {
    "measure: forward": "gone through forward",
    "measure: backward, curves": "measured",
    "quantize: round": "rounded",
}
"""Parts that an earlier run may have left unfinished, in the order of the work, and what was done to its blocks."""


def with_times(
    forecasts: Mapping[Path, Forecast],
    conversions: Conversion | Mapping[Path, Conversion],
    config: QuantizeConfig,
    work: Path,
    *,
    known: CalibrationSet | Measurement | None,
    measurement: Path | None = None,
    series: bool = False,
    rates: Callable[[torch.device], Rates] = rates_of,
) -> dict[Path, Forecast]:
    """Return forecasts with the parts that are left of the run; times the device for about a second, once a process.

    Args:
        forecasts: Of each output; see ``bpwise.quantize.checks.forecast_outputs``.
        conversions: The original on its way into the format, or into that of each output.
        config: Options; their target is not read.
        work: The run's work directory.
        known: The measurement to work from, or the calibration rows that are given; None if they are to be made.
        measurement: File of that measurement.
        series: Whether every output has a directory of its own in the work directory, as ``quantize_series`` has it.
        rates: Returns the rates of a device.

    Raises:
        BpwiseError: As ``forecast_outputs``.
    """
    each_in = dict.fromkeys(forecasts, conversions) if isinstance(conversions, Conversion) else conversions
    kinds = list(dict.fromkeys(each_in.values()))
    checkpoint, measure, evaluate = kinds[0].checkpoint, config.measure, config.evaluate
    measured = isinstance(known, Measurement)
    shape = _rows_shape(known, measure, checkpoint)
    parts: list[CountedPart] = []
    counted: dict[Path, list[CountedPart]] = {}
    evaluated = False
    parts += [preparing_part(kind, measure) for kind in kinds if kind.scratch(work, measurement)]
    measuring = work / MEASURING if series else work
    if kinds[0].measures and known is None:
        parts += writing_parts(checkpoint, measure, shape, measuring / CALIBRATION_FILE)
    if kinds[0].measures and not measured:
        parts += measuring_parts(kinds, measure, shape, measuring / MEASUREMENT_FILE)
    for output, forecast in forecasts.items():
        place = work / output.name if series else work
        format_ = format_asking(each_in[output].options)
        made = is_made(output, format_)
        state = OutputState(work=place, exists=made, measures=not series and not measured)
        parts += output_parts(each_in[output], forecast.size.bpw, measure, shape, state)
        if evaluate is not None and not (made and has_report(output, format_)):
            fitted = evaluate.fitted(checkpoint)
            assert fitted.row_tokens is not None
            parts += evaluation_parts(each_in[output], fitted, fitted.row_tokens, original=not evaluated)
            evaluated = True
        counted[output], parts = parts, []
    expected = iter(expected_parts((part for each in counted.values() for part in each), rates))
    return {
        output: replace(forecast, parts=tuple(itertools.islice(expected, len(counted[output]))))
        for output, forecast in forecasts.items()
    }


def announce(
    progress: Progress,
    forecasts: Mapping[Path, Forecast],
    conversions: Conversion | Mapping[Path, Conversion],
    config: QuantizeConfig,
    work: Path,
    *,
    known: CalibrationSet | Measurement | None,
    measurement: Path | None = None,
    series: bool = False,
) -> None:
    """Tell a progress that wants to know it what the run will take; arguments as in ``with_times``."""
    kinds = list(dict.fromkeys([conversions] if isinstance(conversions, Conversion) else conversions.values()))
    checkpoint = kinds[0].checkpoint
    _log.info("%s", _run_line(checkpoint, _made_words(forecasts, kinds), config.measure))
    if not isinstance(progress, RunProgress):
        return
    outputs = with_times(forecasts, conversions, config, work, known=known, measurement=measurement, series=series)
    timed = outputs.values()
    progress.expect(
        RunForecast(
            parts=tuple(part for each in timed for part in each.parts),
            memory_bytes=max(each.memory_bytes for each in timed),
            disk_bytes=max(each.disk_bytes for each in timed),
        )
    )
    measures = any(part.step == "measure" for each in timed for part in each.parts)
    if kinds[0].measures and not measures and not isinstance(known, Measurement):
        _log.info("resuming: the model is measured")
    for output, forecast in outputs.items():
        _log_resumed(forecast.parts, checkpoint, output)


def announce_measuring(
    progress: Progress,
    conversions: Mapping[str, Conversion],
    config: MeasureConfig,
    output: Path,
    work: Path,
    *,
    rows: CalibrationSet | None,
) -> None:
    """Say what is measured, and tell a progress that wants to know it what that will take; as ``measuring_forecast``.

    Raises:
        BpwiseError: As ``measuring_forecast``.
    """
    if not conversions:
        return
    checkpoint = next(iter(conversions.values())).checkpoint
    _log.info("%s", _run_line(checkpoint, f"{output} (measurement for {', '.join(conversions)})", config))
    if isinstance(progress, RunProgress):
        forecast = measuring_forecast(conversions, config, output, work, rows=rows)
        progress.expect(forecast)
        _log_resumed(forecast.parts, checkpoint, output)


def measuring_forecast(
    conversions: Mapping[str, Conversion],
    config: MeasureConfig,
    output: Path,
    work: Path,
    *,
    rows: CalibrationSet | None,
) -> RunForecast:
    """Return what is left of measuring a model, in seconds.

    Args:
        conversions: The original on its way into the formats to measure, by their names; those whose tools are missing
            or do not fit the model are left out.
        config: Options of measuring.
        output: The measurement's file.
        work: Work directory.
        rows: Calibration rows that are given; None if they are to be made.

    Raises:
        BpwiseError: As ``forecast_outputs``.
    """
    usable = [each for each in conversions.values() if _is_supported(each)]
    if not usable:
        return RunForecast(parts=())
    parts = [preparing_part(each, config) for each in usable if each.scratch(work, output)]
    checkpoint = usable[0].checkpoint
    shape = _rows_shape(rows, config, checkpoint)
    if rows is None:
        store = ResumeStore.existing(work, CALIBRATED, calibrated_identity(config.calibration))
        parts += writing_parts(checkpoint, config, shape, None if store is None else store.path / CALIBRATION_FILE)
    return RunForecast(parts=expected_parts([*parts, *measuring_parts(usable, config, shape, work / MEASUREMENT_FILE)]))


def _run_line(checkpoint: Checkpoint, made: str, config: MeasureConfig) -> str:
    # What a run begins with: the model, what is made of it, and where.
    count = checkpoint.parameter_count
    size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
    blocks, device = language_model(checkpoint).block_count, resolve_device(config.device)
    name, family = model_name(checkpoint), checkpoint.config.get("model_type")
    return f"{name} ({family}, {blocks} blocks, {size} parameters) -> {made}, on {device}"


def _made_words(forecasts: Mapping[Path, Forecast], kinds: Sequence[Conversion]) -> str:
    sizes = ", ".join(dict.fromkeys(f"{forecast.size.bpw:.4g}" for forecast in forecasts.values()))
    titles = " and ".join(format_asking(kind.options).title for kind in kinds)
    (first, *others) = forecasts
    place = f"{len(forecasts)} outputs in {first.parent}" if others else str(first)
    return f"{place} ({titles}, {sizes} bits per weight)"


def _log_resumed(parts: Iterable[ExpectedPart], checkpoint: Checkpoint, output: Path) -> None:
    # How far an earlier run came, in blocks. What comes later in a step says more.
    blocks, words = language_model(checkpoint).block_count, {}
    for part in parts:
        if part.done > 0 and part.label in _RESUMED:
            words[part.step] = f"{round(part.done * blocks)} of {blocks} blocks {_RESUMED[part.label]}"
    for step, each in words.items():
        _log.info("resuming: %s%s", each, f" for {output.name}" if step == "round" else "")


def _is_supported(conversion: Conversion) -> bool:
    try:
        require_convertible(conversion)
    except BpwiseError:
        return False
    return True


def _rows_shape(
    known: CalibrationSet | Measurement | None, config: MeasureConfig, checkpoint: Checkpoint
) -> tuple[int, int]:
    if known is not None:
        return int(known.tokens.shape[0]), int(known.tokens.shape[1])
    asked = config.calibration
    return asked.rows, fit_row_tokens(asked.row_tokens, checkpoint, CALIBRATION)

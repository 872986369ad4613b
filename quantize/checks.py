"""Checks before long work, from config, headers, options and disk: called wherever a run begins, or only forecasts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.files.disk_errors import explained, require_room
from ..checkpoint.files.paths import check_run, refuse_foreign
from ..checkpoint.source.checkpoint import Checkpoint
from ..convert.conversion import Conversion, Target
from ..convert.format import Format
from ..convert.publishing.base_card import read_base_card
from ..convert.publishing.cards import card_path
from ..convert.publishing.mark import mark_path
from ..errors import BpwiseError, ConfigError, WorkDirectoryError
from ..eval.config import EvalConfig
from ..eval.report.report import report_names, try_report
from ..measure.device import resolve_device
from ..measure.measurement import Measurement
from ..measure.run import MeasureConfig, require_measurable
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import CALIBRATION, check_rows, fit_row_tokens
from ..measure.text.mixture import NAMES
from ..measure.text.sources import is_data_set, read_texts
from ..progress import Progress
from .config import QuantizeConfig
from .forecast import Forecast, forecast_run
from .measuring import check_work

__all__ = [
    "ReportPlace",
    "check_measuring",
    "check_output",
    "check_places",
    "exists",
    "forecast_outputs",
    "output_of",
    "report_place",
    "require_convertible",
    "run_prefix",
]

_CARD_SENTENCE = re.compile(rb"quantized to .{1,80} with bpwise\.")
"""In the cards of all formats."""


@dataclass(frozen=True, slots=True)
class ReportPlace:
    """Place of an output's report.

    Attributes:
        directory: The directory.
        prefix: Beginning of all its files' names.
    """

    directory: Path
    prefix: str


def report_place(output: Path, format_: Format) -> ReportPlace:
    """Return where an output's report goes: into its directory, or beside its file."""
    return ReportPlace(output.parent, f"{output.stem}.") if format_.suffix else ReportPlace(output, "")


def files_beside(output: Path, conversion: Conversion, format_: Format) -> list[str]:
    """Return the names of all files that may come to lie beside an output that is a file."""
    if not format_.suffix:
        return []
    own = [path.name for path in conversion.beside(output)]
    return [*own, *report_names(f"{output.stem}."), card_path(output).name, mark_path(output).name]


def exists(output: Path) -> bool:
    """Return whether an output is there; an empty directory is still to be filled.

    Raises:
        WorkDirectoryError: It cannot be looked at.
    """
    with explained(output):
        return any(output.iterdir()) if output.is_dir() else output.exists()


def output_of(output: Path, format_: Format, run: str) -> bool:
    """Return whether the finished output of a run is there.

    Args:
        output: Where it shall be.
        format_: Its format.
        run: What the output says of its run, or the beginning of that.

    Raises:
        WorkDirectoryError: Something else is in the way.
    """
    if format_.suffix and output.is_dir():
        raise WorkDirectoryError(f"{output}: in the way. Got a directory. Expected no such path. Choose another name.")
    if not exists(output):
        return False
    is_kind = output.is_file() if format_.suffix else output.is_dir()
    found = format_.run_of(output) if is_kind else None
    if found is None or not found.startswith(run):
        raise WorkDirectoryError(
            f"{output}: exists already and is not the output of this run. Choose another name or delete it."
        )
    return True


def check_places(
    conversion: Conversion, config: QuantizeConfig, output: Path, work: Path, measurement: Path | None
) -> None:
    """Refuse places that are in the way of each other, before anything is made in them.

    Args:
        conversion: The original on its way into the format.
        config: Options.
        output: Directory or file to make.
        work: Its work directory.
        measurement: The measurement to work from, or None.

    Raises:
        WorkDirectoryError: A place is in the way of another.
    """
    read = (measurement, *conversion.inputs)
    directories = conversion.checkpoint.directories
    check_run(output, work, directories=directories, files=read, offload=config.offload_dirs)
    check_work(work)


def check_output(conversion: Conversion, config: QuantizeConfig, output: Path, progress: Progress) -> None:
    """Refuse an output that is there and not this run's, and files of others that report and card would replace.

    Costs no time unless the output exists.

    Args:
        conversion: The original on its way into the format.
        config: Options.
        output: Directory or file to make.
        progress: Shows how far the original's fingerprint is.

    Raises:
        WorkDirectoryError: There is something else.
        FormatError: What is there is damaged.
    """
    format_ = config.format
    for path in (output, *conversion.beside(output)):
        if output_of(path, format_, ""):
            conversion.checkpoint.prepare_fingerprint(progress)
            output_of(path, format_, run_prefix(conversion.checkpoint))
    place = report_place(output, format_)
    if format_.suffix and config.evaluate is not None:
        try_report(place.directory, prefix=place.prefix)
    if format_.suffix and conversion.writes_card:
        refuse_foreign(card_path(output), _is_card, "a card", advice="move it away")


def run_prefix(checkpoint: Checkpoint) -> str:
    """Return what the identities of all runs on a model begin with."""
    return checkpoint.fingerprint[:8]


def _is_card(path: Path) -> bool:
    try:
        return _CARD_SENTENCE.search(path.read_bytes()) is not None
    except OSError:
        return False


def require_convertible(conversion: Conversion) -> None:
    """Refuse a model that the format or its readers do not know, and missing tools; costs next to no time.

    Raises:
        UnsupportedModelError: The model is not known, or readers would compute another one.
        BpwiseError: A tool is not installed, or an option does not fit the model.
    """
    _ = conversion.warnings
    conversion.require_support()


def forecast_outputs(
    conversion: Conversion,
    targets: Mapping[Path, Target | None],
    measure: MeasureConfig,
    evaluate: EvalConfig | None,
    work: Path,
    *,
    measured: Measurement | None = None,
    measurement: Path | None = None,
    rows: CalibrationSet | None = None,
) -> dict[Path, Forecast]:
    """Return what a run will take for each output; refuse what cannot be quantized.

    Reads headers and what is carried over as it is, once, however many outputs there are.

    Args:
        conversion: The original on its way into the format.
        targets: How large each output may be.
        measure: Options of measuring.
        evaluate: Options of the evaluation; None if there is none.
        work: The run's work directory.
        measured: A measurement to work from; None if there is none yet.
        measurement: Its file.
        rows: Calibration rows that are given; None if they are to be made.

    Raises:
        BpwiseError: What is wrong with the model, the options or the places of the outputs.
    """
    checkpoint = conversion.checkpoint
    require_convertible(conversion)
    if conversion.measures or evaluate is not None:
        require_measurable(checkpoint)
    if measured is not None and rows is not None:
        raise ConfigError("measurement: brings its own calibration rows. Got others too. Leave one of the two out.")
    for device in {measure.device, *([] if evaluate is None else [evaluate.device])}:
        resolve_device(device)
    if evaluate is not None:
        evaluate.fitted(checkpoint)
        conversion.require_readable()
    if rows is not None:
        check_rows(checkpoint, rows, CALIBRATION)
    elif measured is None and conversion.measures:
        fit_row_tokens(measure.calibration.row_tokens, checkpoint, CALIBRATION)
        _check_text(measure)
    known = rows if measured is None else measured
    shape = None if known is None else (int(known.tokens.shape[0]), int(known.tokens.shape[1]))
    if any((target is not None) != conversion.measures for target in targets.values()):
        raise ConfigError(
            "target: got none. Expected bits per weight, a largest size, or the memory of a GPU. Give one."
            if conversion.measures
            else "target: got one. Expected none beside options that say the size. Leave one of them out."
        )
    scratch = conversion.scratch(work, measurement)
    forecasts = {}
    for output, target in targets.items():
        forecast = forecast_run(conversion, target, measure, measured=measured, rows_shape=shape)
        forecasts[output] = replace(forecast, disk_bytes=forecast.disk_bytes + sum(scratch.values()))
    conversion.require_writable()
    if conversion.writes_card:
        read_base_card(checkpoint.directory)
    sizes = {output: each.size.output_bytes for output, each in forecasts.items() if not exists(output)}
    _require_room({**sizes, **scratch})
    return forecasts


def check_measuring(
    conversions: Mapping[str, Conversion],
    measure: MeasureConfig,
    output: Path,
    work: Path,
    *,
    every_format: bool,
    rows: CalibrationSet | None,
) -> None:
    """Refuse what measuring would refuse after long work: missing tools, text and devices, families, and disks.

    Args:
        conversions: The original on its way into the formats to measure, by their names.
        measure: Options.
        output: The measurement to make.
        work: Its work directory.
        every_format: Whether each of the formats must be measured; otherwise one is enough.
        rows: Calibration rows that are given; None if they are to be made.

    Raises:
        BpwiseError: What is wrong.
    """
    resolve_device(measure.device)
    if rows is None:
        _check_text(measure)
    usable, refused = [], []
    for each in conversions.values():
        try:
            require_convertible(each)
            usable.append(each)
        except BpwiseError as error:
            refused.append(error)
    if refused and (every_format or not usable):
        raise refused[0]
    _require_room({path: size for each in usable for path, size in each.scratch(work, output).items()})


def _check_text(measure: MeasureConfig) -> None:
    # Files and folders; a data set shows when it is read.
    for share in measure.calibration.shares:
        if share.source not in NAMES and (Path(share.source).exists() or not is_data_set(share.source)):
            read_texts(share.source, column=measure.calibration.column)


def _require_room(sizes: Mapping[Path, int]) -> None:
    # What is made on one disk must fit there together.
    disks: dict[int, dict[Path, int]] = {}
    for path, size in sizes.items():
        place = path / "*" if path.is_dir() else path
        with explained(path):
            existing = next(each for each in place.absolute().parents if each.exists())
            disks.setdefault(existing.stat().st_dev, {})[place] = size
    for made in disks.values():
        require_room(_together(made), sum(made.values()))


def _together(paths: Iterable[Path]) -> Path:
    several = list(paths)
    if len(several) == 1:
        return several[0]
    return Path(os.path.commonpath([path.absolute().parent for path in several])) / "*"

"""Checks before long work, from config, headers, options and disk: called wherever a run begins, or only forecasts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.files.digests import file_digests
from ..checkpoint.files.disk_errors import explained, require_rooms
from ..checkpoint.files.paths import check_run, companion, refuse_foreign
from ..checkpoint.files.side_files import CARD_NAME
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.hub import side_files
from ..convert.conversion import Conversion, Target
from ..convert.format import Format
from ..convert.names import RECIPE_FILE
from ..convert.registry import format_asking
from ..errors import CheckpointError, ConfigError, WorkDirectoryError
from ..eval.config import EvalConfig
from ..eval.publishing.base_card import read_base_card
from ..eval.publishing.cards import card_path, is_card
from ..eval.publishing.mark import mark_path
from ..eval.report.report import JSON_NAME, report_names, try_report
from ..measure.calibrated import CALIBRATION_FILE, require_text
from ..measure.device import resolve_device
from ..measure.measurement import Measurement
from ..measure.preparing import require_measurable
from ..measure.run import MeasureConfig
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import CALIBRATION, check_rows, fit_row_tokens
from ..progress import Progress
from ..version import __version__
from .config import QuantizeConfig
from .measuring import MEASURING, FinishedCommand, check_work
from .recipe import is_recipe
from .timing.forecast import Forecast, forecast_run

__all__ = [
    "ReportPlace",
    "check_output",
    "check_places",
    "command_digest",
    "forecast_outputs",
    "has_report",
    "is_made",
    "output_of",
    "report_place",
    "require_convertible",
    "require_together",
    "run_prefix",
]


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


def command_digest(
    conversion: Conversion,
    config: QuantizeConfig,
    target: Target | None,
    output: Path,
    measured: Measurement | None,
    rows: CalibrationSet | None,
) -> str:
    """Return a digest of all that a command says of an output, known before anything is converted or measured.

    Args:
        conversion: The original on its way into the format; its fingerprint is known.
        config: Options; their target is not read.
        target: How large the output may be.
        output: What the output is asked to be called; where it lies does not matter.
        measured: The measurement that was given.
        rows: The calibration rows, as far as they are known.

    Raises:
        CheckpointError: A side file of the original cannot be read.
    """
    checkpoint = conversion.checkpoint
    read = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in conversion.inputs]
    options = (target, config.options, config.measure, config.evaluate)
    parts = [
        *(__version__, checkpoint.fingerprint, checkpoint.changes, _carried(checkpoint), read),
        *(output.name, config.base_model_of(checkpoint), conversion.tool),
        *map(repr, options),
        None if measured is None else measured.fingerprint,
        None if rows is None else rows.fingerprint,
    ]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _carried(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    # What outputs hold of the original beside its weights: tokenizer, chat templates, and what its card says.
    card = [CARD_NAME] if os.path.lexists(checkpoint.directory / CARD_NAME) else []
    names = [*side_files(checkpoint.directory), *card]
    return list(zip(names, file_digests([checkpoint.file(name) for name in names], CheckpointError), strict=True))


def has_report(output: Path, format_: Format) -> bool:
    """Return whether there is a report on an output, in one file or in several."""
    reports = (report_place(path, format_) for path in format_.places(output))
    return any((place.directory / f"{place.prefix}{JSON_NAME}").is_file() for place in reports)


def files_beside(output: Path, conversion: Conversion, format_: Format) -> list[str]:
    """Return the names of all files that may come to lie beside an output that is a file, traced parts included."""
    if not format_.suffix:
        return []
    names = [path.name for path in conversion.beside(output)]
    for path, files in format_.places(output).items():
        own = (card_path(path), mark_path(path), companion(path, RECIPE_FILE))
        names += [*report_names(f"{path.stem}."), *(each.name for each in (*own, *files) if each != output)]
    return names


def exists(output: Path) -> bool:
    """Return whether an output is there; an empty directory is still to be filled.

    Raises:
        WorkDirectoryError: It cannot be looked at.
    """
    with explained(output):
        return any(output.iterdir()) if output.is_dir() else output.exists()


def is_made(output: Path, format_: Format) -> bool:
    """Return whether an output is there, in one file or in several; raises as ``exists``."""
    return any(map(exists, format_.places(output)))


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


def check_output(conversion: Conversion, config: QuantizeConfig, output: Path, work: Path, progress: Progress) -> None:
    """Refuse an output that is there and not this run's, and files of others that report and card would replace.

    Costs no time unless the output exists.

    Args:
        conversion: The original on its way into the format.
        config: Options.
        output: Directory or file to make.
        work: Its work directory.
        progress: Shows how far the original's fingerprint is.

    Raises:
        WorkDirectoryError: There is something else.
        FormatError: What is there is damaged.
    """
    format_ = config.format
    places = format_.places(output)
    record = None
    if not conversion.measures:  # such an output says nothing of its run, only the work directory does

        def command() -> str:
            return command_digest(conversion, config, config.target, output, None, None)

        record = FinishedCommand.find(work, output.parent, conversion, command, progress)
    own = () if record is None else record.files_in(output.parent, format_)
    for path in (*itertools.chain(*places.values()), *conversion.beside(output)):
        if path not in own and output_of(path, format_, ""):
            conversion.checkpoint.prepare_fingerprint(progress)
            output_of(path, format_, run_prefix(conversion.checkpoint))
    for path in places if format_.suffix else ():
        if config.evaluate is not None:
            place = report_place(path, format_)
            try_report(place.directory, prefix=place.prefix)
        refuse_foreign(companion(path, RECIPE_FILE), is_recipe, "a recipe", advice="move it away")
        if conversion.writes_card:
            refuse_foreign(card_path(path), is_card, "a card", advice="move it away")


def run_prefix(checkpoint: Checkpoint) -> str:
    """Return what the identities of all runs on a model begin with."""
    return checkpoint.fingerprint[:8]


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

    Leaves room on disks, which all outputs take together, to ``require_together``.
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
        require_text(checkpoint, evaluate.calibration_config(), [])
        conversion.require_readable()
    if rows is not None:
        check_rows(checkpoint, rows, CALIBRATION)
    elif measured is None and conversion.measures:
        fit_row_tokens(measure.calibration.row_tokens, checkpoint, CALIBRATION)
        kept = [place / CALIBRATION_FILE for place in (work, work / MEASURING)]
        require_text(checkpoint, measure.calibration, kept, device=measure.device)
    known = rows if measured is None else measured
    shape = None if known is None else (int(known.tokens.shape[0]), int(known.tokens.shape[1]))
    if any((target is not None) != conversion.measures for target in targets.values()):
        raise ConfigError(
            "target: got none. Expected bits per weight, a largest size, or the memory of a GPU. Give one."
            if conversion.measures
            else "target: got one. Expected none beside options that say the size. Leave one of them out."
        )
    names = format_asking(conversion.options).size_names
    for target in targets.values():
        if target is not None and target.size_of is not None and target.size_of not in names:
            raise ConfigError(
                f"size of {target.size_of}: not known. Expected {', '.join(names) or 'another target for this format'}."
                " Choose another."
            )
    scratch = conversion.scratch(work, measurement)
    forecasts = {}
    for output, target in targets.items():
        whole = format_asking(conversion.options).whole_path(output)
        if whole != output:
            raise WorkDirectoryError(
                f"{output}: the name of a part. Expected that of the whole model: parts are numbered as they are made. "
                f"Name it {whole.name}."
            )
        forecast = forecast_run(conversion, target, measure, measured=measured, rows_shape=shape)
        forecasts[output] = replace(forecast, disk_bytes=forecast.disk_bytes + sum(scratch.values()))
    conversion.require_writable()
    if conversion.writes_card:
        read_base_card(checkpoint.directory)
    return forecasts


def require_together(
    lines: Iterable[tuple[Conversion, Mapping[Path, Forecast]]], work: Path, measurement: Path | None
) -> None:
    """Refuse disks that have no room for all outputs of a run together, and for what is made for them.

    Args:
        lines: The original on its way into each format, and the forecasts of the outputs in it.
        work: The run's work directory.
        measurement: File of the measurement to work from; None if there is none yet.

    Raises:
        WorkDirectoryError: A disk is too small.
    """
    sizes: dict[Path, int] = {}
    for conversion, forecasts in lines:
        format_ = format_asking(conversion.options)
        sizes |= {path: each.size.output_bytes for path, each in forecasts.items() if not is_made(path, format_)}
        sizes |= conversion.scratch(work, measurement)
    require_rooms(sizes)

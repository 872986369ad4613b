"""The measurement that a run works from: one that was given, one that an earlier run left behind, or a new one."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ..checkpoint.equalized.view import equalized
from ..checkpoint.files.atomic import write_json
from ..checkpoint.files.digests import file_digests
from ..checkpoint.files.paths import refuse_foreign
from ..checkpoint.files.schemas import read_schema
from ..checkpoint.model.structure_json import structure_to_json
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.language import language_model
from ..checkpoint.source.linears import model_linears
from ..convert.conversion import Conversion
from ..convert.format import Format
from ..convert.plan import Plan
from ..convert.registry import format_asking, is_plan
from ..errors import BpwiseWarning, FormatError
from ..measure.calibrated import CALIBRATION_FILE, load_or_make_rows, measured_rows
from ..measure.curves import CurveMaker
from ..measure.measurement import Measurement, is_measurement
from ..measure.run import MeasureConfig, measure_checkpoint, measured_with, measurement_provenance
from ..measure.text.calibration import CalibrationSet, is_calibration
from ..progress import Progress, silent
from .timing.costs import StepClock

__all__ = [
    "FINISHED_FILE",
    "MEASUREMENT_FILE",
    "MEASURING",
    "PLAN_FILE",
    "FinishedCommand",
    "GivenMeasurement",
    "check_work",
    "content_digest",
    "load_measurement",
    "load_or_measure",
]

_log = logging.getLogger(__name__)

MEASUREMENT_FILE = "measurement.safetensors"
"""Where a run keeps its measurement in the work directory."""

MEASURING = "measure"
"""Folder of a series' work directory that the model is measured in."""

PLAN_FILE = "plan.json"
"""Where it keeps its plan."""


FINISHED_FILE = "finished.json"
"""In the work directory of an output: what the command was that finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCommand:
    """What a run leaves in its work directory once its output is there: content of ``FINISHED_FILE``.

    Attributes:
        command: As ``command_digest`` has it.
        run: What the output says of its run; a digest of its files where it says nothing.
        plan: SHA-256 of the identity of the plan that it was made from.
        output: Name of the path that opens the output, percent-encoded: names need not be UTF-8.
        complete: Whether the output was evaluated, too, and has all that belongs to it.
    """

    command: str
    run: str
    plan: str
    output: str
    complete: bool = True

    @classmethod
    def of(cls, command: str, run: str, plan: Plan, output: Path, *, complete: bool) -> FinishedCommand:
        """Return the record of a command that has made an output."""
        name = quote(output.name, errors="surrogateescape")
        return cls(command=command, run=run, plan=_plan_digest(plan), output=name, complete=complete)

    @classmethod
    def load(cls, work: Path) -> FinishedCommand | None:
        """Return what a work directory holds of it, None if that is nothing, or damaged."""
        try:
            return read_schema(work / FINISHED_FILE, cls, FormatError)
        except FormatError:
            return None

    @classmethod
    def find(
        cls, work: Path, folder: Path, conversion: Conversion, command: Callable[[], str], progress: Progress
    ) -> FinishedCommand | None:
        """Return what an earlier run of the same command left, None if there is nothing.

        Args:
            work: Its work directory.
            folder: The output's folder; an output that says nothing of its run must be there, as it was made.
            conversion: The original on its way into the format.
            command: Returns the command's digest once the original's fingerprint is known.
            progress: Shows how far that is.

        Raises:
            FormatError: The output cannot be read.
        """
        record = cls.load(work)
        if record is None:
            return None
        conversion.checkpoint.prepare_fingerprint(progress)
        if record.command != command():
            return None
        return record if conversion.measures or record.files_in(folder, format_asking(conversion.options)) else None

    def is_from(self, plan: Plan) -> bool:
        """Return whether the output was made from a plan."""
        return self.plan == _plan_digest(plan)

    def opened_in(self, folder: Path) -> Path:
        """Return the path that opens the output."""
        return folder / Path(unquote(self.output, errors="surrogateescape")).name

    def files_in(self, folder: Path, format_: Format) -> tuple[Path, ...]:
        """Return the files of an output that says nothing of its run; none unless they are as they were made."""
        output = self.opened_in(folder)
        whole = output.is_file() and self.run == content_digest(output, format_)
        return (output, *format_.companions(output)) if whole else ()

    def save(self, work: Path) -> None:
        """Write it into a work directory."""
        write_json(work / FINISHED_FILE, asdict(self))


def content_digest(output: Path, format_: Format) -> str:
    """Return a digest of an output's files, a model's parts included.

    Raises:
        FormatError: One of them cannot be read.
    """
    return hashlib.sha256(
        json.dumps(file_digests([output, *format_.companions(output)], FormatError)).encode()
    ).hexdigest()


@dataclass(frozen=True, slots=True)
class GivenMeasurement:
    """A measurement to work from, read once.

    Attributes:
        path: Its file; None where it was given without.
        measurement: What it holds.
    """

    path: Path | None
    measurement: Measurement

    @classmethod
    def load(
        cls, given: Measurement | str | Path | None, checkpoint: Checkpoint, progress: Progress
    ) -> GivenMeasurement | None:
        """Take a measurement, or read its file as ``load_measurement``; None if there is none."""
        if given is None:
            return None
        if isinstance(given, Measurement):
            _check_measurement(given, "measurement", checkpoint, progress)
            return cls(None, given)
        return cls(Path(given), load_measurement(Path(given), checkpoint, progress))


def load_or_measure(
    checkpoint: Checkpoint,
    config: MeasureConfig,
    curves: Callable[[], Sequence[CurveMaker]],
    work: Path,
    clock: StepClock,
    progress: Progress,
    *,
    given: GivenMeasurement | None,
    calibration: CalibrationSet | None,
    check_rows: Callable[[CalibrationSet], object] | None = None,
) -> tuple[Measurement, CalibrationSet]:
    """Return a model's measurement and its calibration rows, which are kept in the work directory.

    Args:
        checkpoint: The model.
        config: How to measure, where there is no measurement yet.
        curves: Returns the formats to measure then.
        work: Work directory; a new measurement is kept in it.
        clock: Takes the time of what is done.
        progress: Wraps the blocks of each pass.
        given: A measurement of this model; None looks into the work directory, or measures.
        calibration: Rows to use instead of those that ``config.calibration`` describes; not with ``given``.
        check_rows: Called with the rows before the long work; it may raise.

    Raises:
        BpwiseError: As ``load_or_make_rows`` and ``measure_checkpoint``.
    """
    if given is not None:
        measured, rows = given.measurement, measured_rows(given.measurement)
        rows.save(work / CALIBRATION_FILE)
        if given.path is None:  # so that it serves other runs
            measured.save(work / MEASUREMENT_FILE)
        if check_rows is not None:
            check_rows(rows)
    else:
        with clock.step("calibration text"):
            rows = load_or_make_rows(
                checkpoint,
                config.calibration,
                work / CALIBRATION_FILE,
                device=config.device,
                given=calibration,
                progress=progress,
            )
        if check_rows is not None:
            check_rows(rows)
        with clock.step("measure"):
            measured = _measured(checkpoint, rows, config, curves(), work, progress)
    return measured, rows


def check_work(work: Path) -> None:
    """Refuse a work directory in which a run would replace files that are not a run's.

    Args:
        work: The directory; it need not exist.

    Raises:
        WorkDirectoryError: There is such a file.
    """
    advice = "name another --work-dir"
    refuse_foreign(work / MEASUREMENT_FILE, is_measurement, "a measurement", advice=advice)
    refuse_foreign(work / CALIBRATION_FILE, is_calibration, "a calibration set", advice=advice)
    refuse_foreign(work / PLAN_FILE, is_plan, "a plan", advice=advice)
    refuse_foreign(
        work / FINISHED_FILE,
        lambda _: FinishedCommand.load(work) is not None,
        "the record of a finished run",
        advice=advice,
    )


def load_measurement(path: Path, checkpoint: Checkpoint, progress: Progress = silent) -> Measurement:
    """Read a measurement of a model.

    Args:
        path: The file.
        checkpoint: The model.
        progress: Wraps what is read of the model to know it.

    Raises:
        BpwiseError: As ``Measurement.load`` and ``measured_rows``.
        FormatError: It belongs to another model.
    """
    measurement = Measurement.load(path)
    _log.debug("measurement: %s, for %s", path, ", ".join(measurement.curves))
    _check_measurement(measurement, str(path), checkpoint, progress)
    return measurement


def _check_measurement(measurement: Measurement, where: str, checkpoint: Checkpoint, progress: Progress) -> None:
    measured_rows(measurement)
    measured_with(measurement)
    checkpoint.prepare_fingerprint(progress)
    model = measurement.provenance.get("model")
    if model != checkpoint.fingerprint:
        if model == equalized(checkpoint).fingerprint:
            raise FormatError(
                f"{where}: the measurement is of equalized channels, and the base is not. Leave --base out, or measure "
                "the model again without --equalize."
            )
        raise FormatError(
            f"{where}: the measurement belongs to another model than {checkpoint.directory}, or to what its files were "
            "before they changed, or to an earlier version of bpwise, which looked only at samples of the weights. "
            "Measure this model again."
        )
    source = language_model(checkpoint)
    if measurement.provenance.get("structure") != structure_to_json(source.structure):
        raise FormatError(
            f"{where}: the measurement describes different blocks from those of {checkpoint.directory}. Got other "
            "linears, other groups of linears that share an input, or none stored. Expected what this version of "
            "Transformers runs. Measure the model again, or use the version of Transformers it was measured with."
        )
    linears, head = model_linears(source)
    measured = [(x.name, x.in_features, x.out_features) for x in (*measurement.linears, measurement.head)]
    if measured != [(x.name, x.in_features, x.out_features) for x in (*linears, head)]:
        raise FormatError(
            f"{where}: the measurement has other linears than {checkpoint.directory}. Got {len(measured)}. Expected "
            f"{len(linears) + 1} with the model's names and shapes. It is damaged: measure the model again."
        )
    table = measurement.embedding
    got = (f"{table.name}.weight", (table.tokens, table.hidden_size), table.tied)
    name = f"{source.embedding_name}.weight"
    if got != (name, source.shape(name), source.tied_embeddings):
        raise FormatError(
            f"{where}: the measurement has other token embeddings than {checkpoint.directory}. Got {_table(*got)}. "
            f"Expected {_table(name, source.shape(name), source.tied_embeddings)}. It is damaged: measure "
            "the model again."
        )


def _plan_digest(plan: Plan) -> str:
    return hashlib.sha256(json.dumps(plan.identity()).encode()).hexdigest()


def _table(name: str, shape: tuple[int, ...], tied: bool) -> str:
    return f"{name} of {' x '.join(map(str, shape))}, {'the' if tied else 'not the'} output head too"


def _measured(
    checkpoint: Checkpoint,
    rows: CalibrationSet,
    config: MeasureConfig,
    curves: Sequence[CurveMaker],
    work: Path,
    progress: Progress,
) -> Measurement:
    kept = work / MEASUREMENT_FILE
    if kept.exists():
        checkpoint.prepare_fingerprint(progress)
        wanted = measurement_provenance(checkpoint, rows, config, curves)
        try:
            measurement = Measurement.load(kept)
        except FormatError as error:
            warnings.warn(f"{error} It is measured again now.", BpwiseWarning, stacklevel=2)
        else:
            if _serves(measurement.provenance, wanted):
                return measurement
    measurement = measure_checkpoint(checkpoint, rows, config, curves, work, progress)
    measurement.save(kept)
    return measurement


def _serves(measured: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    # Curves that are not asked for do no harm.
    curves = measured.get("curves")
    return isinstance(curves, dict) and {**measured, "curves": {**curves, **wanted["curves"]}} == {
        **wanted,
        "curves": curves,
    }

"""The measurement that a run works from: one that was given, one that an earlier run left behind, or a new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files.paths import refuse_foreign
from ..checkpoint.model.structure_json import structure_to_json
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.language import language_model
from ..checkpoint.source.linears import model_linears
from ..convert.registry import is_plan
from ..errors import BpwiseWarning, FormatError
from ..measure.calibrated import CALIBRATION_FILE, load_or_make_rows, measured_rows
from ..measure.curves import CurveMaker
from ..measure.measurement import Measurement, is_measurement
from ..measure.run import MeasureConfig, measure_checkpoint, measurement_provenance
from ..measure.text.calibration import CalibrationSet, is_calibration
from ..progress import Progress, silent
from .timing.costs import StepClock

__all__ = [
    "MEASUREMENT_FILE",
    "MEASURING",
    "PLAN_FILE",
    "GivenMeasurement",
    "check_work",
    "load_measurement",
    "load_or_measure",
]

MEASUREMENT_FILE = "measurement.safetensors"
"""Where a run keeps its measurement in the work directory."""

MEASURING = "measure"
"""Folder of a series' work directory that the model is measured in."""

PLAN_FILE = "plan.json"
"""Where it keeps its plan."""


@dataclass(frozen=True, slots=True)
class GivenMeasurement:
    """A measurement to work from, read once.

    Attributes:
        path: Its file.
        measurement: What it holds.
    """

    path: Path
    measurement: Measurement

    @classmethod
    def load(cls, path: Path | None, checkpoint: Checkpoint, progress: Progress) -> GivenMeasurement | None:
        """Read a measurement as ``load_measurement``; None if there is no file of one."""
        return None if path is None else cls(path, load_measurement(path, checkpoint, progress))


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
    measured_rows(measurement)
    checkpoint.prepare_fingerprint(progress)
    if measurement.provenance.get("model") != checkpoint.fingerprint:
        raise FormatError(
            f"{path}: the measurement belongs to another model than {checkpoint.directory}, or to what its files were "
            "before they changed, or to an earlier version of bpwise, which looked only at samples of the weights. "
            "Measure this model again."
        )
    source = language_model(checkpoint)
    if measurement.provenance.get("structure") != structure_to_json(source.structure):
        raise FormatError(
            f"{path}: the measurement describes different blocks from those of {checkpoint.directory}. Got other "
            "linears, other groups of linears that share an input, or none stored. Expected what this version of "
            "Transformers runs. Measure the model again, or use the version of Transformers it was measured with."
        )
    linears, head = model_linears(source)
    measured = [(x.name, x.in_features, x.out_features) for x in (*measurement.linears, measurement.head)]
    if measured != [(x.name, x.in_features, x.out_features) for x in (*linears, head)]:
        raise FormatError(
            f"{path}: the measurement has other linears than {checkpoint.directory}. Got {len(measured)}. Expected "
            f"{len(linears) + 1} with the model's names and shapes. It is damaged: measure the model again."
        )
    table = measurement.embedding
    got = (f"{table.name}.weight", (table.tokens, table.hidden_size), table.tied)
    name = f"{source.embedding_name}.weight"
    if got != (name, source.shape(name), source.tied_embeddings):
        raise FormatError(
            f"{path}: the measurement has other token embeddings than {checkpoint.directory}. Got {_table(*got)}. "
            f"Expected {_table(name, source.shape(name), source.tied_embeddings)}. It is damaged: measure "
            "the model again."
        )
    return measurement


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

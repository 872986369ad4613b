"""The measuring step: one forward and one backward pass over the calibration rows, block by block, then curves."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.equalized.view import EQUALIZED, column_factors
from ..checkpoint.files.paths import check_run, refuse_foreign, reserved, work_beside
from ..checkpoint.files.resume import ResumeStore, run_artifacts
from ..checkpoint.files.schemas import check_schema
from ..checkpoint.model.structure_json import structure_to_json
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.language import LanguageModel, language_model
from ..checkpoint.source.original import Original, open_model
from ..errors import ConfigError, FormatError
from ..linalg.products import FLOAT32, PRECISIONS, float32_products, pass_precision
from ..progress import Progress, silent
from ..version import __version__
from .calibrated import CALIBRATION_FILE, load_or_make_rows
from .curves import CurveMaker, CurveSource, InputsKeeper
from .device import resolve_device
from .embeddings import finished_tables
from .measurement import FormatCurves, Measurement, is_measurement
from .model.replay import check_replay
from .model.stream import StreamedModel
from .passes import MeasuringPasses, finished_decoder, finished_head, repeat_without
from .preparing import prepared_curves, require_measurable
from .text.calibration import CalibrationConfig, CalibrationSet
from .text.context import CALIBRATION, check_rows
from .text.mixture import NAMES

__all__ = [
    "CALIBRATED",
    "MEASURED",
    "MeasureConfig",
    "calibrated_identity",
    "kept_inputs",
    "measure_checkpoint",
    "measure_to_file",
    "measured_with",
    "measurement_provenance",
]

_log = logging.getLogger(__name__)

CALIBRATED = "calibrate"
"""Name of the step in the work directory that makes calibration rows; its identity is their options."""

MEASURED = "measure"
"""Name of the step in the work directory; a measurement's provenance is its identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """Options of the measuring step.

    Attributes:
        calibration: Which text, and how much of it.
        damping: What is added to the diagonal of every Hessian, relative to its mean, dimensionless; None chooses for
            each input group what serves held-out sequences best.
        seed: Seed of the random signs that probe the Fisher information.
        equalize: Whether channels are equalized before anything else; see ``checkpoint.equalized.view``.
        moe_calibrate_all: Whether all tokens are run through all experts of a mixture: those that did not choose an
            expert count a tenth of those that did. Otherwise only experts that few tokens choose see others.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
        offload_dir: Directory for files with the hidden states of all rows; None keeps them in memory.
        precision: Of matrix products in the passes and of sums over tokens: ``float32``, or ``auto`` for the fastest
            that the device has (see ``bpwise.linalg.products``).
    """

    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    damping: float | None = None
    seed: int = 0
    equalize: bool = False
    moe_calibrate_all: bool = False
    device: str = "auto"
    offload_dir: Path | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if isinstance(self.offload_dir, str):
            object.__setattr__(self, "offload_dir", Path(self.offload_dir))
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision: unknown name. Got {self.precision!r}. Expected one of {', '.join(PRECISIONS)}. "
                "Choose another."
            )
        if self.damping is not None and not 0 < self.damping < 1:
            raise ConfigError(
                f"damping: not usable. Got {self.damping}. Expected a value between 0 and 1. Choose another."
            )


def measurement_provenance(
    checkpoint: Checkpoint, calibration: CalibrationSet, config: MeasureConfig, curves: Sequence[CurveMaker]
) -> dict[str, Any]:
    """Return all that a measurement depends on, as plain JSON: the same provenance means the same measurement."""
    (rows, row_tokens), device = calibration.tokens.shape, resolve_device(config.device)
    return {
        "bpwise": __version__,
        "model": checkpoint.fingerprint,
        "calibration": calibration.fingerprint,
        "calibration_text": calibration.description,
        "calibration_origins": list(calibration.origins),
        "calibration_adds_bos": calibration.adds_bos,
        **({} if calibration.options is None else {"calibration_options": asdict(calibration.options)}),
        "rows": rows,
        "row_tokens": row_tokens,
        "damping": config.damping,
        "seed": config.seed,
        "moe_calibrate_all": config.moe_calibrate_all,
        "device": device.type,
        "precision": pass_precision(device, config.precision),
        "curves": {maker.name: _digest(maker) for maker in curves},
        "structure": structure_to_json(language_model(checkpoint).structure),
        **({"changes": checkpoint.changes} if checkpoint.changes else {}),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _OptionsProvenance:
    """What ``measurement_provenance`` says of the options, but for the calibration text."""

    damping: float | None = None
    seed: int = 0
    moe_calibrate_all: bool = False
    precision: str = FLOAT32
    changes: dict[str, Any] = field(default_factory=dict)


def measured_with(measurement: Measurement) -> MeasureConfig:
    """Return the options that a measurement was made with, but for the calibration text and what is of the machine.

    Raises:
        FormatError: The measurement's provenance does not tell them.
        ConfigError: They make no sense.
    """
    where, remedy = "measurement: provenance", "The measurement is damaged: measure the model again."
    known = check_schema(measurement.provenance, _OptionsProvenance, FormatError, where=where, remedy=remedy)
    return MeasureConfig(
        damping=known.damping,
        seed=known.seed,
        equalize=EQUALIZED in known.changes,
        moe_calibrate_all=known.moe_calibrate_all,
        precision=FLOAT32 if known.precision == FLOAT32 else "auto",
    )


def _digest(curves: CurveMaker) -> str:
    # Of all that they depend on: a header may describe a whole file.
    return hashlib.sha256(json.dumps([curves.version, dict(curves.header)]).encode()).hexdigest()[:32]


def measure_checkpoint(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    config: MeasureConfig,
    curves: Sequence[CurveMaker],
    work: Path,
    progress: Progress = silent,
    *,
    keeper: InputsKeeper | None = None,
) -> Measurement:
    """Measure every linear of a model's decoder, its head and its token embeddings.

    Args:
        checkpoint: The model.
        calibration: Token ids, shape (rows, tokens).
        config: Options; ``config.calibration`` is not read here.
        curves: The formats to measure, each once.
        work: Work directory; finished blocks in it are not done again.
        progress: Wraps the blocks of each pass.
        keeper: Keeps what curves are made of; it has begun.

    Returns:
        The measurement. Its damages are in nats per token.

    Raises:
        UnsupportedModelError: The family is unknown, or the MLPs have biases.
        NumericalError: NaN or infinity in activations or gradients.
    """
    checkpoint.prepare_fingerprint(progress)
    provenance = measurement_provenance(checkpoint, calibration, config, curves)
    source, device = language_model(checkpoint), resolve_device(config.device)
    run = MeasuringPasses(
        StreamedModel(source, device=device, dtype=torch.float32, offload_dir=config.offload_dir),
        calibration.tokens,
        ResumeStore(work, MEASURED, provenance),
        [*curves, *([] if keeper is None else [keeper])],
        damping=config.damping,
        seed=config.seed,
        experts_see_all_tokens=config.moe_calibrate_all,
        precision=provenance["precision"],
    )
    if keeper is not None:
        repeat_without(run.model, run.artifacts, keeper.has)
    with float32_products(device):
        if source.listed is None:
            check_replay(run.model)
        run.forward(progress)
        run.head()
        run.backward(progress)
        run.embedding()
    linears, head = finished_decoder(run.model, run.artifacts), finished_head(run.artifacts)
    names = [each.linear.name for each in (*linears, head)]
    factors = {x: own.numpy() for x in names if (own := column_factors(checkpoint, source, x)) is not None}
    embedding, of_layers = finished_tables(run.model, run.artifacts)
    tables = [embedding, *([] if of_layers is None else [of_layers])]
    return Measurement(
        linears=tuple(replace(x.linear, input_factors=factors.get(x.linear.name)) for x in linears),
        head=replace(head.linear, input_factors=factors.get(head.linear.name)),
        embedding=embedding.table,
        layer_embedding=None if of_layers is None else of_layers.table,
        other_weights=_other_weights(source, [*names, *(x.table.name for x in tables)]),
        tokens=calibration.tokens.int().numpy(),
        curves={
            maker.name: FormatCurves(
                version=maker.version,
                header=dict(maker.header),
                linears={
                    **{each.linear.name: each.curves.get(maker.name, {}) for each in (*linears, head)},
                    **{each.table.name: each.curves.get(maker.name, {}) for each in tables[1:]},
                },
                table=embedding.curves.get(maker.name, {}),
            )
            for maker in curves
        },
        provenance=provenance,
        config=source.config,
    )


def calibrated_identity(config: CalibrationConfig) -> dict[str, Any]:
    """Return the identity of the step that makes calibration rows, as ``ResumeStore`` takes it.

    It is left behind by a run that is cut off: no path is in it, only a digest of all options.
    """
    digest = hashlib.sha256(json.dumps(asdict(config)).encode("utf-8", "surrogatepass")).hexdigest()
    return {"options": digest[:32]}


def kept_inputs(work: Path, measurement: Measurement) -> ResumeStore | None:
    """Return the artifacts of a measuring step that ran in the same work directory, None if it did not.

    Until the run ends, artifact ``input-N`` holds what enters block N, over all calibration rows: ``hidden``, float32,
    shape (rows, tokens, hidden size).
    """
    return ResumeStore.existing(work, MEASURED, measurement.provenance)


def _other_weights(source: LanguageModel, quantized: Sequence[str]) -> int:
    matrices = {f"{name}.weight" for name in quantized}
    return sum(math.prod(source.shape(name)) for name in source.names if name not in matrices)


def measure_to_file(
    model: Original,
    output: Path,
    config: MeasureConfig,
    *,
    formats: Mapping[str, CurveSource],
    work: Path | None = None,
    every_format: bool = False,
    calibration: CalibrationSet | None = None,
    force: bool = False,
    keeper: InputsKeeper | None = None,
    begin: Callable[[], object] | None = None,
    progress: Progress = silent,
) -> Measurement:
    """Measure a model and keep the measurement in a file.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        output: The file to write; an older measurement is replaced, unless it is this very one.
        config: Options.
        formats: What makes the curves of the formats to measure, by their names: the model on its way into each. One
            whose tools are missing or do not fit the model is left out with a warning, as long as another is left.
        every_format: Whether such a format ends the run instead.
        work: Work directory; default ``OUTPUT.work``. Its resume artifacts are deleted when the measurement is
            complete.
        calibration: Rows to use instead of those that ``config.calibration`` describes.
        force: Whether any other file is replaced too.
        keeper: Keeps what curves are made of, in a folder of its own.
        begin: Called when everything was checked, before the long work.
        progress: Shows how far the passes are.

    Returns:
        The measurement.

    Raises:
        BpwiseError: As ``measure_checkpoint`` and ``load_or_make_rows``; or the output is in the way of something, or
            cannot be written.
    """
    checkpoint = open_model(model)
    work = work or work_beside(output)
    files = tuple(Path(share.source) for share in config.calibration.shares if share.source not in NAMES)
    places = (config.offload_dir, None if keeper is None else keeper.folder)
    check_run(output, work, directories=checkpoint.directories, files=files, offload=places)
    if not force:
        refuse_foreign(output, is_measurement, "a measurement")
    require_measurable(checkpoint)
    if calibration is not None:
        check_rows(checkpoint, calibration, CALIBRATION)
    with reserved(output), run_artifacts(work) as artifacts:
        if begin is not None:
            begin()
        identity = calibrated_identity(config.calibration)
        artifacts.add(CALIBRATED, identity)
        kept = ResumeStore(work, CALIBRATED, identity).path / CALIBRATION_FILE
        rows = load_or_make_rows(
            checkpoint, config.calibration, kept, device=config.device, given=calibration, progress=progress
        )
        curves = prepared_curves(formats, output, work, artifacts, progress, required=every_format)
        provenance = measurement_provenance(checkpoint, rows, config, curves)
        artifacts.add(MEASURED, provenance)
        if keeper is not None:
            keeper.begin(provenance, rows)
        earlier = _measurement_of(output, provenance)
        if earlier is not None and (keeper is None or _all_kept(keeper, earlier)):
            _log.info("finished already: %s holds what this command makes", output)
            return earlier
        measurement = measure_checkpoint(checkpoint, rows, config, curves, work, progress, keeper=keeper)
        measurement.save(output)
    return measurement


def _all_kept(keeper: InputsKeeper, measurement: Measurement) -> bool:
    return all(keeper.has(linear.name) for linear in (*measurement.linears, measurement.head))


def _measurement_of(path: Path, provenance: dict[str, Any]) -> Measurement | None:
    try:
        found = Measurement.load(path) if path.is_file() else None
    except FormatError:  # damaged, or of another version
        return None
    return found if found is not None and found.provenance == provenance else None

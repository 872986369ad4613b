"""Options of a whole run, and what its outputs share. Each step takes its own part; only the run holds all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.equalized.view import equalized
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.hub import directory_name
from ..checkpoint.source.original import Original, open_model
from ..convert.conversion import Conversion, Provenance, Target
from ..convert.format import Format
from ..convert.names import hub_id
from ..convert.options import FormatOptions
from ..convert.registry import format_asking, format_naming, formats
from ..errors import BpwiseError, ConfigError
from ..eval.config import EvalConfig
from ..eval.metrics.overlap import CalibrationSpans
from ..eval.publishing.cards import check_base_model
from ..measure.measurement import Measurement
from ..measure.run import MeasureConfig, measured_with
from ..measure.text.calibration import CalibrationSet
from ..measure.text.mixture import BUILT_IN
from ..progress import Progress
from ..version import __version__
from .judge import Judge
from .measuring import GivenMeasurement

__all__ = ["Job", "QuantizeConfig", "chosen_evaluation", "chosen_target", "options_naming", "original_for"]


def options_naming(output: Path) -> FormatOptions:
    """Return the default options of the format that an output is named as, else of the first."""
    return (format_naming(output) or next(iter(formats().values()))).Options()


def chosen_target(output: Path, options: FormatOptions | None, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``target`` and ``options`` of an output.

    Args:
        output: Its name chooses the format where there are no options.
        options: The format's options; None for the defaults. See ``Format.completed`` for what they leave open.
        sizes: What ``Target`` takes; all None asks for the format's own size.
    """
    sized = any(each is not None for each in sizes.values())
    options = options or options_naming(output)
    format_ = format_asking(options)
    own = Target(bpw=format_.default_bpw) if options.measures else None
    return {"target": Target(**sizes) if sized else own, "options": format_.completed(options, sized=sized)}


def chosen_evaluation(evaluate: EvalConfig | bool) -> EvalConfig | None:
    """Return the options of an evaluation; None where it is left out."""
    if isinstance(evaluate, EvalConfig):
        return evaluate
    return EvalConfig() if evaluate else None


def original_for(
    model: Original,
    config: MeasureConfig,
    given: Measurement | str | Path | None = None,
    *,
    options: Iterable[FormatOptions] = (),
) -> Checkpoint:
    """Open the original of a run as it will be measured, or was.

    Args:
        model: A local directory, a Hub id, or what ``open_model`` made of one.
        config: How to measure, where there is no measurement yet.
        given: A measurement of the model, or its file. One that cannot be read is refused later.
        options: Those of all formats. One that does not take equalized channels gets the model as it is.

    Raises:
        CheckpointError: As ``open_model``.
    """
    checkpoint, wanted = open_model(model), config.equalize
    if given is not None:
        with suppress(BpwiseError):
            wanted = measured_with(given if isinstance(given, Measurement) else Measurement.load(given)).equalize
    return equalized(checkpoint) if wanted and all(each.equalizes for each in options) else checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Options of a whole run.

    Attributes:
        target: How large the output may be; None only where the format's options say it all.
        options: The format's options, which choose the format too.
        measure: Options of measuring; its calibration rows and device serve rounding too.
        evaluate: Options of the evaluation, or None to leave it out.
        base_model: Hub id of the original for the model card; None takes it from where the original came from.
    """

    target: Target | None = None
    options: FormatOptions = field(default_factory=lambda: options_naming(Path()))
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluate: EvalConfig | None = field(default_factory=EvalConfig)
    base_model: str | None = None

    def __post_init__(self) -> None:
        """Check what the parts say of each other.

        Raises:
            ConfigError: They contradict each other, or the model's id is not one.
        """
        check_base_model(self.base_model)
        calibration = {share.source for share in self.measure.calibration.shares} - {
            BUILT_IN
        }  # its halves share nothing
        held_out = self.evaluate is not None and not self.evaluate.allow_calibration_text
        if held_out and self.evaluate is not None and self.evaluate.text in calibration:
            raise ConfigError(
                f"{self.evaluate.text}: cannot be calibration and evaluation text at once. Evaluate on other text, or "
                "force it with --force-eval-text."
            )

    @property
    def format(self) -> Format:
        """The format of the output."""
        return format_asking(self.options)

    def conversion(self, checkpoint: Checkpoint) -> Conversion:
        """Return an original on its way into the format."""
        return self.format.conversion(checkpoint, self.options)

    def base_model_of(self, checkpoint: Checkpoint) -> str | None:
        """Return the Hub id of an original, as far as it is known."""
        return self.base_model or hub_id(directory_name(checkpoint.directory))

    @property
    def offload_dirs(self) -> tuple[Path | None, ...]:
        """Directories of hidden states, or None: of measuring and rounding, and of the evaluation."""
        return self.measure.offload_dir, None if self.evaluate is None else self.evaluate.offload_dir


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """Everything that the outputs of a run share.

    Attributes:
        conversion: The original on its way into the format.
        config: Options; their target is not read.
        given: The measurement to work from, as it was read; None measures first.
        calibration: Calibration rows that were given; None makes them.
        measured_here: Whether it is measured as the options say: no measurement was given.
        judge: Evaluates outputs; None leaves that out.
        progress: Shows how far the steps are.
        started: When the run began, as ``time.monotonic`` has it.
    """

    conversion: Conversion
    config: QuantizeConfig
    given: GivenMeasurement | None
    calibration: CalibrationSet | None
    measured_here: bool
    judge: Judge | None
    progress: Progress
    started: float = field(default_factory=time.monotonic)

    @property
    def checkpoint(self) -> Checkpoint:
        """The original."""
        return self.conversion.checkpoint

    @property
    def measurement(self) -> Path | None:
        """File of the measurement that was given."""
        return None if self.given is None else self.given.path

    def provenance(self, rows: CalibrationSet | None, run: str = "0" * 32) -> Provenance:
        """Return what an output says of where it comes from.

        Args:
            rows: The calibration rows; None where nothing is calibrated, or they are not there yet.
            run: Identifies the run; a placeholder of the same length where that is not known yet.
        """
        checkpoint, warnings = self.checkpoint, self.conversion.warnings
        checkpoint.prepare_fingerprint(self.progress)
        if rows is None:
            return Provenance(version=__version__, run=run, model=checkpoint.fingerprint, warnings=warnings)
        return Provenance(
            version=__version__,
            run=run,
            model=checkpoint.fingerprint,
            changes=checkpoint.changes,
            base_model=self.config.base_model_of(checkpoint),
            calibration=rows.fingerprint,
            calibration_text=rows.description,
            calibration_spans=CalibrationSpans.of(rows).to_text(),
            calibration_shape=(int(rows.tokens.shape[0]), int(rows.tokens.shape[1])),
            warnings=warnings,
        )

    def check_sizes(self, targets: Iterable[Target | None], rows: CalibrationSet | None) -> None:
        """Refuse sizes that no plan has: exactly, once the conversion is prepared and the rows are there.

        Args:
            targets: How large outputs may be.
            rows: The calibration rows; None if they are not there yet.

        Raises:
            BudgetError: One is too small or too large.
        """
        measured = None if self.given is None else self.given.measurement
        provenance = self.provenance(rows)
        for target in targets:
            self.conversion.forecast(target, measured, provenance)

"""Options of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.source.checkpoint import TensorSource
from ..errors import ConfigError
from ..measure.text.calibration import CalibrationConfig
from ..measure.text.context import EVALUATION, fit_row_tokens
from ..measure.text.mixture import BUILT_IN, is_plain
from .domains.sets import SOURCES
from .models import DTYPES

__all__ = ["EvalConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Options of the evaluation.

    Attributes:
        text: Text file, directory of such files, or Hub data set ``name[:config][:split]``; None for the evaluation
            part of the built-in text.
        column: Column of a data set that holds the text.
        rows: Number of rows.
        row_tokens: Length of each row in tokens, BOS included; it is also the stride. None as in
            ``CalibrationConfig``.
        seed: Chooses the places that rows of the built-in text are taken from.
        dtype: What both models run in: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
        allow_calibration_text: Evaluate even on text that the model was calibrated on.
        offload_dir: Directory for files with the hidden states of all rows; None keeps them in memory.
        prompt: Prompt that both models answer; None asks chat models one of our own, and others nothing.
        domains: Where texts of domains are from (chat, prose, code, non-Latin, long documents, tool calls), which the
            models run over as well: ``built-in``, or ``mix`` for data sets of the Hub; None for no domains.
        answers: Whether chat models also answer prompts of our own, to count how often and how far they agree.
    """

    text: str | None = None
    column: str | None = None
    rows: int = 16
    row_tokens: int | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    allow_calibration_text: bool = False
    offload_dir: Path | None = None
    prompt: str | None = None
    domains: str | None = None
    answers: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if isinstance(self.offload_dir, str):
            object.__setattr__(self, "offload_dir", Path(self.offload_dir))
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype: not usable. Got {self.dtype!r}. Expected one of {', '.join(DTYPES)}. Choose another."
            )
        if self.domains is not None and self.domains not in SOURCES:
            raise ConfigError(
                f"domains: not usable. Got {self.domains!r}. Expected one of {', '.join(SOURCES)}. Choose another."
            )
        self.calibration_config()
        if not is_plain(self.text):
            raise ConfigError(
                f"text: not usable to evaluate on. Got {self.text!r}. Expected a file, a directory, a Hub data set or "
                f"{BUILT_IN}. Name one of them."
            )

    def fitted(self, source: TensorSource) -> EvalConfig:
        """Return the same with the length that rows have for a model.

        Raises:
            ConfigError: Rows are longer than the model's context.
        """
        return replace(self, row_tokens=fit_row_tokens(self.row_tokens, source, EVALUATION))

    def calibration_config(self) -> CalibrationConfig:
        """Return what ``build_calibration`` needs to know.

        Raises:
            ConfigError: A number is out of range, or a column is named without a text.
        """
        return CalibrationConfig(
            source=self.text, column=self.column, rows=self.rows, row_tokens=self.row_tokens, seed=self.seed
        )

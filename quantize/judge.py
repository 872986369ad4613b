"""The judge of finished outputs: evaluates on text that is held out, and marks what is broken."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ..checkpoint.files.disk_errors import delete_file
from ..checkpoint.source.checkpoint import Checkpoint, TensorSource
from ..errors import BrokenModelError, NumericalError
from ..eval.cache import OriginalCache
from ..eval.comparison import ENGINE, Comparison, EvalConfig, compare_with, evaluation_rows
from ..eval.domains.documents import Domain, load_domains
from ..eval.metrics.overlap import CalibrationSpans, refuse_calibration_text, with_overlap_warning
from ..eval.models import device_name, summarize_model, vocab_size_of
from ..eval.original import OriginalRun, run_original
from ..eval.publishing.cards import card_path
from ..eval.publishing.mark import clear_mark, mark_broken, read_mark
from ..measure.device import resolve_device
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import EVALUATION, check_rows, context_tokens
from ..measure.text.tokenizer import Tokenizer, load_tokenizer
from ..progress import Progress, silent

__all__ = [
    "BROKEN_NATS",
    "BROKEN_RATIO",
    "Judge",
    "broken_because",
    "reconsider_mark",
    "refuse_marked",
]

BROKEN_NATS = 1.0
"""Mean KL divergence in nats per token above which a model is useless, unless so much was asked for."""

BROKEN_RATIO = 5.0
"""How many times the predicted damage such a model must have for it to be a failure: plans of 2 bits foresee it."""


class Judge:
    """Compares outputs with their original, which runs once, when it is first needed.

    Attributes:
        shared_share: Share of the evaluation tokens that were calibrated on, 0 to 1; None until ``check_text``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EvalConfig,
        progress: Progress = silent,
        *,
        cache: OriginalCache | None = None,
    ) -> None:
        """Take what all comparisons share; nothing is run.

        Args:
            checkpoint: The original.
            config: Options of the evaluation.
            progress: Wraps the blocks of each pass.
            cache: Where the original's side is kept for other runs; None keeps it only for this one.

        Raises:
            ConfigError: Rows are longer than the original's context, or the device is not there.
        """
        resolve_device(config.device)
        self._checkpoint = checkpoint
        self._config = config.fitted(checkpoint)
        self._progress = progress
        self._cache = cache
        self.shared_share: float | None = None
        self._tokenizer: Tokenizer | None = None
        self._rows: CalibrationSet | None = None
        self._domains: tuple[Domain, ...] | None = None
        self._run: OriginalRun | None = None

    def check_text(self, calibration: CalibrationSet | None) -> None:
        """Refuse text that was calibrated on, and rows that cannot be run, before any long work.

        Args:
            calibration: The calibration rows; None if there are none.

        Raises:
            CalibrationError: The text overlaps and that is not allowed, cannot be read or is too short.
        """
        rows = self._evaluation_rows()
        check_rows(self._checkpoint, rows, EVALUATION)
        if calibration is None:
            return
        self._rows, self.shared_share = self._held_out(rows, calibration)
        self._domains = tuple(
            replace(domain, rows=self._held_out(domain.rows, calibration)[0]) for domain in self._evaluation_domains()
        )

    def _held_out(self, rows: CalibrationSet, calibration: CalibrationSet) -> tuple[CalibrationSet, float | None]:
        spans = CalibrationSpans.of(calibration, row_tokens=rows.tokens.shape[1])
        share = refuse_calibration_text(rows, spans, allowed=self._config.allow_calibration_text)
        return with_overlap_warning(rows, share), share

    def made(self, comparison: Comparison, model: TensorSource) -> bool:
        """Return whether a comparison is what this judge would measure of a model: it need not run again then.

        Args:
            comparison: Of an earlier run.
            model: A quantized model, opened.
        """
        weights = sum(math.prod(self._checkpoint.shape(name)) for name in self._checkpoint.names)
        got = (comparison.original.fingerprint, comparison.quantized, comparison.text_fingerprint)
        expected = (
            self._checkpoint.fingerprint,
            summarize_model(model, weights),
            self._evaluation_rows().fingerprint,
        )
        how = (self._config.dtype, device_name(resolve_device(self._config.device)))
        texts = [domain.text_fingerprint for domain in comparison.domains]
        same = texts == [domain.rows.fingerprint for domain in self._evaluation_domains()]
        how_got = (comparison.dtype, comparison.device)
        return got == expected and how_got == how and comparison.engine == ENGINE and same

    def compare(self, output: Path, model: TensorSource, *, predicted_nats: float | None) -> Comparison:
        """Compare an output with the original; what cannot even be compared is marked as broken.

        Args:
            output: A quantized model.
            model: The same, opened.
            predicted_nats: Damage that the plan predicted, in nats per token; None if there was no plan.

        Raises:
            BrokenModelError: Its hidden states or logits are not finite. It is marked.
            BpwiseError: As ``run_original`` and ``compare_with``.
        """
        if self._run is None:
            rows = self._evaluation_rows()
            self._checkpoint.prepare_fingerprint(self._progress)
            self._run = run_original(
                self._checkpoint,
                rows,
                self._config,
                self._progress,
                tokenizer=self._loaded_tokenizer(),
                cache=self._cache,
                domains=self._evaluation_domains(),
            )
        try:
            comparison = compare_with(self._run, model, self._progress)
            if not math.isfinite(comparison.summary.kl_nats.value):
                raise NumericalError(
                    "quantized model: its mean KL divergence from the original is not finite. Check the original model."
                )
            return comparison
        except NumericalError as cause:
            predicted = "" if predicted_nats is None else f" The plan predicted {predicted_nats:.3g} nats per token."
            raise self._broken(output, f"{cause}{predicted}") from cause

    def mark_if_broken(self, output: Path, comparison: Comparison, *, predicted_nats: float | None) -> None:
        """Mark an output as broken if its damage is far beyond what was predicted; else take an old mark away.

        Args:
            output: A quantized model.
            comparison: What was measured.
            predicted_nats: As in ``compare``; without it a large damage may be what was asked for.

        Raises:
            BrokenModelError: It is broken, and marked.
        """
        reason = broken_because(comparison.summary.kl_nats.value, predicted_nats)
        if reason is not None:
            raise self._broken(output, reason)
        clear_mark(output)

    def details(self) -> dict[str, dict[str, str | float]]:
        """Return what a report should say of the text: section -> entry -> value."""
        if self.shared_share is None:
            return {}
        return {"Evaluation text": {"of it calibrated on, at least % of the tokens": round(100 * self.shared_share, 2)}}

    def _evaluation_rows(self) -> CalibrationSet:
        if self._rows is None:
            vocab_size = vocab_size_of(self._checkpoint)
            self._rows = evaluation_rows(self._loaded_tokenizer(), self._config, vocab_size=vocab_size)
        return self._rows

    def _evaluation_domains(self) -> tuple[Domain, ...]:
        if self._domains is None:
            self._domains = load_domains(
                self._loaded_tokenizer(),
                self._config.domains,
                vocab_size=vocab_size_of(self._checkpoint),
                context=context_tokens(self._checkpoint),
            )
        return self._domains

    def _loaded_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._checkpoint.directory)
        return self._tokenizer

    def _broken(self, output: Path, reason: str) -> BrokenModelError:
        delete_file(card_path(output))
        mark = mark_broken(output, f"{reason}\n\nEvaluated on: {self._evaluation_rows().description}.")
        return BrokenModelError(
            f"{output}: broken. {reason} It is marked by {mark.name}; the measurement is kept. Check calibration text "
            "and original, or ask for more bits."
        )


def broken_because(kl_nats: float, predicted_nats: float | None) -> str | None:
    """Return why a model counts as broken, or None if it does not.

    Args:
        kl_nats: Measured mean KL divergence from the original, per token.
        predicted_nats: What the plan predicted, or None if there was no plan.
    """
    if math.isnan(kl_nats):
        return "Its mean KL divergence from the original is not a number."
    if predicted_nats is None or kl_nats <= BROKEN_NATS or kl_nats <= BROKEN_RATIO * predicted_nats:
        return None
    return (
        f"Its mean KL divergence from the original is {kl_nats:.3g} nats per token, but the plan predicted "
        f"{predicted_nats:.3g}: more than {BROKEN_NATS:g} nat and more than {BROKEN_RATIO:g} times the prediction."
    )


def reconsider_mark(output: Path, comparison: Comparison, *, predicted_nats: float | None) -> bool:
    """Take the mark of an output away if an evaluation finds nothing wrong with it; return whether it has one still.

    Without a prediction only a damage that no model is called broken for clears it.

    Args:
        output: A quantized model.
        comparison: What was measured.
        predicted_nats: Damage that the plan predicted, in nats per token; None if it is not known.

    Raises:
        WorkDirectoryError: The mark cannot be deleted.
    """
    if read_mark(output) is None:
        return False
    if broken_because(comparison.summary.kl_nats.value, predicted_nats or 0.0) is not None:
        return True
    clear_mark(output)
    return False


def refuse_marked(output: Path) -> None:
    """Refuse to pass off an output as finished that an earlier run marked as broken.

    Raises:
        BrokenModelError: It is marked.
    """
    reason = read_mark(output)
    if reason is not None:
        raise BrokenModelError(
            f"{output}: marked as broken by an earlier run. {reason} Evaluate it again, or delete it."
        )

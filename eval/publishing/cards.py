"""The card of an output, made from what lies on the disk: the model itself, its report, and the original's card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.files.atomic import write_text
from ...checkpoint.files.paths import companion
from ...checkpoint.files.schemas import Count, NonNegative, Number, check_schema, read_json
from ...checkpoint.files.side_files import CARD_NAME
from ...checkpoint.source.hub import directory_name, resolve_model
from ...convert.names import HUB_ID, REPORT_FILE, hub_id
from ...convert.registry import require_format
from ...errors import BrokenModelError, ConfigError, FormatError
from ...tables import bytes_text
from ..metrics.estimate import Estimate
from ..report.verdict import words_for
from .base_card import BaseCard, read_base_card
from .card import Card, CardResult, render_card
from .mark import read_mark
from .prompt import prompt_format

__all__ = [
    "ReportedComparison",
    "ReportedEstimate",
    "ReportedSummary",
    "card_path",
    "check_base_model",
    "is_card",
    "make_card",
    "read_report",
    "reported",
    "write_card",
]

_NO_CARD = BaseCard(notes=("The original's card was not at hand: licence and language are not carried over.",))

_CARD_SENTENCE = re.compile(rb"quantized to .{1,80} with bpwise\.")
"""In the cards of all formats."""


def card_path(output: Path) -> Path:
    """Return where the card of a model lies: ``OUT/README.md``, or ``STEM.README.md`` beside a file."""
    return companion(output, CARD_NAME)


def is_card(path: Path) -> bool:
    """Return whether a file is the card of an output, of any format."""
    try:
        return _CARD_SENTENCE.search(path.read_bytes()) is not None
    except OSError:
        return False


def write_card(output: str | Path, *, original: str | Path | None = None, base_model: str | None = None) -> Path:
    """Write the card of an output; an older one is replaced.

    Args:
        output: A quantized model of any format.
        original: Directory or Hub id of the original, whose card is taken over; None does without.
        base_model: Hub id of the original; None takes ``original``'s if it came from the Hub.

    Returns:
        The path of the card.

    Raises:
        BrokenModelError: The model is marked as broken.
        ConfigError: ``base_model`` is not a Hub id.
        FormatError: It is not a quantized model, or its report is damaged.
        CheckpointError: The original cannot be found, or its card leads outside its directory.
        WorkDirectoryError: The card cannot be written.

    Example:
        >>> from bpwise import write_card
        >>> write_card("llama-6bpw", original="llama", base_model="me/llama").name
        'README.md'
    """
    output = Path(output)
    card = make_card(output, original=original, base_model=base_model)
    path = card_path(output)
    write_text(path, render_card(card))
    return path


def make_card(output: Path, *, original: str | Path | None = None, base_model: str | None = None) -> Card:
    """Return the card of an output; see ``write_card``."""
    reason = read_mark(output)
    if reason is not None:
        raise BrokenModelError(f"{output}: marked as broken, so it gets no card. {reason}")
    check_base_model(base_model)
    report = reported(output)
    directory = resolve_model(original) if isinstance(original, str) else original
    base_name = _base_name(report, directory, base_model)
    base_model = base_model or hub_id(base_name)
    format_ = require_format(output)
    model = format_.open(output)
    return Card(
        facts=format_.card(model, base_name),
        format=format_.name,
        base_name=base_name,
        base_model=base_model,
        base=_NO_CARD if directory is None else read_base_card(directory),
        measured=() if report is None else report.rows(),
        results=() if report is None else report.results(),
        prompt=prompt_format(model),
        measured_note="" if report is None else report.note(),
    )


def reported(output: Path) -> ReportedComparison | None:
    """Return what the report of an output says; None if there is none.

    Raises:
        FormatError: The report is damaged.
    """
    path = companion(output, REPORT_FILE)
    return read_report(path) if path.exists() else None


def read_report(path: Path) -> ReportedComparison:
    """Return what a report says.

    Args:
        path: The report for programs.

    Raises:
        FormatError: The report is damaged.
    """
    remedy = "The report is damaged, or of another version: evaluate again."
    raw = read_json(path, FormatError).get("comparison")
    return check_schema(raw, ReportedComparison, FormatError, where=f"{path}: comparison", remedy=remedy)


def check_base_model(base_model: str | None) -> None:
    """Check that an original's Hub id is one, or None.

    Raises:
        ConfigError: It is something else.
    """
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ConfigError(
            f"base model: not usable. Got {base_model!r}. Expected a Hub id such as org/name. Choose another."
        )


def _base_name(report: ReportedComparison | None, directory: Path | None, base_model: str | None) -> str:
    if base_model is not None:
        return base_model
    if directory is not None:
        return directory_name(directory)
    return "the original" if report is None else report.original.name


@dataclass(frozen=True, slots=True)
class ReportedEstimate(Estimate):
    """A number of a report, with its standard error if that is known; a schema for both."""

    value: Number
    standard_error: NonNegative | None

    def text(self, factor: float = 1) -> str:
        """Return both, multiplied by a factor."""
        value = f"{self.value * factor:.4g}"
        return value if self.standard_error is None else f"{value} ± {self.standard_error * factor:.2g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReportedModel:
    """What a report says of a model."""

    name: str
    stored_bytes: Count | None

    @property
    def size(self) -> str:
        """Size of the weights."""
        return "" if self.stored_bytes is None else bytes_text(self.stored_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedSummary:
    """What a report says of the damage.

    Attributes:
        original_perplexity: The original's perplexity.
        quantized_perplexity: The quantized model's.
        kl_nats: Mean KL divergence, nats per token.
        kl_p99_nats: Below it are 99 % of the tokens.
        top1_agreement: Share of tokens whose most likely one is the same, 0 to 1.
    """

    original_perplexity: ReportedEstimate
    quantized_perplexity: ReportedEstimate
    kl_nats: ReportedEstimate
    kl_p99_nats: Number
    top1_agreement: ReportedEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedComparison:
    """What a card takes from a report; see ``bpwise.eval.comparison.Comparison``."""

    original: _ReportedModel
    quantized: _ReportedModel
    summary: ReportedSummary
    predicted_tokens: Count
    text: str
    text_fingerprint: str
    engine: str
    dtype: str

    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """Return the table of a card: a name, the original's value, the quantized model's."""
        summary = self.summary
        return (
            ("size", self.original.size, self.quantized.size),
            ("perplexity", summary.original_perplexity.text(), summary.quantized_perplexity.text()),
            ("mean KL divergence, nats per token", "0", summary.kl_nats.text()),
            ("in words", "", words_for(summary.kl_nats.value)),
            ("KL divergence, 99 % of tokens below", "0", f"{summary.kl_p99_nats:.3g}"),
            ("same most likely token", "100 %", f"{summary.top1_agreement.text(100)} %"),
        )

    def results(self) -> tuple[CardResult, ...]:
        """Return the numbers for the Hub."""
        summary = self.summary
        values = {
            "perplexity": ("perplexity", summary.quantized_perplexity),
            "kl_divergence": ("mean KL divergence from the original, nats per token", summary.kl_nats),
            "top1_agreement": ("share of tokens where the original's most likely is the same", summary.top1_agreement),
        }
        return tuple(CardResult(kind, name, each.value, self.text) for kind, (name, each) in values.items())

    def note(self) -> str:
        """Return how it was measured."""
        return (
            f"Over {self.predicted_tokens} tokens of text ({self.text}), run by {self.engine} in {self.dtype}. "
            "Numbers after ± are one standard error."
        )

"""Rows that a model can take: no longer than its context, no ids beyond its vocabulary, and of its own tokens."""

from __future__ import annotations

from ...checkpoint.source.checkpoint import TensorSource
from ...checkpoint.source.language import language_config
from ...errors import CalibrationError, ConfigError
from .calibration import DEFAULT_ROW_TOKENS, CalibrationSet, require_ids_below
from .tokenizer import Tokenizer, token_fingerprint

__all__ = [
    "CALIBRATION",
    "EVALUATION",
    "check_rows",
    "context_tokens",
    "fit_row_tokens",
    "require_tokens",
    "shortened_line",
]

CALIBRATION, EVALUATION = "calibration", "evaluation"
"""What rows are for, as messages call it."""


def context_tokens(source: TensorSource) -> int | None:
    """Return the most tokens that a model has positions for; None if its config does not say."""
    context = language_config(source).get("max_position_embeddings")
    return context if isinstance(context, int) else None


def fit_row_tokens(asked: int | None, source: TensorSource, use: str) -> int:
    """Return how long rows are for a model.

    Args:
        asked: Tokens in each row; None for the default, or the model's context where that is shorter.
        source: The model.
        use: ``CALIBRATION`` or ``EVALUATION``.

    Raises:
        ConfigError: More tokens are asked for than the model has positions for.
    """
    context = context_tokens(source)
    if asked is None:
        return DEFAULT_ROW_TOKENS if context is None else min(DEFAULT_ROW_TOKENS, context)
    _refuse_longer(asked, context, use)
    return asked


def shortened_line(asked: int | None, source: TensorSource, use: str) -> str | None:
    """Return a line that says so where ``fit_row_tokens`` shortens the default; else None."""
    fitted = fit_row_tokens(asked, source, use)
    if asked is not None or fitted == DEFAULT_ROW_TOKENS:
        return None
    return f"{use} rows have {fitted} tokens instead of {DEFAULT_ROW_TOKENS}: the model's context is no longer"


def check_rows(source: TensorSource, rows: CalibrationSet, use: str) -> None:
    """Check that a model can be run on rows.

    Args:
        source: The model.
        rows: The token ids.
        use: ``CALIBRATION`` or ``EVALUATION``.

    Raises:
        CalibrationError: A token id is outside the vocabulary.
        ConfigError: Rows have one token only or are longer than the model's context.
    """
    vocab_size = language_config(source).get("vocab_size")
    if isinstance(vocab_size, int):
        require_ids_below(rows.tokens, vocab_size, use=use)
    row_tokens = rows.tokens.shape[1]
    if row_tokens < 2:
        raise ConfigError(
            f"{use} text: rows of 1 token. Expected at least 2: the first is never predicted. Choose another."
        )
    _refuse_longer(row_tokens, context_tokens(source), use)


def require_tokens(rows: CalibrationSet, tokenizer: Tokenizer) -> None:
    """Refuse rows whose ids stand for other tokens in a tokenizer than in the one that they were made with.

    Args:
        rows: The rows; where it is not known which tokens they hold, they are taken.
        tokenizer: The model's.

    Raises:
        CalibrationError: The ids stand for other tokens.
    """
    if rows.vocabulary is not None and token_fingerprint(tokenizer, rows.tokens) != rows.vocabulary:
        raise CalibrationError(
            "calibration set: it was made with another tokenizer. Got ids that stand for other tokens in this model's "
            "vocabulary. Build the set with this model."
        )


def _refuse_longer(row_tokens: int, context: int | None, use: str) -> None:
    if context is not None and row_tokens > context:
        raise ConfigError(
            f"{use} text: rows of {row_tokens} tokens, but the model has positions for {context}. Ask for "
            "shorter rows (--row-tokens)."
        )

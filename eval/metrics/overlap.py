"""Whether text to evaluate on was calibrated on: short spans of token ids, found again wherever they stand.

Fingerprints tell only whether two sets of rows are equal. The same text cut into other rows, or a few rows of it among
others, is found by its spans: those of the calibration rows, end to end, against every window of the evaluation rows.
A passage that both share is found if it holds one whole calibration span: surely at twice a span's length.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import TensorSource
from ...convert.model import QuantizedModel
from ...errors import CalibrationError, FormatError
from ...measure.text.calibration import CalibrationSet

__all__ = [
    "CalibrationSpans",
    "refuse_calibration_text",
    "shared_share",
    "stored_spans",
    "with_overlap_warning",
]

_SPAN_TOKENS = 64

_MOST_SHARED = 0.01
_MOST_SPANS = 2
"""Share of the evaluation tokens that licences and other boilerplate may have in common with calibration text; so many
spans are too few to tell, whatever their share. Of the built-in text's two parts, 64 rows of 1024 tokens share two."""

_WARNING = "NOT HELD OUT"

_HASH_BYTES = 8
_TEXT_FORM = re.compile(rf"([1-9][0-9]{{0,5}}):((?:[0-9a-f]{{{2 * _HASH_BYTES}}})*)")


@dataclass(frozen=True, slots=True)
class CalibrationSpans:
    """Hashes of calibration text, from which it cannot be read.

    Attributes:
        span_tokens: Length of a span, in tokens.
        hashes: One for each span.
    """

    span_tokens: int
    hashes: frozenset[bytes]

    @classmethod
    def of(cls, rows: CalibrationSet, *, row_tokens: int | None = None) -> CalibrationSpans:
        """Take the spans of calibration rows.

        Args:
            rows: The calibration rows.
            row_tokens: Length of the rows that will be compared with them, where it is known: spans fit into them.
        """
        body = _body(rows)
        span = min(_SPAN_TOKENS, body.shape[1], *([] if row_tokens is None else [max(1, row_tokens - 1)]))
        starts = range(0, body.shape[1] - span + 1, span)
        return cls(span, frozenset(_hash(row[start : start + span]) for row in body for start in starts))

    def to_text(self) -> str:
        """Return the spans as one line for a model's metadata."""
        return f"{self.span_tokens}:{''.join(sorted(each.hex() for each in self.hashes))}"

    @classmethod
    def from_text(cls, text: object) -> CalibrationSpans:
        """Read what ``to_text`` wrote.

        Raises:
            FormatError: It is something else.
        """
        found = _TEXT_FORM.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise FormatError(
                f"calibration_spans: not usable. Got {str(text)[:40]!r}."
                " Expected a length and hashes. The model's metadata are "
                "damaged."
            )
        hashes = bytes.fromhex(found[2])
        return cls(int(found[1]), frozenset(hashes[at : at + _HASH_BYTES] for at in range(0, len(hashes), _HASH_BYTES)))


def shared_share(rows: CalibrationSet, spans: CalibrationSpans) -> float | None:
    """Return which share of evaluation tokens, at the least, stands in text that was calibrated on.

    Args:
        rows: The evaluation rows.
        spans: The calibration text's.

    Returns:
        From 0 to 1, BOS not counted; None if the rows are shorter than a span, so that nothing can be told.
    """
    body, span = _body(rows), spans.span_tokens
    if body.shape[1] < span:
        return None
    shared = torch.zeros(body.shape, dtype=torch.bool)
    for row, marks in zip(body, shared, strict=True):
        for start, window in enumerate(_windows(row, span)):
            if window in spans.hashes:
                marks[start : start + span] = True
    return float(shared.double().mean())


def refuse_calibration_text(
    rows: CalibrationSet, spans: CalibrationSpans | None, *, allowed: bool = False
) -> float | None:
    """Refuse to evaluate on text that was calibrated on.

    Args:
        rows: The evaluation rows.
        spans: The calibration text's, or None if they are not known.
        allowed: Do not refuse, only tell.

    Returns:
        As ``shared_share``; None too if there are no spans.

    Raises:
        CalibrationError: More than 1 % of the tokens, and more than two spans, were calibrated on.
    """
    share = None if spans is None else shared_share(rows, spans)
    few = 0 if spans is None else _MOST_SPANS * spans.span_tokens / _body(rows).numel()
    if share is not None and share > max(_MOST_SHARED, few) and not allowed:
        raise CalibrationError(
            f"evaluation text: at least {share:.1%} of its tokens are in the calibration text. Expected none: damage "
            "would look smaller than it is. Evaluate on other text, or force it with --force-eval-text "
            "(allow_calibration_text)."
        )
    return share


def with_overlap_warning(rows: CalibrationSet, share: float | None) -> CalibrationSet:
    """Return evaluation rows whose description, which all reports repeat, says if they are not held out.

    Args:
        rows: The evaluation rows.
        share: What ``refuse_calibration_text`` found.
    """
    if share is None or share <= _MOST_SHARED or rows.description.startswith(_WARNING):
        return rows
    return replace(rows, description=f"{_WARNING}, at least {share:.0%} of it was calibrated on: {rows.description}")


def stored_spans(model: TensorSource) -> CalibrationSpans | None:
    """Return the spans that a quantized model was calibrated on, if it says.

    Raises:
        FormatError: It says it in a way that cannot be read.
    """
    text = model.calibration_spans if isinstance(model, QuantizedModel) else None
    return None if text is None else CalibrationSpans.from_text(text)


def _body(rows: CalibrationSet) -> Tensor:
    # All rows may begin with BOS, which says nothing.
    tokens = rows.tokens[:, 1:] if rows.adds_bos else rows.tokens
    return tokens.to(torch.int32)


def _windows(row: Tensor, span: int) -> Iterator[bytes]:
    return (_hash(row[start : start + span]) for start in range(len(row) - span + 1))


def _hash(tokens: Tensor) -> bytes:
    return hashlib.blake2b(tokens.numpy().astype("<i4", copy=False).tobytes(), digest_size=_HASH_BYTES).digest()

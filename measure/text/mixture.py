"""Calibration text of several kinds: which sources there are, and how many rows each gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

__all__ = ["BUILT_IN", "MIX", "SELF", "Share", "rows_of", "shares_of", "spread_places"]

BUILT_IN = "built-in"
"""The source that stands for the text that ships with bpwise (see ``builtin_text``)."""

SELF = "self"
"""The source that stands for the model itself (see ``generation``). A file of this name can be given as ``./self``."""

MIX = "mix"
"""The source that stands for data sets of the Hub of several kinds."""

_SHARE = re.compile(r"(.*)=(\d{1,6}(?:\.\d{1,6})?)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Share:
    """A source of calibration text, and its part of the rows.

    Attributes:
        source: As ``CalibrationConfig.source`` names a single one; ``BUILT_IN`` for what ships with bpwise.
        share: Its weight among all, above 0.
        license: That of a data set that bpwise chose; None for all others.
    """

    source: str
    share: float
    license: str | None = None


_WIKIPEDIA = "CC BY-SA 3.0 and GFDL"

_MIX = (
    Share("wikimedia/wikipedia:20231101.en", 2, _WIKIPEDIA),
    Share("allenai/c4:en", 2, "ODC-BY 1.0"),
    Share("codeparrot/codeparrot-clean-valid", 2, "that of each file, from public GitHub repositories"),
    *(Share(f"wikimedia/wikipedia:20231101.{language}", 0.5, _WIKIPEDIA) for language in ("zh", "es", "ar", "de")),
)
"""Streamed, so that little is loaded. Wikipedia and not WikiText, whose other part models are often evaluated on."""


def shares_of(source: str | None) -> tuple[Share, ...]:
    """Return the sources that an option names, ``MIX`` taken apart.

    Args:
        source: Sources with commas between them, each with ``=SHARE`` or a share of 1; a path that exists is one
            source, whatever is in its name. None for the built-in text.

    Raises:
        ConfigError: A source has no name, or a share of 0.
    """
    if source is None:
        return (Share(BUILT_IN, 1.0),)
    if _exists(source):
        return (Share(source, 1.0),)
    found: list[Share] = []
    for text in source.split(","):
        match = None if _exists(text) else _SHARE.fullmatch(text)
        name, share = (match[1], float(match[2])) if match else (text, 1.0)
        if not (name.strip() and share > 0):
            raise ConfigError(
                f"--calibration: not usable. Got {text!r} in {source!r}. Expected SOURCE or SOURCE=SHARE, with a share "
                "above 0, for example 'self=2,built-in'. Correct it."
            )
        whole = sum(each.share for each in _MIX)
        found += (
            [Share(each.source, share * each.share / whole, each.license) for each in _MIX]
            if name == MIX
            else [Share(name, share)]
        )
    return tuple(found)


def _exists(source: str) -> bool:
    try:
        return bool(source) and Path(source).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def rows_of(shares: tuple[Share, ...], rows: int) -> list[int]:
    """Return how many of some rows each source gives: in proportion to their shares, to the nearest row.

    Each gives one at least where there are enough; rows that are left over go where most is missing.
    """
    whole = sum(each.share for each in shares)
    counts = [0] * len(shares)
    for _ in range(rows):
        missing = [rows * each.share / whole - count for each, count in zip(shares, counts, strict=True)]
        empty = [index for index, count in enumerate(counts) if not count]
        counts[max(empty or range(len(shares)), key=lambda index: missing[index])] += 1
    return counts


def spread_places(counts: list[int]) -> list[tuple[int, int]]:
    """Return an order for the rows of several sources in which each is spread evenly over all.

    Args:
        counts: Number of rows of each source.

    Returns:
        For every place the source and the number of its row.
    """
    places = [((row + 0.5) / count, source, row) for source, count in enumerate(counts) for row in range(count)]
    return [(source, row) for _, source, row in sorted(places)]

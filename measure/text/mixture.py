"""Calibration text of several kinds: which sources there are, and how many rows each gives."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoint.files.schemas import parse_schema
from ...errors import CalibrationError, ConfigError

__all__ = [
    "BUILT_IN",
    "MIX",
    "NAMES",
    "SELF",
    "Share",
    "TextOptions",
    "is_plain",
    "rows_of",
    "shares_of",
    "sources_text",
    "spread_places",
    "without_folders",
]

BUILT_IN = "built-in"
"""The source that stands for the text that ships with bpwise (see ``builtin_text``)."""

SELF = "self"
"""The source that stands for the model itself (see ``generation``). A file of this name can be given as ``./self``."""

MIX = "mix"
"""The source that stands for data sets of the Hub of several kinds."""

NAMES = frozenset({BUILT_IN, SELF, MIX})
"""Sources that are no files or data sets."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """Options that calibration rows were made with, to tell to others: see ``CalibrationConfig``.

    Attributes:
        source: All sources as they were asked for, files without their folders.
    """

    source: str
    column: str | None
    chat_template: bool
    rows: int
    row_tokens: int | None
    seed: int

    @classmethod
    def read(cls, text: str | None, where: str) -> TextOptions | None:
        """Return what a file says of them, None if that is nothing.

        Raises:
            CalibrationError: It is something else.
        """
        return None if text is None else parse_schema(text, cls, CalibrationError, where=where)


_WIKIPEDIA = "CC BY-SA 3.0 and GFDL"

_MIX = (
    Share("wikimedia/wikipedia:20231101.en", 2, _WIKIPEDIA),
    Share("allenai/c4:en", 2, "ODC-BY 1.0"),
    Share("codeparrot/codeparrot-clean-valid", 2, "that of each file, from public GitHub repositories"),
    *(Share(f"wikimedia/wikipedia:20231101.{language}", 0.5, _WIKIPEDIA) for language in ("zh", "es", "ar", "de")),
)
"""Streamed, so that little is loaded. Wikipedia and not WikiText, whose other part models are often evaluated on."""


def shares_of(source: str | None) -> tuple[Share, ...]:
    """Return the sources that an option names, each once, ``MIX`` taken apart.

    Args:
        source: Sources with commas between them, each with ``=SHARE`` or a share of 1; a path that exists is one
            source, whatever is in its name. None for the built-in text.

    Raises:
        ConfigError: A source has no name, or a share that is not above 0, or is a saved calibration set beside others.
    """
    if source is None:
        return (Share(BUILT_IN, 1.0),)
    found: dict[str, Share] = {}
    parts = _parts(source)
    for part, name, share in parts:
        if not (name and share > 0) or ("=" in name and not _exists(name)):
            raise ConfigError(
                f"source: not usable. Got {part!r} in {source!r}. Expected SOURCE or SOURCE=SHARE, with a share above "
                "0. Name sources as in 'self=2,built-in'."
            )
        if len(parts) > 1 and name.endswith(".safetensors"):
            raise ConfigError(
                f"source: a saved calibration set beside others. Got {part!r} in {source!r}. Expected texts, data sets "
                f"or {', '.join(sorted(NAMES))}. Name the set alone."
            )
        whole = sum(each.share for each in _MIX)
        mix = [replace(each, share=share * each.share / whole) for each in _MIX]
        for each in mix if name == MIX else [Share(name, share)]:
            before = found.get(each.source)
            found[each.source] = each if before is None else replace(before, share=before.share + each.share)
    return tuple(found.values())


def is_plain(source: str | None) -> bool:
    """Return whether an option names one text that can be read: a file, a folder, a data set or the built-in text."""
    return source not in {SELF, MIX} and len(shares_of(source)) == 1


def sources_text(source: str | None) -> str:
    """Return sources as ``shares_of`` takes them, to tell to others: ``MIX`` as it is, files without their folders."""
    parts = _parts(source or BUILT_IN)
    return ",".join(without_folders(name) + (f"={share:g}" if len(parts) > 1 else "") for _, name, share in parts)


def _parts(source: str) -> list[tuple[str, str, float]]:
    # Each source as it is written, its name and its share.
    parts = [source] if _exists(source) else [part.strip() for part in source.split(",")]
    matches = [None if _exists(part) else _SHARE.fullmatch(part) for part in parts]
    return [
        (part, match[1].strip(), float(match[2])) if match else (part, part, 1.0)
        for part, match in zip(parts, matches, strict=True)
    ]


def without_folders(source: str) -> str:
    """Return a source as it may be told to others: a file or folder by its name alone."""
    return Path(source).name if Path(source).is_absolute() or source.startswith("~") or _exists(source) else source


def _exists(source: str) -> bool:
    try:
        return source not in NAMES and bool(source) and Path(source).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def rows_of(shares: tuple[Share, ...], rows: int) -> list[int]:
    """Return how many of some rows each source gives: in proportion to their shares, to the nearest row.

    Each gives one at least where there are enough rows, and some give none where there are not.

    Args:
        shares: The sources, at least one.
        rows: Number of rows.

    Returns:
        A number for each source, with ``rows`` as their sum.
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

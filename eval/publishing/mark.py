"""The mark of a broken model: a file in its directory, or beside its file, that says what was measured."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.files.atomic import write_text
from ...checkpoint.files.disk_errors import delete_file
from ...checkpoint.files.paths import companion

__all__ = ["MARK_NAME", "clear_mark", "mark_broken", "mark_path", "read_mark"]

MARK_NAME = "BROKEN.md"

_TITLE = "# Broken: do not use this model"

_MOST_BYTES = 1 << 16
"""What is read of a mark: anyone may have written it."""


def mark_path(output: Path) -> Path:
    """Return where the mark of a model lies: ``OUT/BROKEN.md``, or ``FILE.BROKEN.md`` beside a file.

    Args:
        output: The model's directory or file.
    """
    return companion(output, MARK_NAME, whole_name=True)


def mark_broken(output: Path, reason: str) -> Path:
    """Mark a model as broken; an older mark is replaced.

    Args:
        output: The model's directory or file.
        reason: What was measured, as sentences.

    Returns:
        The path of the mark.

    Raises:
        WorkDirectoryError: The mark cannot be written.
    """
    path = mark_path(output)
    write_text(path, f"{_TITLE}\n\n{reason}\n")
    return path


def clear_mark(output: Path) -> None:
    """Take the mark away, if there is one.

    Raises:
        WorkDirectoryError: It cannot be deleted.
    """
    delete_file(mark_path(output))


def read_mark(output: Path) -> str | None:
    """Return why a model is marked as broken, or None if it is not.

    Args:
        output: The model's directory or file.
    """
    path = mark_path(output)
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return "the mark cannot be read"
    return " ".join(text.removeprefix(_TITLE).split()) or "the mark does not say why"

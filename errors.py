"""Every error that a user can cause, in one tree.

A message reads ``WHERE: problem. Got X. Expected Y. Do Z.`` The command line prints it and exits
with 1; a bug keeps its traceback.
"""

import re
from pathlib import Path

__all__ = [
    "BpwiseError",
    "BpwiseWarning",
    "BrokenModelError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DiskFullError",
    "FormatError",
    "NumericalError",
    "PublishError",
    "ShapeError",
    "UnreachableTextError",
    "UnsupportedModelError",
    "VerificationError",
    "WorkDirectoryError",
    "install_command",
    "printable",
    "reason",
]

_MOST_CHARACTERS = 2000
_MOST_REASON_CHARACTERS = 200

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal acts on (C0, C1, DEL), what reorders or breaks a line, and surrogates, which no encoding has."""


_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")
"""The Hub's access tokens: its answers may repeat what was sent."""


def printable(text: str, limit: int = _MOST_CHARACTERS) -> str:
    """Return a text as one line that a terminal only shows, whatever a stranger put into it.

    Line breaks and tabs become spaces, other control characters and lone surrogates are escaped as in Python, access
    tokens of the Hub are left out. Of a text beyond the limit the middle goes: where and what stand at the start of a
    message, what to do at its end.

    Args:
        text: Any text.
        limit: Most characters of the result.
    """
    start, end = 2 * limit // 3, limit // 3
    # Before anything else: what comes in may have a hundred million characters, and each may become six.
    parts = [text] if len(text) <= limit else [text[:start], text[-end:]]
    shown = "...".join(
        _UNPRINTABLE.sub(
            lambda found: ascii(found[0])[1:-1],
            _TOKEN.sub("hf_...", " ".join(part.replace("\t", " ").split("\n"))),
        )
        for part in parts
    )
    return shown if len(shown) <= limit else f"{shown[: start - 3]}...{shown[-end:]}"


def reason(error: BaseException) -> str:
    """Return the start of what another library's error says, as one line; its type where it says nothing."""
    return " ".join(str(error).split())[:_MOST_REASON_CHARACTERS] or type(error).__name__


def install_command(extra: str) -> str:
    """Return how to install an extra of bpwise, for a message; no package index has bpwise itself."""
    return f"pip install '.[{extra}]' in the folder of bpwise's source"


class BpwiseError(Exception):
    """Base of all errors that a user can cause. Its message can be printed as it is."""

    def __init__(self, message: str = "") -> None:
        """Take the message; names and values in it may come from strangers (see ``printable``)."""
        super().__init__(printable(message))


class BpwiseWarning(UserWarning):
    """Something that a user should know at once, and that does not stop the run."""


class ConfigError(BpwiseError):
    """An option has a value that makes no sense."""


class CheckpointError(BpwiseError):
    """The source model's files are missing, unsafe, inconsistent or hold values that cannot be quantized."""


class UnsupportedModelError(BpwiseError):
    """The architecture is not one that bpwise (or the readers of the output format) can handle."""


class CalibrationError(BpwiseError):
    """The calibration or evaluation text cannot be read, or there is too little of it."""


class UnreachableTextError(CalibrationError):
    """A data set of the Hub cannot be reached, or its transfer broke off."""


class BudgetError(BpwiseError):
    """The asked size is outside what the measured formats can reach."""


class NumericalError(BpwiseError):
    """A NaN, an infinity or a failed factorisation that would spoil everything after it."""


class BrokenModelError(BpwiseError):
    """A quantized model was written as meant, but its predictions are useless; it carries a mark that says so."""


class FormatError(BpwiseError):
    """A file of a format's own, by bpwise or another program, breaks the format's rules."""


class VerificationError(BpwiseError):
    """A written model does not decode to what was intended."""


class WorkDirectoryError(BpwiseError):
    """A work or output directory is in the way, or belongs to another run."""


class DiskFullError(WorkDirectoryError):
    """A disk, or a quota on it, has no room for what is to be written.

    Attributes:
        place: A path on that disk; it need not exist.
    """

    def __init__(self, message: str, place: Path) -> None:
        """Take the message, and where there is no room."""
        super().__init__(message)
        self.place = place


class PublishError(BpwiseError):
    """A model may not be published, or the Hub refuses it."""


class ShapeError(BpwiseError):
    """A tensor does not have the shape that its place demands."""

    def __init__(self, where: str, what: str, *, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Say where, what, got and expected."""
        super().__init__(f"{where}: {what} has shape {tuple(got)}. Expected {tuple(expected)}.")

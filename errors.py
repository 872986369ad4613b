"""Every error that a user can cause, in one tree.

A message is one sentence or two: where, what is wrong, got X, expected Y, what to do. The command line prints
it and exits with 1; a bug keeps its traceback.
"""

__all__ = [
    "BpwiseError",
    "BpwiseWarning",
    "BrokenModelError",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "NumericalError",
    "PublishError",
    "ShapeError",
    "UnsupportedModelError",
    "VerificationError",
    "WorkDirectoryError",
]


class BpwiseError(Exception):
    """Base of all errors that a user can cause."""


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


class BudgetError(BpwiseError):
    """The asked size is outside what the measured formats can reach."""


class NumericalError(BpwiseError):
    """A NaN, an infinity or a failed factorisation that would spoil everything after it."""


class BrokenModelError(BpwiseError):
    """A quantized model was written as meant, but its predictions are useless; it carries a mark that says so."""


class FormatError(BpwiseError):
    """A file that bpwise (or an EXL2 writer) should have made breaks its format's rules."""


class VerificationError(BpwiseError):
    """A written model does not decode to what was meant."""


class WorkDirectoryError(BpwiseError):
    """A work or output directory is in the way, or belongs to another run."""


class PublishError(BpwiseError):
    """A model may not be published, or the Hub refuses it."""


class ShapeError(BpwiseError):
    """A tensor does not have the shape that its place demands."""

    def __init__(self, where: str, what: str, *, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Say where, what, got and expected in one sentence."""
        super().__init__(f"{where}: {what} has shape {tuple(got)}, expected {tuple(expected)}.")

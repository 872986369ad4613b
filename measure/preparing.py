"""Before measuring: what cannot be measured is refused, what the curves of several formats depend on made ready."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint.files.resume import RunArtifacts
from ..checkpoint.source.checkpoint import Checkpoint
from ..errors import BpwiseError, BpwiseWarning, WorkDirectoryError
from ..progress import Progress
from .curves import CurveMaker, CurveSource
from .model.stream import StreamedModel

__all__ = ["prepared_curves", "require_measurable"]


def prepared_curves(
    formats: Mapping[str, CurveSource],
    output: Path,
    work: Path,
    artifacts: RunArtifacts,
    progress: Progress,
    *,
    required: bool = False,
) -> list[CurveMaker]:
    """Return the curves of all formats whose tools are there and fit the model; warn of the others.

    Args:
        formats: The model on its way into each format, by name.
        output: The measurement to make.
        work: Work directory.
        artifacts: Learns of what is kept in it.
        progress: Shows how far that is.
        required: Whether each of them must be measured.

    Raises:
        BpwiseError: None can be measured, or one of those required: why not the first.
        WorkDirectoryError: The work directory is full, or cannot be written.
    """
    curves: list[CurveMaker] = []
    refused: dict[str, BpwiseError] = {}
    for name, source in formats.items():
        try:
            for step, identity in source.prepare(work, progress, output):
                artifacts.add(step, identity)
            curves.append(source.curves())
        except WorkDirectoryError:
            raise
        except BpwiseError as cause:
            refused[name] = cause
    if refused and (required or not curves):
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        warnings.warn(f"{name}: not measured. {reason}", BpwiseWarning, stacklevel=2)
    return curves


def require_measurable(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that cannot be measured or run, from its config and the headers of its files.

    Raises:
        CheckpointError: A tensor is missing, of another shape than config.json says, or of a dtype that is not read.
        UnsupportedModelError: The family is unknown.
    """
    for name in sorted(checkpoint.names):
        checkpoint.require_dtype(name)
    StreamedModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)

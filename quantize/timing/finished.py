"""What an earlier run left finished in a work directory, as far as a forecast of time needs to know it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.files.schemas import read_json
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import language_model
from ...errors import BpwiseError, WorkDirectoryError
from ...linalg.products import pass_precision
from ...measure.device import resolve_device
from ...measure.measurement import Measurement
from ...measure.run import MEASURED, MeasureConfig
from ...version import __version__
from ..rounding.rounding_pass import ROUNDED

__all__ = ["FinishedMeasuring", "finished_blocks", "finished_measuring"]


@dataclass(frozen=True, slots=True)
class FinishedMeasuring:
    """How far measuring is.

    Attributes:
        forward: Share of the blocks that the forward pass has gone through, 0 to 1.
        head: Whether the head is measured.
        backward: Share of the blocks whose curves are there, 0 to 1.
    """

    forward: float = 0.0
    head: bool = False
    backward: float = 0.0


def finished_measuring(
    kept: Path, checkpoint: Checkpoint, config: MeasureConfig, rows_shape: tuple[int, int], formats: set[str]
) -> FinishedMeasuring:
    """Look for a measurement of a model, finished or not.

    The calibration text is not looked at: rows are not cut yet.

    Args:
        kept: Where a finished one is kept, in the work directory of measuring.
        checkpoint: The model; its fingerprint is looked at only where there is something.
        config: Options of measuring.
        rows_shape: Number and length of the calibration rows.
        formats: Names of the formats to measure.
    """
    device = resolve_device(config.device)

    def serves(provenance: Mapping[str, Any]) -> bool:
        wanted = {
            "bpwise": __version__,
            "rows": rows_shape[0],
            "row_tokens": rows_shape[1],
            "damping": config.damping,
            "seed": config.seed,
            "moe_calibrate_all": config.moe_calibrate_all,
            "device": device.type,
            "precision": pass_precision(device, config.precision),
        }
        same = all(provenance.get(key) == value for key, value in wanted.items())
        curves = provenance.get("curves")
        measured = isinstance(curves, dict) and formats <= curves.keys()
        return same and measured and provenance.get("model") == checkpoint.fingerprint

    try:
        if kept.is_file() and serves(Measurement.load(kept).provenance):
            return FinishedMeasuring(1.0, head=True, backward=1.0)
    except BpwiseError:  # damaged: it is measured again
        pass
    blocks = language_model(checkpoint).block_count
    for store in _stores(kept.parent, MEASURED):
        if serves(_identity(store)):
            curves = len(_numbers(store, "curves"))
            # Inputs of blocks whose curves are there are not needed any more, and some may have gone.
            forward = max(len(_numbers(store, "input")) - 1, blocks if curves else 0)
            return FinishedMeasuring(forward / blocks, (store / "head.safetensors").exists(), curves / blocks)
    return FinishedMeasuring()


def finished_blocks(work: Path) -> int:
    """Return how many blocks an earlier run rounded in an output's work directory."""
    return max((1 + index for store in _stores(work, ROUNDED) for index in _numbers(store, "state")), default=0)


def _stores(work: Path, step: str) -> Iterator[Path]:
    yield from sorted(work.glob(f"{step}-*/"))


def _identity(store: Path) -> dict[str, Any]:
    try:
        identity = read_json(store / "identity.json", WorkDirectoryError)
    except WorkDirectoryError:
        return {}
    return identity if isinstance(identity, dict) else {}


def _numbers(store: Path, artifact: str) -> list[int]:
    found = (re.fullmatch(rf"{artifact}-(\d+)\.safetensors", path.name) for path in store.iterdir())
    return [int(match[1]) for match in found if match]

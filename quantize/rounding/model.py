"""Rounding a whole model: the token embeddings where they are rounded too, the blocks in order, the head last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import language_model
from ...convert.plan import Plan
from ...convert.rounding import RoundedModel, Rounder
from ...linalg.products import float32_products
from ...measure.device import resolve_device
from ...measure.measurement import Measurement
from ...measure.model.stream import StreamedModel
from ...measure.run import kept_inputs
from ...progress import Progress, silent
from .rounding_pass import ROUNDED, RoundingPass

__all__ = ["RoundConfig", "round_model", "rounded_before", "rounding_identity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundConfig:
    """Options of the rounding pass.

    Attributes:
        correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
        offload_dir: Directory for files with the hidden states of all rows; None keeps them in memory.
    """

    correct_drift: bool = True
    device: str = "auto"
    offload_dir: Path | None = None


def rounding_identity(checkpoint: Checkpoint, plan: Plan, rounder: Rounder, config: RoundConfig) -> dict[str, Any]:
    """Return all that the artifacts of ``round_model`` depend on, as ``ResumeStore`` takes it."""
    return {
        "model": checkpoint.fingerprint,
        "plan": plan.identity(),
        **rounder.identity,
        "correct_drift": config.correct_drift,
        "device": resolve_device(config.device).type,
    }


def round_model(
    checkpoint: Checkpoint,
    measurement: Measurement,
    plan: Plan,
    rounder: Rounder,
    config: RoundConfig,
    work: Path,
    progress: Progress = silent,
) -> RoundedModel:
    """Round every linear as the plan says.

    Args:
        checkpoint: The original model.
        measurement: Gives the calibration rows, and what is known of each linear.
        plan: What every linear gets.
        rounder: Rounds single linears so.
        config: Options.
        work: Work directory; finished blocks in it are not done again.
        progress: Wraps the blocks.

    Returns:
        The encoded linears.

    Raises:
        NumericalError: NaN or infinity in weights or activations.
    """
    store = ResumeStore(work, ROUNDED, rounding_identity(checkpoint, plan, rounder, config))
    model = StreamedModel(
        language_model(checkpoint),
        device=resolve_device(config.device),
        dtype=torch.float32,
        offload_dir=config.offload_dir,
    )
    inputs = kept_inputs(work, measurement)
    run = RoundingPass(model, measurement, rounder, store, correct_drift=config.correct_drift, inputs=inputs)
    table = None
    if rounder.table is not None:
        if not store.has(rounder.table):
            store.save(rounder.table, rounder.round_table())
        table = rounder.decoded(rounder.table, store.load(rounder.table))
    with float32_products(model.device):
        run.blocks(progress, table)
        if model.source.head_name in rounder.names:
            run.head()
    return RoundedModel(rounder.names, model.block_count, store)


def rounded_before(
    checkpoint: Checkpoint, plan: Plan, rounder: Rounder, config: RoundConfig, work: Path
) -> RoundedModel | None:
    """Return what an earlier run rounded that was cut off before its end, None if that is not there, or not all of it.

    Args:
        checkpoint: As for ``round_model``.
        plan: As for ``round_model``.
        rounder: As for ``round_model``.
        config: As for ``round_model``.
        work: As for ``round_model``.
    """
    store = ResumeStore.existing(work, ROUNDED, rounding_identity(checkpoint, plan, rounder, config))
    blocks = language_model(checkpoint).block_count
    artifacts = [*rounder.names, *(f"drift-{index}" for index in range(blocks))]
    if store is None or not all(map(store.has, artifacts)):
        return None
    return RoundedModel(rounder.names, blocks, store)

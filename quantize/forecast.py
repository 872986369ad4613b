"""What a run will take, from the shapes alone: size, possible bitrates, memory. Reads no weights, writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..convert.checkpoint import Checkpoint
from ..measure.curves import SAMPLED_COLUMNS
from ..measure.families import HEAD, family_of
from ..measure.run import MeasureConfig
from ..rounding.parallel import cores
from .kept import KeptLinear
from .linears import model_linears
from .scope import HeadBits, SizeLimit, WidthOverride, plan_scope

__all__ = ["Forecast", "forecast_run"]

_FLOAT32_BYTES = 4
_FLOAT64_BYTES = 8

_RUNTIME_BYTES = 600 << 20
"""Resident memory of Python, PyTorch and Transformers before any weight is read, measured on Linux."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will take.

    Attributes:
        decoder_weights: Weights in the decoder's linears.
        original_bytes: Size of the original tensors.
        output_bytes: Size of the quantized tensors at the asked bitrates.
        bpw: Decoder bits per weight, as asked or as the asked size leaves.
        lowest_bpw: Smallest decoder bits per weight possible.
        highest_bpw: Largest decoder bits per weight possible.
        kept: Decoder linears that stay in float16.
        head_reason: Why the head does though other bits were asked; else None.
        memory_bytes: Expected peak of resident memory, a rough upper estimate.
        disk_bytes: Expected peak of the work directory.
    """

    decoder_weights: int
    original_bytes: int
    output_bytes: int
    bpw: float
    lowest_bpw: float
    highest_bpw: float
    kept: tuple[KeptLinear, ...]
    head_reason: str | None
    memory_bytes: int
    disk_bytes: int


def forecast_run(
    checkpoint: Checkpoint,
    *,
    bpw: float | None = None,
    size: SizeLimit | None = None,
    head_bits: HeadBits,
    config: MeasureConfig,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> Forecast:
    """Forecast a run of the whole pipeline.

    Args:
        checkpoint: The original model.
        bpw: As ``make_plan`` takes it.
        size: As ``make_plan`` takes it.
        head_bits: As ``make_plan`` takes them.
        config: Gives group size and the number of calibration tokens.
        overrides: As ``make_plan`` takes them.
        keep_fp16: As ``make_plan`` takes them.

    Raises:
        UnsupportedModelError: The family is unknown.
        ConfigError: As ``plan_scope``.
        BudgetError: No plan has this size.
        CheckpointError: A tensor that the family should have is missing.
    """
    assert (bpw is None) != (size is None), "one target"
    family = family_of(checkpoint.config)
    linears, head = model_linears(checkpoint)
    scope = plan_scope(
        linears, head, group_size=config.group_size, head_bits=head_bits, overrides=overrides, keep_fp16=keep_fp16
    )
    budget_bits = scope.budget_bits(bpw) if bpw is not None else 0
    if size is not None:
        budget_bits = scope.budget_bits_within(size)
    stored_head = 0 if checkpoint.tied_embeddings else checkpoint.info(f"{HEAD}.weight").size_bytes
    quantized_bytes = (budget_bits + scope.head_alone_bits) // 8 + (stored_head if scope.head is None else 0)
    other = checkpoint.total_bytes - stored_head - sum(checkpoint.info(f"{x.name}.weight").size_bytes for x in linears)
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    vocabulary, hidden = head.out_features, head.in_features
    first = f"{family.blocks}.0."
    block = [(x.out_features, x.in_features) for x in linears if x.name.startswith(first)]
    inputs = [checkpoint.shape(f"{first}{stage.linears[0]}.weight")[1] for stage in family.stages]
    tokens = config.calibration.rows * config.calibration.row_tokens
    state = tokens * hidden * _FLOAT32_BYTES
    lowest, highest = scope.bpw_range
    return Forecast(
        decoder_weights=weights,
        original_bytes=checkpoint.total_bytes,
        output_bytes=other + quantized_bytes,
        bpw=budget_bits / scope.weights if bpw is None else bpw,
        lowest_bpw=lowest,
        highest_bpw=highest,
        kept=scope.kept,
        head_reason=scope.head_reason,
        memory_bytes=_RUNTIME_BYTES + _memory(block, inputs, vocabulary, hidden, tokens),
        # Inputs of all blocks while measuring; then a byte per weight and two states while rounding.
        disk_bytes=max(
            (int(checkpoint.config["num_hidden_layers"]) + 1) * state, weights + vocabulary * hidden + 4 * state
        ),
    )


def _memory(block: list[tuple[int, int]], inputs: list[int], vocabulary: int, hidden: int, tokens: int) -> int:
    state = tokens * hidden * _FLOAT32_BYTES
    largest_input = max(inputs)
    weights = sum(rows * columns for columns, rows in block) * _FLOAT32_BYTES
    grams = sum(rows * rows for rows in inputs) * 2 * _FLOAT32_BYTES  # of each half of the calibration rows
    factor = 3 * largest_input**2 * _FLOAT64_BYTES
    curves = 4 * cores() * 6 * largest_input * SAMPLED_COLUMNS * _FLOAT32_BYTES
    # Rounding a block keeps the original's states before and after, the quantized one before, what the stages should
    # see and make (four), and in every waiting forward pass the stream and the widest stage's inputs.
    decoder = weights + grams + max(factor, curves) + 8 * state + tokens * largest_input * _FLOAT32_BYTES
    # The head: its weight in the stored and the rounding dtype and once more in stored row order, beside the codes.
    head = vocabulary * hidden * (3 * _FLOAT32_BYTES + 1) + 2 * state
    return max(decoder, head)

"""What a run will take, from the shapes alone: size, possible bitrates, memory. Reads no weights, writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from ..convert.checkpoint import Checkpoint
from ..convert.exl2.layout import RowGroup, group_rows, linear_bits
from ..measure.curves import SAMPLED_COLUMNS
from ..measure.families import HEAD, family_of
from ..measure.run import MeasureConfig
from ..rounding.parallel import cores
from .plan import AUTO, HeadBits, check_bpw, possible_bpw

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
        lowest_bpw: Smallest decoder bits per weight possible.
        highest_bpw: Largest decoder bits per weight possible.
        memory_bytes: Expected peak of resident memory, a rough upper estimate.
        disk_bytes: Expected peak of the work directory.
    """

    decoder_weights: int
    original_bytes: int
    output_bytes: int
    lowest_bpw: float
    highest_bpw: float
    memory_bytes: int
    disk_bytes: int


def forecast_run(checkpoint: Checkpoint, *, bpw: float, head_bits: HeadBits, config: MeasureConfig) -> Forecast:
    """Forecast a run of the whole pipeline.

    Args:
        checkpoint: The original model.
        bpw: Decoder bits per weight; with ``auto`` head bits those of decoder and head together.
        head_bits: Head bits, 16 for unquantized, or ``auto``.
        config: Gives group size and the number of calibration tokens.

    Raises:
        UnsupportedModelError: The family is unknown.
        BudgetError: No plan has this size.
        CheckpointError: A tensor that the family should have is missing.
    """
    family = family_of(checkpoint.config)
    blocks = int(checkpoint.config["num_hidden_layers"])
    block: dict[str, tuple[int, int]] = {}
    inputs = [checkpoint.shape(f"{family.blocks}.0.{stage.linears[0]}.weight")[1] for stage in family.stages]
    for stage in family.stages:
        for name in stage.linears:
            columns, rows = checkpoint.shape(f"{family.blocks}.0.{name}.weight")
            block[name] = columns, rows
    embedding = next(checkpoint.shape(name) for name in checkpoint.names if name.endswith("embed_tokens.weight"))
    vocabulary, hidden = embedding
    weights = blocks * sum(rows * columns for columns, rows in block.values())
    budgeted = [(rows, columns) for columns, rows in block.values()] * blocks
    if head_bits == AUTO:
        budgeted.append((hidden, vocabulary))
    lowest, highest = possible_bpw(budgeted, config.group_size)
    check_bpw(bpw, (lowest, highest), config.group_size)
    quantized_bytes = int(bpw * sum(rows * columns for rows, columns in budgeted)) // 8
    stored_head = 0 if checkpoint.tied_embeddings else checkpoint.info(f"{HEAD}.weight").size_bytes
    if head_bits == 16:
        quantized_bytes += stored_head
    elif isinstance(head_bits, int):
        groups = [RowGroup(head_bits, n) for n in group_rows(hidden, config.group_size)]
        quantized_bytes += linear_bits(vocabulary, groups) // 8
    linear_bytes = sum(
        checkpoint.info(f"{family.blocks}.{index}.{name}.weight").size_bytes
        for index in range(blocks)
        for name in block
    )
    other = checkpoint.total_bytes - linear_bytes - stored_head
    tokens = config.calibration.rows * config.calibration.row_tokens
    state = tokens * hidden * _FLOAT32_BYTES
    return Forecast(
        decoder_weights=weights,
        original_bytes=checkpoint.total_bytes,
        output_bytes=other + quantized_bytes,
        lowest_bpw=lowest,
        highest_bpw=highest,
        memory_bytes=_RUNTIME_BYTES + _memory(list(block.values()), inputs, vocabulary, hidden, tokens),
        # Inputs of all blocks while measuring; then a byte per weight and two states while rounding.
        disk_bytes=max((blocks + 1) * state, weights + vocabulary * hidden + 4 * state),
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

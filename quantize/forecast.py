"""What a run will take, from the shapes alone: size, possible bitrates, memory. Reads no weights, writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from ..convert.checkpoint import Checkpoint
from ..convert.exl2.layout import RowGroup, group_rows, linear_bits
from ..convert.families import HEAD, Stage
from ..convert.language import LanguageModel, language_model
from ..measure.curves import SAMPLED_COLUMNS
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
    source = language_model(checkpoint)
    count = int(source.config["num_hidden_layers"])
    blocks = [_shapes(source, index) for index in range(count)]
    embedding = next(source.shape(name) for name in source.names if name.endswith("embed_tokens.weight"))
    vocabulary, hidden = embedding
    decoder = {name: shape for block in blocks for stage in block.values() for name, shape in stage.items()}
    weights = sum(rows * columns for columns, rows in decoder.values())
    budgeted = [(rows, columns) for columns, rows in decoder.values()]
    if head_bits == AUTO:
        budgeted.append((hidden, vocabulary))
    lowest, highest = possible_bpw(budgeted, config.group_size)
    check_bpw(bpw, (lowest, highest), config.group_size)
    quantized_bytes = int(bpw * sum(rows * columns for rows, columns in budgeted)) // 8
    stored_head = 0 if source.tied_embeddings else source.stored_bytes(f"{HEAD}.weight")
    if head_bits == 16:
        quantized_bytes += stored_head
    elif isinstance(head_bits, int):
        groups = [RowGroup(head_bits, n) for n in group_rows(hidden, config.group_size)]
        quantized_bytes += linear_bits(vocabulary, groups) // 8
    linear_bytes = sum(source.stored_bytes(f"{name}.weight") for name in decoder)
    other = checkpoint.total_bytes - linear_bytes - stored_head
    tokens = config.calibration.rows * config.calibration.row_tokens
    state = tokens * hidden * _FLOAT32_BYTES
    return Forecast(
        decoder_weights=weights,
        original_bytes=checkpoint.total_bytes,
        output_bytes=other + quantized_bytes,
        lowest_bpw=lowest,
        highest_bpw=highest,
        memory_bytes=_RUNTIME_BYTES
        + max(*(_block_memory(block, hidden, tokens) for block in blocks), _head_memory(vocabulary, hidden, tokens)),
        # Inputs of all blocks while measuring, and at first two states while rounding; then a byte per weight.
        disk_bytes=max((count + 5) * state, weights + vocabulary * hidden + 4 * state),
    )


def _shapes(source: LanguageModel, index: int) -> dict[Stage, dict[str, tuple[int, int]]]:
    # (out, in) of the linears of a block's stages.
    shapes: dict[Stage, dict[str, tuple[int, int]]] = {}
    for stage in source.family.block_stages(index, source.names):
        for name in source.family.linear_names(index, stage):
            columns, rows = source.shape(f"{name}.weight")
            shapes.setdefault(stage, {})[name] = columns, rows
    return shapes


def _block_memory(block: dict[Stage, dict[str, tuple[int, int]]], hidden: int, tokens: int) -> int:
    state = tokens * hidden * _FLOAT32_BYTES
    inputs = {stage: next(iter(linears.values()))[1] for stage, linears in block.items()}
    largest_input = max(inputs.values())
    weights = sum(rows * columns for linears in block.values() for columns, rows in linears.values()) * _FLOAT32_BYTES
    # Gram matrices of each half of the calibration rows; of experts only one at a time is worked on.
    grams = [rows * rows * 2 * _FLOAT32_BYTES for stage, rows in inputs.items() if stage.expert in (None, 0)]
    factor = 3 * largest_input**2 * _FLOAT64_BYTES
    curves = 4 * cores() * 6 * largest_input * SAMPLED_COLUMNS * _FLOAT32_BYTES
    # Rounding a block keeps the original's states before and after, the quantized one before, what the stages should
    # see and make (four), and in every waiting forward pass the stream and the widest stage's inputs.
    return weights + sum(grams) + max(factor, curves) + 8 * state + tokens * largest_input * _FLOAT32_BYTES


def _head_memory(vocabulary: int, hidden: int, tokens: int) -> int:
    # Its weight in the stored and the rounding dtype and once more in stored row order, beside the codes.
    return vocabulary * hidden * (3 * _FLOAT32_BYTES + 1) + 2 * tokens * hidden * _FLOAT32_BYTES

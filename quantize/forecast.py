"""What a run will take, from the shapes alone: size, possible bitrates, memory. Reads no weights, writes nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.model.families import HEAD, InputGroup
from ..checkpoint.source.checkpoint import Checkpoint
from ..checkpoint.source.language import LanguageModel, language_model
from ..checkpoint.source.linears import model_linears
from ..convert.exl2.plan.problem import HeadBits, SizeLimit, WidthOverride, allocation_problem
from ..convert.exl2.plan.unquantized import UnquantizedLinear
from ..convert.exl2.rounding.curves import SAMPLED_COLUMNS
from ..linalg.parallel import cores
from ..measure.model.positionwise import CHUNK_POSITIONS
from ..measure.model.stream import MICRO_BATCH_TOKENS
from ..measure.run import MeasureConfig

__all__ = ["Forecast", "forecast_run", "tuning_memory"]

_FLOAT16_BYTES = 2
_FLOAT32_BYTES = 4
_FLOAT64_BYTES = 8

_LOGITS_HELD = 2200
"""Positions for which evaluation holds a number for every token of the vocabulary: logits of both models for 256, of
the floor for 512 more, and the terms of divergences for 64 at a time."""

_LOGITS_TUNED = 2000
"""The same while scales are tuned: both models' logits and what their divergence needs, for 256."""

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
        quantized: Names of the linears that are quantized, the head among them if it is.
        kept: Decoder linears that stay in float16.
        head_reason: Why the head does though other bits were asked; else None.
        memory_bytes: Expected peak of memory, a rough upper estimate; without states in an offload directory.
        disk_bytes: Expected peak of the work directory.
    """

    decoder_weights: int
    original_bytes: int
    output_bytes: int
    bpw: float
    lowest_bpw: float
    highest_bpw: float
    quantized: tuple[str, ...]
    kept: tuple[UnquantizedLinear, ...]
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
        ConfigError: As ``allocation_problem``.
        BudgetError: No plan has this size.
        CheckpointError: A tensor that the family should have is missing.
    """
    assert (bpw is None) != (size is None), "one target"
    source = language_model(checkpoint)
    linears, head = model_linears(source)
    scope = allocation_problem(
        linears, head, group_size=config.group_size, head_bits=head_bits, overrides=overrides, keep_fp16=keep_fp16
    )
    budget_bits = scope.budget_bits(bpw) if bpw is not None else 0
    if size is not None:
        budget_bits = scope.budget_bits_within(size)
    stored_head = 0 if source.tied_embeddings else source.stored_bytes(f"{HEAD}.weight")
    quantized_bytes = (budget_bits + scope.head_alone_bits) // 8 + (stored_head if scope.head is None else 0)
    other = checkpoint.total_bytes - stored_head - sum(source.stored_bytes(f"{x.name}.weight") for x in linears)
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    vocabulary, hidden = head.out_features, head.in_features
    blocks = [_shapes(source, index) for index in range(source.block_count)]
    tokens = config.calibration.rows * config.calibration.tokens_each
    state = tokens * hidden * _FLOAT32_BYTES
    kept_tokens = tokens if config.offload_dir is None else 0
    together = max(config.calibration.tokens_each, MICRO_BATCH_TOKENS)
    lowest, highest = scope.bpw_range
    return Forecast(
        decoder_weights=weights,
        original_bytes=checkpoint.total_bytes,
        output_bytes=other + quantized_bytes,
        bpw=budget_bits / scope.weights if bpw is None else bpw,
        lowest_bpw=lowest,
        highest_bpw=highest,
        quantized=tuple(x.name for x in (*scope.quantized, *([scope.head] if scope.head else []))),
        memory_bytes=_RUNTIME_BYTES
        + max(
            *(_measuring_memory(block, hidden, kept_tokens, together) for block in blocks),
            *(_rounding_memory(block, hidden, kept_tokens, together) for block in blocks),
            _head_memory(vocabulary, hidden, kept_tokens),
        ),
        # Inputs of all blocks while measuring, and at first two states while rounding; then a byte per weight.
        disk_bytes=max((len(blocks) + 5) * state, weights + vocabulary * hidden + 4 * state),
        kept=scope.kept,
        head_reason=scope.head_reason,
    )


def tuning_memory(checkpoint: Checkpoint, config: MeasureConfig) -> int:
    """Forecast the peak of memory while scales are tuned, in bytes, as ``Forecast.memory_bytes`` does of all else.

    Args:
        checkpoint: The original model.
        config: Gives the number of calibration tokens.
    """
    source = language_model(checkpoint)
    _, head = model_linears(source)
    vocabulary, hidden = head.out_features, head.in_features
    blocks = [_shapes(source, index) for index in range(source.block_count)]
    calibration = config.calibration
    # What both models' last blocks make of all rows, and what enters every block for a step: in files where states are.
    held = 2 * calibration.rows * calibration.tokens_each + len(blocks) * calibration.tokens_each
    states = 0 if config.offload_dir is not None else held * hidden * _FLOAT32_BYTES
    block = max(map(_weights, blocks)) + max(_passing(each, hidden, calibration.tokens_each) for each in blocks)
    # Both heads in 16 bits, and what is computed from some logits.
    heads = 2 * vocabulary * hidden * _FLOAT16_BYTES + vocabulary * _LOGITS_TUNED * _FLOAT32_BYTES
    return _RUNTIME_BYTES + states + block + heads


def _shapes(source: LanguageModel, index: int) -> dict[InputGroup, dict[str, tuple[int, int]]]:
    # (out, in) of the linears of a block's stages.
    shapes: dict[InputGroup, dict[str, tuple[int, int]]] = {}
    for stage in source.family.input_groups(index, source.names):
        for name in source.family.linear_names(index, stage):
            columns, rows = source.shape(f"{name}.weight")
            shapes.setdefault(stage, {})[name] = columns, rows
    return shapes


def _measuring_memory(
    block: dict[InputGroup, dict[str, tuple[int, int]]], hidden: int, kept_tokens: int, together: int
) -> int:
    # Gram matrices of each half of the calibration rows; of experts only one at a time is worked on.
    inputs = _inputs(block)
    grams = sum(2 * rows**2 for stage, rows in inputs.items() if stage.expert in (None, 0)) * _FLOAT32_BYTES
    # States and gradients of all tokens.
    states = 2 * kept_tokens * hidden * _FLOAT32_BYTES
    # A half in another order, the damped one and its factor.
    factor = 3 * max(inputs.values()) ** 2 * _FLOAT32_BYTES
    curves = 4 * cores() * 6 * max(inputs.values()) * SAMPLED_COLUMNS * _FLOAT32_BYTES
    # What the passes took, much of it in small pieces, is not all given back to the system.
    return _weights(block) + grams + states + _passing(block, hidden, together) + max(factor, curves)


def _passing(block: dict[InputGroup, dict[str, tuple[int, int]]], hidden: int, together: int) -> int:
    # What a micro-batch leaves for its backward pass.
    in_mlp = min(together, CHUNK_POSITIONS)
    return (8 * in_mlp * max(_inputs(block).values()) + 16 * together * hidden) * _FLOAT32_BYTES


def _rounding_memory(
    block: dict[InputGroup, dict[str, tuple[int, int]]], hidden: int, kept_tokens: int, together: int
) -> int:
    # States of the original after the block and of the quantized model before, and what the stages should see or make
    # (three at the attention's output, one at the end). In every waiting forward pass the stream, twice, and at the
    # attention's output its queries, keys and values and what came of them; at the end the last stage's inputs.
    inputs = _inputs(block)
    state, waiting = kept_tokens * hidden * _FLOAT32_BYTES, (kept_tokens or together) * _FLOAT32_BYTES
    before = list(itertools.takewhile(lambda stage: stage.adds is None, block))
    attention = (
        sum(columns for stage in before for columns, _ in block[stage].values()) + list(inputs.values())[len(before)]
    )
    states = max(5 * state + waiting * attention, 3 * state + waiting * max(inputs.values())) + 2 * waiting * hidden
    # A micro-batch's pass, and the sums over it.
    passing = (4 * min(together, CHUNK_POSITIONS) * max(inputs.values()) + 16 * together * hidden) * _FLOAT32_BYTES
    # The Gram matrix; for each linear at work it again in float64, and its factor; weights and by how much they move.
    factors = (
        rows**2 * (_FLOAT32_BYTES + min(cores(), len(block[stage])) * (_FLOAT32_BYTES + _FLOAT64_BYTES))
        + sum(2 * math.prod(shape) for shape in block[stage].values()) * _FLOAT32_BYTES
        for stage, rows in inputs.items()
    )
    return _weights(block) + states + passing + max(factors)


def _head_memory(vocabulary: int, hidden: int, kept_tokens: int) -> int:
    weights, states = vocabulary * hidden, 2 * kept_tokens * hidden * _FLOAT32_BYTES
    # Rounding: its weight in the stored dtype and, moved, in float32. Evaluating: both heads in 16 bits, logits of both
    # models for some positions, and what is computed from them.
    rounding = weights * (_FLOAT16_BYTES + _FLOAT32_BYTES)
    evaluating = 2 * weights * _FLOAT16_BYTES + vocabulary * _LOGITS_HELD * _FLOAT32_BYTES
    return states + max(rounding, evaluating)


def _inputs(block: dict[InputGroup, dict[str, tuple[int, int]]]) -> dict[InputGroup, int]:
    return {stage: next(iter(linears.values()))[1] for stage, linears in block.items()}


def _weights(block: dict[InputGroup, dict[str, tuple[int, int]]]) -> int:
    return sum(math.prod(shape) for linears in block.values() for shape in linears.values()) * _FLOAT32_BYTES

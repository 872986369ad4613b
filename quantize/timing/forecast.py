"""Forecasts from shapes alone: size, possible bitrates, memory. Reads no weights, writes nothing."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from ...checkpoint.model.structure import InputGroup
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import LanguageModel, language_model
from ...checkpoint.source.linears import model_linears
from ...convert.conversion import Conversion, SizeForecast, Target
from ...linalg.parallel import cores
from ...linalg.products import kept_bytes
from ...measure.device import resolve_device
from ...measure.layers.positionwise import CHUNK_POSITIONS
from ...measure.measurement import Measurement
from ...measure.model.batches import MICRO_BATCH_TOKENS
from ...measure.run import MeasureConfig
from ...measure.text.context import CALIBRATION, fit_row_tokens
from ...progress import ExpectedPart, seconds_by_step

__all__ = ["Forecast", "forecast_run"]

_FLOAT16_BYTES = 2
_FLOAT32_BYTES = 4
_FLOAT64_BYTES = 8

_LOGITS_HELD = 2200
"""Positions for which evaluation holds a number for every token of the vocabulary: logits of both models for 256, of
the floor for 512 more, and the terms of divergences for 64 at a time."""

_LOGITS_TUNED = 2000
"""The same while scales are tuned: both models' logits and what their divergence needs, for 256."""

_RUNTIME_BYTES = 500 << 20
"""Resident memory of Python, PyTorch and Transformers before any weight is read, measured on Linux."""


_SAMPLED_OUTPUTS = 128
"""Outputs of a linear that curves are measured on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run will take.

    Attributes:
        size: Size of the output, and the bits per weight that there are.
        original_bytes: Size of the original tensors.
        memory_bytes: Expected peak of memory, a rough upper estimate; without states in an offload directory.
        disk_bytes: Expected peak of the work directory.
        parts: Parts of the run that are left, each with its seconds; of several outputs from one measurement, the
            first has those of measuring. Empty where the device was not timed.
    """

    size: SizeForecast
    original_bytes: int
    memory_bytes: int
    disk_bytes: int
    parts: tuple[ExpectedPart, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Expected seconds of each step that is left, by its name."""
        return seconds_by_step(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {
            "original_bytes": self.original_bytes,
            "output_bytes": self.size.output_bytes,
            "bpw": self.size.bpw,
            "lowest_bpw": self.size.lowest_bpw,
            "highest_bpw": self.size.highest_bpw,
            "facts": list(self.size.facts),
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Numbers of calibration tokens.

    Attributes:
        all: Of all rows.
        row: Of one row.
        resident: Of all rows whose hidden states are kept in memory.
    """

    all: int
    row: int
    resident: int


def forecast_run(
    conversion: Conversion,
    target: Target | None,
    measure: MeasureConfig,
    *,
    measured: Measurement | None = None,
    rows_shape: tuple[int, int] | None = None,
) -> Forecast:
    """Forecast a run of the whole pipeline.

    Args:
        conversion: The original on its way into a format.
        target: How large the output may be.
        measure: Gives the number of calibration tokens.
        measured: A measurement to work from; None if there is none yet.
        rows_shape: Number and length of the calibration rows where they are known.

    Raises:
        BpwiseError: As ``Conversion.forecast``; or rows are longer than the model's context.
        CheckpointError: A tensor that the family should have is missing.
    """
    checkpoint = conversion.checkpoint
    size = conversion.forecast(target, measured)
    if not conversion.measures:
        return Forecast(
            size=size, original_bytes=checkpoint.total_bytes, memory_bytes=_RUNTIME_BYTES, disk_bytes=size.output_bytes
        )
    source = language_model(checkpoint)
    calibration = measure.calibration
    if rows_shape is None:
        rows_shape = calibration.rows, fit_row_tokens(calibration.row_tokens, checkpoint, CALIBRATION)
    rows, row_tokens = rows_shape
    offloaded = measure.offload_dir is not None
    tokens = _Tokens(rows * row_tokens, row_tokens, 0 if offloaded else rows * row_tokens)
    linears, head = model_linears(source)
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    state = tokens.all * head.in_features * _FLOAT32_BYTES
    memory = _pass_memory(source, head.out_features, head.in_features, tokens)
    if conversion.refines:
        memory = max(memory, _tuning_memory(checkpoint, rows, row_tokens, offloaded=offloaded))
    return Forecast(
        size=size,
        original_bytes=checkpoint.total_bytes,
        memory_bytes=memory + kept_bytes(resolve_device(measure.device)),
        # Inputs of all blocks while measuring, and at first two states while rounding; then a byte per weight.
        disk_bytes=max((source.block_count + 5) * state, weights + head.out_features * head.in_features + 4 * state),
    )


def _pass_memory(source: LanguageModel, vocabulary: int, hidden: int, tokens: _Tokens) -> int:
    blocks = [_shapes(source, index) for index in range(source.block_count)]
    together = max(tokens.row, MICRO_BATCH_TOKENS)
    return _RUNTIME_BYTES + max(
        *(_measuring_memory(block, hidden, tokens.resident, together) for block in blocks),
        *(_rounding_memory(block, hidden, tokens.resident, together) for block in blocks),
        _head_memory(vocabulary, hidden, tokens.resident),
    )


def _tuning_memory(checkpoint: Checkpoint, rows: int, row_tokens: int, *, offloaded: bool) -> int:
    # While scales are tuned.
    source = language_model(checkpoint)
    _, head = model_linears(source)
    vocabulary, hidden = head.out_features, head.in_features
    blocks = [_shapes(source, index) for index in range(source.block_count)]
    # What both models' last blocks make of all rows, and what enters every block for a step: in files where states are.
    held = 2 * rows * row_tokens + len(blocks) * row_tokens
    states = 0 if offloaded else held * hidden * _FLOAT32_BYTES
    block = max(map(_weights, blocks)) + max(_passing(each, hidden, row_tokens) for each in blocks)
    # Both heads in 16 bits, and what is computed from some logits.
    heads = 2 * vocabulary * hidden * _FLOAT16_BYTES + vocabulary * _LOGITS_TUNED * _FLOAT32_BYTES
    return _RUNTIME_BYTES + states + block + heads


def _shapes(source: LanguageModel, index: int) -> dict[InputGroup, dict[str, tuple[int, int]]]:
    # (out, in) of the linears of a block's input groups.
    shapes: dict[InputGroup, dict[str, tuple[int, int]]] = {}
    for group in source.structure.structures[index].groups:
        for name in (f"{source.blocks}.{index}.{each}" for each in group.linears):
            columns, rows = source.shape(f"{name}.weight")
            shapes.setdefault(group, {})[name] = columns, rows
    return shapes


def _measuring_memory(
    block: dict[InputGroup, dict[str, tuple[int, int]]], hidden: int, kept_tokens: int, together: int
) -> int:
    # Gram matrices of each half of the calibration rows; of experts only one at a time is worked on.
    inputs = _inputs(block)
    grams = sum(2 * rows**2 for group, rows in inputs.items() if group.expert in (None, 0)) * _FLOAT32_BYTES
    # States and gradients of all tokens.
    states = 2 * kept_tokens * hidden * _FLOAT32_BYTES
    # The factor in the input channels' own order, and one in the order of each of two linears (gate and up).
    factor = 3 * max(inputs.values()) ** 2 * _FLOAT32_BYTES
    curves = 4 * cores() * 6 * max(inputs.values()) * _SAMPLED_OUTPUTS * _FLOAT32_BYTES
    # What the passes took, much of it in small pieces, is not all given back to the system.
    return _weights(block) + grams + states + _passing(block, hidden, together) + max(factor, curves)


def _passing(block: dict[InputGroup, dict[str, tuple[int, int]]], hidden: int, together: int) -> int:
    # What a micro-batch leaves for its backward pass.
    in_mlp = min(together, CHUNK_POSITIONS)
    return (8 * in_mlp * max(_inputs(block).values()) + 16 * together * hidden) * _FLOAT32_BYTES


def _rounding_memory(
    block: dict[InputGroup, dict[str, tuple[int, int]]], hidden: int, kept_tokens: int, together: int
) -> int:
    # States of the original after the block and of the quantized model before, and what its groups should see or make
    # (three at the attention's output, one at the end). In every waiting forward pass the stream, twice, and at the
    # attention's output its queries, keys and values and what came of them; at the end the last input group's inputs.
    inputs = _inputs(block)
    state, waiting = kept_tokens * hidden * _FLOAT32_BYTES, (kept_tokens or together) * _FLOAT32_BYTES
    before = list(itertools.takewhile(lambda group: group.adds is None, block))
    attention = (
        sum(columns for group in before for columns, _ in block[group].values())
        + list(inputs.values())[min(len(before), len(inputs) - 1)]
    )
    states = max(5 * state + waiting * attention, 3 * state + waiting * max(inputs.values())) + 2 * waiting * hidden
    # A micro-batch's pass, and the sums over it.
    passing = (4 * min(together, CHUNK_POSITIONS) * max(inputs.values()) + 16 * together * hidden) * _FLOAT32_BYTES
    # The Gram matrix; for each linear at work its factor, in float64 at worst and then in float32; weights and their
    # shift.
    factors = (
        rows**2 * (_FLOAT32_BYTES + min(cores(), len(block[group])) * (_FLOAT32_BYTES + _FLOAT64_BYTES))
        + sum(2 * math.prod(shape) for shape in block[group].values()) * _FLOAT32_BYTES
        for group, rows in inputs.items()
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
    return {group: next(iter(linears.values()))[1] for group, linears in block.items()}


def _weights(block: dict[InputGroup, dict[str, tuple[int, int]]]) -> int:
    return sum(math.prod(shape) for linears in block.values() for shape in linears.values()) * _FLOAT32_BYTES

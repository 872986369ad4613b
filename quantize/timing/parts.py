"""The parts of a run, their work counted, and the seconds that each is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import language_model
from ...convert.conversion import Conversion
from ...convert.registry import format_asking
from ...eval.config import EvalConfig
from ...eval.models import DTYPES
from ...linalg.parallel import cores
from ...linalg.work import Rates, Work, rates_of
from ...measure.calibrated import finished_rows
from ...measure.device import resolve_device
from ...measure.run import MeasureConfig
from ...measure.text.generation import ROWS_TOGETHER, WRITING
from ...measure.text.mixture import SELF, rows_of
from ...progress import ExpectedPart
from .counts import evaluating, measuring, rounding, tuning, writing
from .finished import finished_blocks, finished_measuring
from .passes import Tokens
from .shapes import ModelShape

__all__ = [
    "CountedPart",
    "OutputState",
    "evaluation_parts",
    "expected_parts",
    "measuring_parts",
    "output_parts",
    "preparing_part",
    "writing_parts",
]

_CPU = torch.device("cpu")

_STARTING_SECONDS = 1.5
"""What reading a tokenizer, cutting text into rows and building a model without weights take before a step."""

_DEFAULT_BPW = 4.5
"""Bits per weight where a size is asked for otherwise: what types a format takes hardly matters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputState:
    """What there is of an output already.

    Attributes:
        work: Its work directory.
        exists: Whether it is there.
        measures: Whether the model is measured in the same work directory, so that the inputs of its blocks are there.
    """

    work: Path
    exists: bool
    measures: bool


@dataclass(frozen=True, slots=True)
class CountedPart:
    """A part of a run that is to come.

    Attributes:
        step: As ``ExpectedPart`` has it.
        label: As ``ExpectedPart`` has it.
        device: Where it is done.
        work: All of it.
        seconds: What it takes beside that.
        done: Share of it that an earlier run has finished, 0 to 1.
    """

    step: str
    label: str
    device: torch.device
    work: Work
    seconds: float = 0.0
    done: float = 0.0


def expected_parts(
    parts: Iterable[CountedPart], rates: Callable[[torch.device], Rates] = rates_of
) -> tuple[ExpectedPart, ...]:
    """Return what is left of some parts, in seconds.

    Args:
        parts: The parts.
        rates: Returns the rates of a device, which are timed here where that was not done before.
    """
    together = list(parts)
    for each in together:
        rates(each.device).learn(each.work)
    return tuple(
        ExpectedPart(
            step=each.step,
            label=each.label,
            seconds=(each.seconds + rates(each.device).seconds(each.work)) * (1 - min(each.done, 1.0)),
            done=min(each.done, 1.0),
        )
        for each in together
    )


def preparing_part(conversion: Conversion, config: MeasureConfig) -> CountedPart:
    """Return what making ready a conversion takes; arguments as in ``measuring_parts``."""
    shape, work = ModelShape.of(language_model(conversion.checkpoint)), conversion.work(_DEFAULT_BPW)
    device, counted = resolve_device(config.device), work.preparing(shape.all_weights, shape.vocabulary)
    return CountedPart("prepare", "prepare", device, counted, seconds=work.starting_seconds)


def writing_parts(
    checkpoint: Checkpoint, config: MeasureConfig, rows_shape: tuple[int, int], kept: Path | None
) -> list[CountedPart]:
    """Return what having the model write calibration rows takes, nothing where it writes none, or has written them.

    Args:
        checkpoint: The model.
        config: Options of measuring.
        rows_shape: Number and length of all calibration rows.
        kept: Where the run keeps the rows; None if it has not begun.
    """
    shares, (rows, row_tokens) = config.calibration.shares, rows_shape
    own = sum(count for share, count in zip(shares, rows_of(shares, rows), strict=True) if share.source == SELF)
    if not own or (kept is not None and finished_rows(checkpoint, config.calibration, kept, device=config.device)):
        return []
    shape, device = ModelShape.of(language_model(checkpoint)), resolve_device(config.device)
    starts = range(0, own, ROWS_TOGETHER)
    works = [writing(shape, min(ROWS_TOGETHER, own - first), row_tokens) for first in starts]
    return [CountedPart("calibrate", WRITING, device, work, _STARTING_SECONDS) for work in works]


def measuring_parts(
    conversions: Sequence[Conversion],
    config: MeasureConfig,
    rows_shape: tuple[int, int],
    kept: Path,
) -> list[CountedPart]:
    """Return what is left of measuring a model.

    Args:
        conversions: The model on its way into each format to measure, at least one.
        config: Options of measuring.
        rows_shape: Number and length of the calibration rows.
        kept: Where the measurement is kept in its work directory.

    Raises:
        CheckpointError: A tensor that the family should have is missing.
    """
    device = resolve_device(config.device)
    checkpoint = conversions[0].checkpoint
    shape = ModelShape.of(language_model(checkpoint))
    works = [each.work(_DEFAULT_BPW) for each in conversions]
    formats = {format_asking(each.options).name for each in conversions}
    done = finished_measuring(kept, checkpoint, config, rows_shape, formats)
    if done.backward >= 1:
        return []
    work = measuring(shape, Tokens(*rows_shape), works, device, chosen=config.damping is None)
    return [
        # In a thread beside the forward pass, which has the other cores meanwhile.
        CountedPart("measure", "measure: search tables", _CPU, work.once * (1 / cores())),
        CountedPart("measure", "measure: forward", device, work.forward, _STARTING_SECONDS, done.forward),
        CountedPart("measure", "measure: head", device, work.head, done=float(done.head)),
        CountedPart("measure", "measure: backward, curves", device, work.backward, done=done.backward),
    ]


def output_parts(
    conversion: Conversion,
    bpw: float,
    config: MeasureConfig,
    rows_shape: tuple[int, int],
    state: OutputState,
) -> list[CountedPart]:
    """Return what is left of rounding and writing an output.

    Args:
        conversion: The model on its way into the format.
        bpw: Bits per weight.
        config: Options of measuring, whose device serves rounding too.
        rows_shape: Number and length of the calibration rows.
        state: What there is of the output.

    Raises:
        CheckpointError: As ``measuring_parts``.
    """
    if state.exists:
        return []
    device, tokens = resolve_device(config.device), Tokens(*rows_shape)
    shape, work = ModelShape.of(language_model(conversion.checkpoint)), conversion.work(bpw)
    parts = []
    if conversion.measures and work.rounds:
        counted = rounding(shape, tokens, work, device, known=state.measures)
        done = finished_blocks(state.work) / shape.block_count
        parts.append(CountedPart("round", "quantize: round", device, counted, done=done))
    if conversion.refines:
        parts.append(CountedPart("round", "quantize: tune", device, tuning(shape, tokens, work)))
    return [*parts, CountedPart("write", "writing", _CPU, work.written(shape.all_weights))]


def evaluation_parts(
    conversion: Conversion,
    config: EvalConfig,
    row_tokens: int,
    *,
    original: bool,
) -> list[CountedPart]:
    """Return the parts of evaluating an output.

    Args:
        conversion: The model on its way into the format.
        config: Options of the evaluation.
        row_tokens: Length of the rows.
        original: Whether the original is still to run.

    Raises:
        CheckpointError: As ``measuring_parts``.
    """
    shape, dtype = ModelShape.of(language_model(conversion.checkpoint)), DTYPES[config.dtype]
    work = evaluating(shape, Tokens(config.rows, row_tokens), conversion.work(_DEFAULT_BPW), dtype)
    device = resolve_device(config.device)
    once = [
        CountedPart("evaluate", "evaluate: original model", device, work.original, _STARTING_SECONDS),
        CountedPart("evaluate", "evaluate: original model in float64", _CPU, work.exact),
        CountedPart("evaluate", "evaluate: original model in bfloat16", device, work.bfloat16),
        CountedPart("evaluate", "evaluate: logits", device, work.bfloat16_logits),
    ]
    return [
        *(once if original else []),
        CountedPart("evaluate", "evaluate: quantized model", device, work.quantized),
        CountedPart("evaluate", "evaluate: logits", device, work.logits),
    ]

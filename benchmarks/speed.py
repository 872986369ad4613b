"""What measuring and rounding cost beside the passes through the model that they cannot do without.

    python benchmarks/speed.py --preset qwen2.5-1.5b --rows 32
    python benchmarks/speed.py --model models/SmolLM2-135M-Instruct-off-grid --rows 32
    python benchmarks/speed.py --growth

A model is measured in both formats and rounded in each: one block of known dimensions with random weights and tokens,
or a real model, all of its blocks, with the default calibration text. *Passes* are a forward pass and one with the
backward pass to the block's inputs, in float32 and nothing else; for rounding, two forward passes. Times are processor
seconds of all threads. Rows below a step say what kinds of work it is made of. Beside the passes stands what their
products alone would take at the rate of a large product. ``--growth`` runs small blocks of several widths, numbers of
tokens, blocks and bitrates.
"""

from __future__ import annotations

import importlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.checkpoint.source.linears import model_linears
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.ggml.kernels import encode
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.plan.layout import Layout, StoredTensor
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.rounder import GgufRounder
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.plan import Plan
from bpwise.convert.rounding import Rounder
from bpwise.linalg.products import float32_products
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.measurement import Measurement
from bpwise.measure.model.batches import micro_batches
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.quantize.rounding.model import RoundConfig, round_model
from memory import PRESETS, write_checkpoint
from transformers import LlamaConfig

__all__ = ["Clock", "Costs", "costs_of", "file_layout", "main", "random_block"]

_VOCABULARY = 2048
"""Small: it is the block that is looked at."""

_STEPS = {
    "measure: forward": ("bpwise.measure.passes", "MeasuringPasses._forward_block"),
    "measure: backward": ("bpwise.measure.passes", "MeasuringPasses._backward_block"),
    "measure: curves": ("bpwise.measure.passes", "MeasuringPasses._measured_stage"),
    "measure: head": ("bpwise.measure.passes", "MeasuringPasses.head"),
}
_PARTS = {
    "sums of x x^T": ("bpwise.measure.statistics.inputs", "WeightedGram.add_scaled"),
    "sums of x x^T and of what is missing": ("bpwise.quantize.rounding.drift", "InputSums.add"),
    "damping and held-out tokens": ("bpwise.measure.input_group", "cross_validate_damping"),
    "Cholesky factors": ("bpwise.linalg.hessian", "_factor_"),
    "EXL2: damages": ("bpwise.convert.exl2.rounding.curves", "_damage"),
    "GGUF: damages": ("bpwise.convert.gguf.ggml.curves", "_errors"),
    "round: head": ("bpwise.quantize.rounding.rounding_pass", "round_head"),
    "drift": ("bpwise.quantize.rounding.drift", "InputSums.solved"),
    "EXL2: rounding": ("bpwise.convert.exl2.rounding.rounder", "round_linear_"),
    "GGUF: rounding": ("bpwise.convert.gguf.rounder", "_encoded"),
}
"""Kinds of work, and the functions that do it; some are parts of others."""


class Clock:
    """Processor seconds by name: of the whole process for steps, of the calling thread for their parts."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def step(self, name: str, now: Callable[[], float] = time.process_time) -> Iterator[None]:
        """Count what the body takes under a name."""
        start = now()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += now() - start

    def watch(self, name: str, module: str, path: str, now: Callable[[], float]) -> None:
        """Count what a function takes from now on."""
        *owners, last = path.split(".")
        owner: Any = importlib.import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        function = getattr(owner, last)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.step(name, now):
                return function(*args, **kwargs)

        setattr(owner, last, watched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one model took.

    Attributes:
        seconds: By name: of ``_STEPS``, of rounding in each format, of ``_PARTS`` in rounding, and of the passes.
        measuring: Those of ``_PARTS`` in measuring.
        weights: Of all blocks.
        tokens: Of all calibration rows.
    """

    seconds: Counter[str]
    measuring: Counter[str]
    weights: int
    tokens: int

    @property
    def passes(self) -> float:
        """Seconds of the passes that measuring needs."""
        return self.seconds["forward pass"] + self.seconds["pass with backward"]

    @property
    def two_passes(self) -> float:
        """Seconds of the passes that rounding needs."""
        return 2 * self.seconds["forward pass"]

    @property
    def measure(self) -> float:
        """Seconds of measuring, the output head apart."""
        return sum(self.seconds[name] for name in _STEPS if name != "measure: head")

    def round(self, format_: str) -> float:
        """Seconds of rounding, the output head apart."""
        return self.seconds[f"round: {format_}"] - self.seconds[f"round: head, {format_}"]


def random_block(config: LlamaConfig, directory: Path, rows: int, row_tokens: int) -> tuple[Checkpoint, CalibrationSet]:
    """Write a model of random weights with a small vocabulary, and make random rows for it."""
    config.vocab_size, config.tie_word_embeddings = _VOCABULARY, False
    tokens = torch.randint(3, _VOCABULARY - 1, (rows, row_tokens), generator=torch.Generator().manual_seed(0))
    write_checkpoint(directory, config, seed=0)
    text = CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random tokens", adds_bos=False)
    return Checkpoint.open(directory), text


def costs_of(checkpoint: Checkpoint, text: CalibrationSet, clock: Clock, work: Path, rates: int = 1) -> Costs:
    """Measure a model in both formats, and round it in both.

    Args:
        checkpoint: The model.
        text: The calibration rows.
        clock: Watches the functions; started anew.
        work: An empty directory.
        rates: Number of EXL2 bitrates to round.
    """
    clock.seconds.clear()
    _passes(checkpoint, text.tokens, clock)
    layout = file_layout(checkpoint)
    makers = [Exl2Curves(), GgufCurves(measured_types(), layout)]
    measured = measure_checkpoint(checkpoint, text, MeasureConfig(device="cpu"), makers, work / "measure")
    in_measuring = Counter({name: clock.seconds.pop(name) for name in _PARTS if name in clock.seconds})
    for number in range(rates):
        exl2 = make_exl2_plan(measured, bpw=4.0 + number / 2, head_bits=6)
        _round("exl2", checkpoint, measured, exl2, Exl2Rounder(exl2, measured), work / f"exl2-{number}", clock)
    gguf = make_gguf_plan(measured, bpw=5.0)
    _round(
        "gguf", checkpoint, measured, gguf, GgufRounder(gguf, measured, checkpoint, layout.rows), work / "gguf", clock
    )
    linears, _ = model_linears(language_model(checkpoint))
    return Costs(
        seconds=Counter(clock.seconds),
        measuring=in_measuring,
        weights=sum(each.in_features * each.out_features for each in linears),
        tokens=text.tokens.numel(),
    )


def _passes(checkpoint: Checkpoint, tokens: torch.Tensor, clock: Clock) -> None:
    # Both kinds of pass through all blocks, and nothing else.
    model = StreamedModel(language_model(checkpoint), device=torch.device("cpu"), dtype=torch.float32)
    hidden = model.embed(tokens)
    gradient = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    for index in range(model.block_count):
        with model.block(index):
            for batch in micro_batches(*tokens.shape):
                inputs = hidden[batch].clone().requires_grad_()
                with clock.step("forward pass"), torch.no_grad():
                    hidden[batch] = model.run_block(index, hidden[batch], batch.start)
                with clock.step("pass with backward"):
                    model.run_block(index, inputs, batch.start).backward(gradient[batch])


def _round(
    name: str, checkpoint: Checkpoint, measured: Measurement, plan: Plan, rounder: Rounder, work: Path, clock: Clock
) -> None:
    with clock.step(f"round: {name}"):
        round_model(checkpoint, measured, plan, rounder, RoundConfig(device="cpu"), work)
    clock.seconds[f"round: head, {name}"] += clock.seconds.pop("round: head", 0.0)


def file_layout(checkpoint: Checkpoint) -> Layout:
    """Return the layout of a GGUF file with a tensor for every linear, and one for the token embeddings."""
    source = language_model(checkpoint)
    linears, head = model_linears(source)
    tensors, rows = {}, {}
    table = (source.embedding_name, *source.shape(f"{source.embedding_name}.weight"))
    for number, (name, out, width) in enumerate(
        [*((each.name, each.out_features, each.in_features) for each in (*linears, head)), table]
    ):
        tensor = f"blk.0.{number}.weight"
        tensors[tensor] = StoredTensor(ggml_type("F32"), (out, width))
        rows[tensor] = TensorRows((name,), np.zeros(out, dtype=np.int64), np.arange(out))
    return Layout(tensors, RowMap(rows, {}), beside_bytes=4096)


def _table(costs: Costs, rate: float) -> Iterator[str]:
    # All that one model took, as Markdown.
    seconds, passes, two = costs.seconds, costs.passes, costs.two_passes
    yield "| step | CPU s | of its passes |"
    yield "| --- | --- | --- |"
    yield f"| passes (products alone: {6 * costs.weights * costs.tokens / rate:.1f} s) | {passes:.1f} | 1 |"
    yield f"| **measure** | {costs.measure:.1f} | **{costs.measure / passes:.2f}** |"
    for name in _STEPS:
        yield f"| {name} | {seconds[name]:.1f} | {seconds[name] / passes:.2f} |"
    for name, each in costs.measuring.items():
        yield f"| of it {name} | {each:.1f} | {each / passes:.2f} |"
    yield f"| two forward passes | {two:.1f} | 1 |"
    for name in ("exl2", "gguf"):
        yield f"| **round: {name}** | {costs.round(name):.1f} | **{costs.round(name) / two:.2f}** |"
        yield f"| round: head, {name} | {seconds[f'round: head, {name}']:.1f} | |"
    for name in _PARTS:
        if name in seconds:
            yield f"| of both {name} | {seconds[name]:.1f} | {seconds[name] / two:.2f} |"


def _growth(clock: Clock) -> Iterator[str]:
    # A base, and what it takes with more of one thing; its parts are those of a model like Qwen2.5-1.5B.
    yield "| width, MLP | tokens | blocks | bitrates | passes, s | measure | of passes | round to EXL2 | of passes |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    base = {"width": 1024, "tokens": 4096, "blocks": 1, "rates": 1}
    for changed in (
        *({"width": width} for width in (512, 1024, 2048, 4096)),
        *({"tokens": tokens} for tokens in (8192, 16384)),
        *({"blocks": blocks} for blocks in (2, 4)),
        *({"rates": rates} for rates in (2, 3, 4)),
    ):
        now = base | changed
        config = LlamaConfig(
            hidden_size=now["width"],
            intermediate_size=now["width"] * 7 // 2,
            num_hidden_layers=now["blocks"],
            num_attention_heads=now["width"] // 64,
            num_key_value_heads=now["width"] // 256,
            head_dim=64,
            max_position_embeddings=1024,
        )
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            model = random_block(config, work / "model", now["tokens"] // 1024, 1024)
            costs = costs_of(*model, clock, work, now["rates"])
        rounding, two = costs.round("exl2"), costs.two_passes * now["rates"]
        yield (
            f"| {now['width']}, {config.intermediate_size} | {now['tokens']} | {now['blocks']} | {now['rates']} "
            f"| {costs.passes:.1f} | {costs.measure:.1f} | {costs.measure / costs.passes:.2f} "
            f"| {rounding:.1f} | {rounding / two:.2f} |"
        )


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="qwen2.5-1.5b", show_default=True)
@click.option("--model", help="A real model instead: all of its blocks.")
@click.option("--growth", is_flag=True, help="Several small blocks instead.")
@click.option("--rows", default=32, show_default=True, help="Calibration rows.")
@click.option("--row-tokens", default=1024, show_default=True)
def main(preset: str, model: str | None, growth: bool, rows: int, row_tokens: int) -> None:
    """Print what measuring and rounding cost, in passes."""
    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory, float32_products(torch.device("cpu")):
        for kind in measured_types():  # ggml's tables, once a process
            with clock.step("tables"):
                encode(torch.ones(1, 256), kind, torch.ones(256))
        tables, rate = clock.seconds["tables"], _rate(clock)
        for watched, now in ((_STEPS, time.process_time), (_PARTS, time.thread_time)):
            for name, (module, path) in watched.items():
                clock.watch(name, module, path, now)
        click.echo(f"{rate / 1e9:.0f} GFLOP/s; search tables of ggml, once a process: {tables:.1f} s\n")
        if growth:
            for line in _growth(clock):
                click.echo(line)
            return
        work = Path(directory)
        if model is not None:
            checkpoint = open_model(model)
            text = calibration_rows(checkpoint, CalibrationConfig(rows=rows, row_tokens=row_tokens))
        else:
            config = PRESETS[preset]
            config.num_hidden_layers = 1
            checkpoint, text = random_block(config, work / "model", rows, row_tokens)
        costs = costs_of(checkpoint, text, clock, work)
        click.echo(f"{model or preset}: {costs.weights / 1e6:.1f} million weights, {costs.tokens} tokens\n")
        for line in _table(costs, rate):
            click.echo(line)


def _rate(clock: Clock) -> float:
    # Operations a second of a large product.
    large = torch.randn(2048, 2048)
    _ = large @ large
    with clock.step("rate"):
        for _ in range(4):
            large @ large
    return 4 * 2 * 2048**3 / clock.seconds["rate"]


if __name__ == "__main__":
    main()

"""What a GPU makes of the package: the same numbers as the CPU, seconds and memory of each step, ExLlamaV2's logits.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cuda:1 --preset llama-3-8b --layers 2

First a tiny model is measured, planned and rounded on the CPU and on the device, and both are compared. Then a linear
of real dimensions is rounded by loops over its rows and by the kernel that CUDA devices have for it, and a block or
more of real dimensions, with random weights and random tokens, is taken through every step, and each one's seconds and
largest memory on the device are printed. Last, where ExLlamaV2 is installed, it loads the tiny output on the device,
and its logits are compared with those of Transformers on the dequantized model. Ends with exit code 1 if anything is
further off than sums in another order explain.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.convert.dense import dequantize_model
from bpwise.convert.exl2.curves import Exl2Curves
from bpwise.convert.exl2.file.layout import ROW_MULTIPLE, WIDTHS, RowGroup, group_rows
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.exl2.plan.making import make_exl2_plan
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.exl2.rounding import feedback
from bpwise.convert.exl2.rounding.coupling import OUTPUT_SETS, RowRounder
from bpwise.convert.exl2.rounding.curves import SAMPLED_COLUMNS
from bpwise.convert.exl2.rounding.rounder import Exl2Rounder, tune_rounded
from bpwise.convert.gguf.curves import GgufCurves
from bpwise.convert.gguf.ggml.curves import measured_types
from bpwise.convert.gguf.plan.making import make_gguf_plan
from bpwise.convert.gguf.rounder import GgufRounder
from bpwise.convert.rounding import Refinement
from bpwise.eval.config import EvalConfig
from bpwise.eval.metrics.passes import last_hidden
from bpwise.eval.models import device_name
from bpwise.linalg.hessian import factor_hessian
from bpwise.linalg.outputs import OutputFeedback
from bpwise.linalg.products import float32_products
from bpwise.measure.curves import CurveMaker
from bpwise.measure.device import resolve_device
from bpwise.measure.measurement import Measurement
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.run import MeasureConfig, measure_checkpoint
from bpwise.measure.statistics.sketch import COUPLING_RANK
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.progress import silent
from bpwise.quantize.result import QuantizeResult
from bpwise.quantize.rounding.model import RoundConfig, round_model
from bpwise.quantize.run import quantize_model
from bpwise.tests.device.row_kernel import same_sums
from memory import PRESETS, write_checkpoint
from speed import file_layout
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

__all__ = ["main"]

DAMAGE_LIMIT = 0.15
"""Relative difference of a linear's damage: which tokens are summed hangs on the last bits of their weights."""

KL_LIMIT = 0.1
"""Relative difference of the outputs' KL divergence: ties in rounding, whose effects error feedback carries on."""

ERROR_LIMIT = 0.01
"""Relative difference of a linear's error by the kernel and by the loop: ties again."""

LOGITS_LIMIT = 0.02
"""Relative difference of ExLlamaV2's logits, in float16: see tests/gpu/test_exllamav2.py."""

_VOCABULARY = 2048
"""Of the model of real dimensions: it is the blocks that are looked at."""

_STEPS = {
    "measure: forward": ("bpwise.measure.passes", "MeasuringPasses._forward_block"),
    "measure: head": ("bpwise.measure.passes", "MeasuringPasses.head"),
    "measure: backward": ("bpwise.measure.passes", "MeasuringPasses._backward_block"),
    "measure: curves": ("bpwise.measure.passes", "MeasuringPasses._measured_stage"),
}
"""Steps of measuring, and the functions that do them."""


@dataclass
class Meter:
    """Seconds of each step, and the most memory that it took on the device."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the body as a step, or as one more part of it."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the steps of measuring wherever they are done."""
        undo: list[tuple[Any, str, Callable[..., Any]]] = []
        for name, (module, path) in _STEPS.items():
            owner, _, function = path.rpartition(".")
            place = getattr(importlib.import_module(module), owner)
            undo.append((place, function, getattr(place, function)))
            setattr(place, function, self._watched(name, undo[-1][2]))
        try:
            yield
        finally:
            for place, function, original in undo:
                setattr(place, function, original)

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.step(name):
                return function(*args, **kwargs)

        return watched

    def table(self) -> str:
        """Return a Markdown table."""
        rows = ["| step | seconds | peak GiB on the device |", "| --- | --- | --- |"]
        for name, seconds in self.seconds.items():
            peak = f"{self.peak_bytes[name] / 2**30:.2f}" if name in self.peak_bytes else "not known"
            rows.append(f"| {name} | {seconds:.2f} | {peak} |")
        return "\n".join(rows)


@click.command(context_settings={"show_default": True})
@click.option("--device", default="cuda", help="cuda, cuda:N, mps; cpu to try the benchmark out.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="llama-3.2-1b", help="Dimensions to measure with.")
@click.option("--layers", type=click.IntRange(1), default=1, help="Decoder blocks of these dimensions.")
@click.option("--rows", type=click.IntRange(2), default=32, help="Calibration rows.")
@click.option("--row-tokens", type=click.IntRange(16), default=1024)
def main(device: str, preset: str, layers: int, rows: int, row_tokens: int) -> None:
    """Compare a device with the CPU, and measure its steps."""
    where = resolve_device(device)
    click.echo(f"{device_name(where)}, PyTorch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        tiny, found = _tiny_runs(work, device)
        same = _compared(tiny, found)
        same &= _kernel_agrees(PRESETS[preset], where)
        click.echo(f"\n{preset}, {layers} block(s), {rows} x {row_tokens} tokens:\n")
        meter = Meter(where)
        _real_run(work / "real", PRESETS[preset], layers, _random_rows(rows, row_tokens, _VOCABULARY), meter)
        click.echo(meter.table())
        click.echo()
        same &= _exllamav2_agrees(work, where)
    sys.exit(0 if same else 1)


def _random_rows(rows: int, row_tokens: int, vocabulary: int) -> CalibrationSet:
    tokens = torch.randint(3, vocabulary - 1, (rows, row_tokens), generator=torch.Generator().manual_seed(0))
    return CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random tokens", adds_bos=False)


def _makers(checkpoint: Checkpoint) -> list[CurveMaker]:
    makers: list[CurveMaker] = [Exl2Curves()]
    return [*makers, GgufCurves(measured_types(), file_layout(checkpoint))] if measured_types() else makers


def _tiny_runs(work: Path, device: str) -> tuple[dict[str, Measurement], dict[str, QuantizeResult]]:
    # A measurement in all formats, and an EXL2 output from one of its own, of the CPU and of the device.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    config = LlamaConfig.from_dict({**PRESETS["tiny"].to_dict(), **sizes, "num_key_value_heads": 2})
    write_checkpoint(work / "tiny", config, seed=0, scale=0.1)
    checkpoint = Checkpoint.open(work / "tiny")
    measured, made = {}, {}
    for role, name in (("cpu", "cpu"), ("device", device)):
        rows = _random_rows(16, 128, config.vocab_size)
        options = MeasureConfig(device=name)
        measured[role] = measure_checkpoint(checkpoint, rows, options, _makers(checkpoint), work / f"{role}.measuring")
        made[role] = quantize_model(
            checkpoint,
            work / f"{role}-exl2",
            bpw=4.0,
            calibration=rows,
            options=Exl2Options(head_bits=6),
            measure=options,
            evaluate=EvalConfig(rows=8, row_tokens=128, device="cpu"),
        )
    return measured, made


def _compared(measured: dict[str, Measurement], made: dict[str, QuantizeResult]) -> bool:
    cpu, other = measured["cpu"], measured["device"]
    click.echo("| compared with the CPU | relative difference | limit |\n| --- | --- | --- |")
    same = True
    for name in cpu.curves:
        worst = max(_difference(cpu, other, name, linear.name) for linear in (*cpu.linears, cpu.head))
        same &= worst <= DAMAGE_LIMIT
        click.echo(f"| largest of a linear's damage, {name} | {worst:.2e} | {DAMAGE_LIMIT} |")
    kl = [made[role].comparison for role in ("cpu", "device")]
    expected, found = (each.summary.kl_nats.value for each in kl if each is not None)
    moved = abs(found / expected - 1)
    same &= moved <= KL_LIMIT
    click.echo(f"| KL divergence of the output ({expected:.3e} nats per token) | {moved:.2e} | {KL_LIMIT} |")
    plans = [made[role].plan for role in ("cpu", "device")]
    widths = [[each.group_bits for each in plan.linears] for plan in plans if isinstance(plan, Exl2Plan)]
    equal = sum(one == two for one, two in zip(*widths, strict=True))
    click.echo(f"\n{equal} of {len(widths[0])} linears have the same plan.")
    return same


def _difference(cpu: Measurement, other: Measurement, format_: str, linear: str) -> float:
    expected, found = (
        np.where(np.isfinite(values), values, 0).reshape(-1, values.shape[-1]).sum(axis=0)
        for values in (each.curves[format_].linears[linear]["damage_nats"] for each in (cpu, other))
    )
    return float((np.abs(found - expected) / np.maximum(expected, 1e-30)).max())


def _kernel_agrees(preset: LlamaConfig, device: torch.device) -> bool:
    # The kernel against the sums that it is to compute, bit for bit; a whole linear by loops and by the kernel.
    kernel = feedback.row_kernel(device, ROW_MULTIPLE)
    if kernel is None:
        click.echo("\nThe kernel that rounds row groups: not tried; it needs a CUDA device and Triton.")
        return True
    rows, columns = preset.hidden_size, preset.intermediate_size
    rng = torch.Generator().manual_seed(0)
    inputs, weight, seen, gains = (
        torch.randn(size, generator=rng)
        for size in ((2 * rows, rows), (rows, columns), (ROW_MULTIPLE, COUPLING_RANK), (COUPLING_RANK, columns))
    )
    group = weight[:ROW_MULTIPLE] * 4, weight[:ROW_MULTIPLE, :ROW_MULTIPLE].tril(-1) / 8
    arguments = (*(each.contiguous() for each in group), torch.full((columns,), 8.0), seen, gains / 8)
    found = kernel(*(each.to(device) for each in arguments)).cpu()
    different = int((found != same_sums(*arguments)).sum())
    click.echo(f"\nOf {found.numel()} codes of a row group {different} are not what the kernel is to compute.\n")

    inputs, weight, directions = (each.to(device) for each in (inputs, weight / 32, gains.T / 2 / COUPLING_RANK**0.5))
    fisher, order = torch.ones(columns, device=device), torch.arange(rows, device=device)
    upper = factor_hessian(inputs.T @ inputs / len(inputs), 0.01).upper
    counts = group_rows(rows, ROW_MULTIPLE)
    groups, outputs = [RowGroup(4, count) for count in counts], OutputFeedback.of(fisher, directions, OUTPUT_SETS)
    sampled, shares = weight[:, :SAMPLED_COLUMNS], fisher[:SAMPLED_COLUMNS]
    click.echo(f"| {rows} x {columns} | s by loops | s by the kernel | error, relative difference | limit |")
    click.echo("| --- | --- | --- | --- | --- |")
    same = different == 0
    for name, work in {
        "rounding": lambda: feedback.round_linear(weight, upper, groups, order, fisher)[1],
        "rounding, outputs coupled": lambda: feedback.round_linear(weight, upper, groups, order, fisher, outputs)[1],
        "curves": lambda: feedback.errors_by_group(sampled, upper, counts, WIDTHS, shares),
    }.items():
        (expected, loop_seconds), (error, seconds) = (_timed(work, by, device) for by in (None, kernel))
        moved = abs(error / expected - 1)
        same &= moved <= ERROR_LIMIT
        click.echo(f"| {name} | {loop_seconds:.3f} | {seconds:.3f} | {moved:.2e} | {ERROR_LIMIT} |")
    return same


def _timed(work: Callable[[], Tensor], kernel: RowRounder | None, device: torch.device) -> tuple[float, float]:
    # The sum of what the second of two runs returns, and its seconds: the first one compiles.
    before = feedback.row_kernel
    feedback.row_kernel = lambda _device, _rows: kernel
    try:
        with float32_products(device):
            work().sum().item()
            start = time.perf_counter()
            total = work().sum().item()
            return total, time.perf_counter() - start
    finally:
        feedback.row_kernel = before


def _real_run(work: Path, preset: LlamaConfig, layers: int, rows: CalibrationSet, meter: Meter) -> None:
    changes = {"num_hidden_layers": layers, "vocab_size": _VOCABULARY, "tie_word_embeddings": False}
    write_checkpoint(work / "model", LlamaConfig.from_dict({**preset.to_dict(), **changes}), seed=0)
    checkpoint, device = Checkpoint.open(work / "model"), str(meter.device)
    with meter.watching():
        measured = measure_checkpoint(
            checkpoint, rows, MeasureConfig(device=device), _makers(checkpoint), work / "measure"
        )
    options = RoundConfig(device=device)
    exl2 = make_exl2_plan(measured, bpw=4.0, head_bits=6)
    with meter.step("round: exl2"):
        rounded = round_model(checkpoint, measured, exl2, Exl2Rounder(exl2, measured), options, work / "exl2")
    with meter.step("tune: exl2"):
        how = Refinement(measurement=measured, device=meter.device, offload_dir=None, progress=silent)
        tune_rounded(rounded, language_model(checkpoint), how)
    if "gguf" in measured.curves:
        gguf = make_gguf_plan(measured, bpw=4.5)
        with meter.step("round: gguf"):
            rounder = GgufRounder(gguf, measured, checkpoint, file_layout(checkpoint).rows)
            round_model(checkpoint, measured, gguf, rounder, options, work / "gguf")
    with meter.step("evaluate: one model's passes"):
        last_hidden(StreamedModel(checkpoint, device=meter.device, dtype=torch.bfloat16), rows.tokens, "model", silent)


def _exllamav2_agrees(work: Path, device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec("exllamav2") is None:
        click.echo("ExLlamaV2: not tried; it needs a CUDA device and `pip install exllamav2`.")
        return True
    exllamav2 = importlib.import_module("exllamav2")
    config = exllamav2.ExLlamaV2Config(str(work / "device-exl2"))
    # Its SDPA path leaves the causal mask out (0.3.2, attn.py); plain attention has it and needs no other package.
    config.no_flash_attn = config.no_xformers = config.no_sdpa = True
    config.max_input_len = 256
    model = exllamav2.ExLlamaV2(config)
    model.load()
    ids = torch.randint(3, PRESETS["tiny"].vocab_size - 1, (1, 120), generator=torch.Generator().manual_seed(1))
    cache = exllamav2.ExLlamaV2Cache(model, max_seq_len=256)
    found = model.forward(ids, cache)[0, :, : PRESETS["tiny"].vocab_size].float().cpu()
    dequantize_model(work / "device-exl2", work / "dense")
    reference = AutoModelForCausalLM.from_pretrained(work / "dense", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(ids).logits[0]
    off = float((found - expected).norm() / expected.norm())
    click.echo(f"ExLlamaV2 loads the output; its logits are off by {off:.2e} (limit {LOGITS_LIMIT}).")
    return off <= LOGITS_LIMIT


if __name__ == "__main__":
    main()

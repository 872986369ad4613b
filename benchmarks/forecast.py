"""How far the forecast of a run's time is from what the run takes, step by step.

    taskset -c 0 python benchmarks/forecast.py models/SmolLM2-135M-Instruct-off-grid wide-llama small-mixtral

Models are quantized and evaluated on few rows. ``wide-llama`` and ``small-mixtral`` have random weights, and the first
model's tokenizer. Times are processor seconds, of all threads and of other processes that
are started, in the run as where the device is timed: what else runs on the machine does not count. On one core they are
the seconds of a machine that does nothing else; of several, the forecast would count those side by side once.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import bpwise.quantize.output
import click
import torch
from bpwise import CalibrationConfig, EvalConfig, MeasureConfig, open_model, quantize_model
from bpwise.checkpoint.files.paths import work_beside
from bpwise.convert.conversion import Target
from bpwise.convert.registry import formats
from bpwise.linalg.work import Rates
from bpwise.progress import seconds_by_step
from bpwise.quantize.checks import forecast_outputs
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.times import with_times
from bpwise.quantize.timing.costs import StepClock
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

__all__ = ["main"]

_RANDOM = {
    "wide-llama": LlamaConfig(
        hidden_size=768, intermediate_size=6144, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4
    ),
    "small-mixtral": MixtralConfig(
        hidden_size=384,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=8,
    ),
}

_STEPS = {"prepare": "prepare", "measure": "measure", "round": "round", "tune": "round", "write and verify": "write"}
"""Steps of the forecast by those of the run; others have their own name, and no forecast."""


def _processor_seconds() -> float:
    return sum(os.times()[:4])


class _ProcessorClock(StepClock):
    """Counts processor seconds by step."""

    seconds: ClassVar[Counter[str]] = Counter()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the body."""
        start = _processor_seconds()
        with super().step(name):
            yield
        self.seconds[_STEPS.get(name, name)] += _processor_seconds() - start


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--format", "format_name", type=click.Choice(list(formats())), default="exl2", show_default=True)
@click.option("--bpw", default=4.5, show_default=True)
@click.option("--rows", default=8, show_default=True, help="Calibration and evaluation rows.")
@click.option("--row-tokens", default=512, show_default=True)
def main(models: tuple[str, ...], format_name: str, bpw: float, rows: int, row_tokens: int) -> None:
    """Print what quantizing each of MODELS was expected to take, what it took, and the ratio."""
    torch.set_num_threads(1)
    bpwise.quantize.output.StepClock = _ProcessorClock  # type: ignore[misc]
    rates = Rates(torch.device("cpu"), time.process_time)
    evaluate = EvalConfig(rows=rows, row_tokens=row_tokens, device="cpu")
    config = QuantizeConfig(
        target=Target(bpw=bpw),
        options=formats()[format_name].Options(),
        measure=MeasureConfig(calibration=CalibrationConfig(rows=rows, row_tokens=row_tokens), device="cpu"),
        evaluate=evaluate,
    )
    click.echo(f"{format_name} at {bpw:g} bpw, {rows} x {row_tokens} tokens: forecast / processor seconds = ratio\n")
    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory) / f"out{formats()[format_name].suffix}"
            source = _random(model, Path(directory) / "model", models[0]) if model in _RANDOM else model
            expected = _expected(source, output, config, rates)
            _ProcessorClock.seconds.clear()
            quantize_model(source, output, bpw=bpw, options=config.options, measure=config.measure, evaluate=evaluate)
        taken = _ProcessorClock.seconds
        parts = [_ratio(step, expected[step], taken[step]) for step in expected]
        whole = _ratio("**in all**", sum(expected.values()), sum(taken.values()))
        click.echo(f"| {Path(model).name} | {' | '.join([*parts, whole])} |")


def _random(name: str, directory: Path, tokenizer: str) -> str:
    # A model of random weights; returns its directory.
    config, tokens = _RANDOM[name], AutoTokenizer.from_pretrained(tokenizer)
    config.vocab_size, config.dtype = len(tokens), "bfloat16"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokens.save_pretrained(directory)
    return str(directory)


def _expected(model: str, output: Path, config: QuantizeConfig, rates: Rates) -> dict[str, float]:
    conversion, work = config.conversion(open_model(model)), work_beside(output)
    forecasts = forecast_outputs(conversion, {output: config.target}, config.measure, config.evaluate, work)
    start = time.process_time()
    timed = with_times(forecasts, conversion, config, work, known=None, rates=lambda _: rates)
    click.echo(f"forecast in {time.process_time() - start:.1f} s", err=True)
    return seconds_by_step(timed[output].parts)


def _ratio(step: str, expected: float, taken: float) -> str:
    return f"{step} {expected:.0f} / {taken:.0f} = {expected / max(taken, 1e-9):.2f}"


if __name__ == "__main__":
    main()

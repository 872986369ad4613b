"""What a model is calibrated on, and what that does to text of other kinds.

    python benchmarks/calibration_text.py MODEL --text prose=c4.txt --text code=code.txt --calibration self

A model is measured on each choice of calibration text (the default text is always among them) and quantized to EXL2 at
one bitrate. Reported is the mean KL divergence from the original on each text that is given, and its ratio to that with
the default text; the error of a ratio is that of the two on the same sequences.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.opening import open_any
from bpwise.eval.comparison import compare_with, evaluation_rows
from bpwise.eval.config import EvalConfig
from bpwise.eval.models import vocab_size_of
from bpwise.eval.original import OriginalRun, run_original
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from bpwise.measure.text.tokenizer import load_tokenizer
from bpwise.quantize.run import quantize_model

__all__ = ["main"]

_DEFAULT = "default"


@click.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, required=True, help="Held-out text, as NAME=PATH.")
@click.option("--calibration", "choices", multiple=True, default=("self",), show_default=True)
@click.option("--bpw", default=4.0, show_default=True)
@click.option("--rows", default=16, show_default=True)
@click.option("--row-tokens", default=512, show_default=True)
@click.option("--eval-rows", default=8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    texts: tuple[str, ...],
    choices: tuple[str, ...],
    bpw: float,
    rows: int,
    row_tokens: int,
    eval_rows: int,
    seed: int,
) -> None:
    """Print the KL divergence of MODEL on each text, for each choice of what it is calibrated on."""
    source = open_model(model)
    tokenizer = load_tokenizer(source.directory)
    runs: dict[str, OriginalRun] = {}
    for name, _, path in (text.partition("=") for text in texts):
        judged = EvalConfig(text=path, rows=eval_rows, row_tokens=row_tokens)
        held_out = evaluation_rows(tokenizer, judged, vocab_size=vocab_size_of(source))
        runs[name] = run_original(source, held_out, judged, tokenizer=tokenizer)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, choice in enumerate((_DEFAULT, *choices)):
            output = Path(directory) / f"model-{number}"
            text = CalibrationConfig(
                source=None if choice == _DEFAULT else choice, rows=rows, row_tokens=row_tokens, seed=seed
            )
            saved = CalibrationSet.load(Path(choice)) if choice.endswith(".safetensors") else None
            measure = MeasureConfig(calibration=text, seed=seed)
            quantize_model(source, output, bpw=bpw, calibration=saved, measure=measure, evaluate=False)
            found[choice] = {}
            for name, run in runs.items():
                kl = compare_with(run, open_any(output)).summary.kl_nats
                found[choice][name] = kl.value, kl.standard_error or float("nan")
                click.echo(f"{choice}: {name} {kl.value:.5f} ± {kl.standard_error:.5f}", err=True)
    for line in _table(found):
        click.echo(line)


def _table(found: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
    names = list(found[_DEFAULT])
    lines = ["| calibrated on | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for choice, kls in found.items():
        cells = []
        for name in names:
            value, error = kls[name]
            ratio = "" if choice == _DEFAULT else f", {value / found[_DEFAULT][name][0]:.2f}x"
            cells.append(f"{value:.4f} ± {error:.4f}{ratio}")
        lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()

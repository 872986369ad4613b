"""Quantize one model to several bitrates from one measurement, through the Python interface.

    python examples/quantize.py MODEL OUT
    python examples/quantize.py MODEL OUT --bpw 8.0,6.0,4.5,3.0 --head-bits 8

The command ``bpwise quantize MODEL OUT --bpw 8.0,6.0,4.5,3.0`` does the same. Interrupted? Run it again: it resumes.
"""

from __future__ import annotations

from pathlib import Path

import bpwise
import click

__all__ = ["main"]


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--bpw", default="6.0,4.0,3.0", show_default=True, help="Bitrates, separated by commas.")
@click.option("--head-bits", default=6, show_default=True, help="Bits of the output head.")
@click.option("--rows", default=32, show_default=True, help="Calibration rows.")
@click.option("--row-tokens", type=int, help="Tokens in each row.  [default: 1024, or the model's context]")
def main(model: str, output: Path, bpw: str, head_bits: int, rows: int, row_tokens: int | None) -> None:
    """Quantize MODEL (a directory or a Hub id) to a model directory in OUTPUT for every bitrate."""
    rates = [float(rate) for rate in bpw.split(",")]
    try:
        result = bpwise.quantize_series(
            model,
            output,
            rates,
            options=bpwise.Exl2Options(head_bits=head_bits),
            measure=bpwise.MeasureConfig(calibration=bpwise.CalibrationConfig(rows=rows, row_tokens=row_tokens)),
            evaluate=bpwise.EvalConfig(rows=4, row_tokens=row_tokens),
            progress=bpwise.ProgressBars(),
        )
    except bpwise.BpwiseError as error:
        raise click.ClickException(str(error)) from error
    for made in result.outputs:
        click.echo(
            f"{made.bpw:.4f} bpw  {made.file_bytes / 1e6:9.1f} MB  predicted {made.predicted_nats:.5f}  "
            f"measured {made.kl:.5f} nats/token"
        )
    click.echo(f"report -> {result.report}", err=True)


if __name__ == "__main__":
    main()

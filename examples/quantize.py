"""Quantize one model to several bitrates from one measurement, through the Python interface."""

from __future__ import annotations

from pathlib import Path

import bpwise
import click


@click.command()
@click.argument("model")
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
@click.option("--bpw", default="6.0,4.0,3.0", show_default=True, help="Bitrates, separated by commas.")
@click.option("--head-bits", default=6, show_default=True, help="Bits of the output head.")
@click.option("--rows", default=32, show_default=True, help="Calibration rows.")
@click.option("--row-tokens", default=1024, show_default=True, help="Tokens in each row.")
def main(model: str, output: Path, bpw: str, head_bits: int, rows: int, row_tokens: int) -> None:
    """Quantize MODEL (a directory or a Hub id) to OUTPUT/BPWbpw for every bitrate."""
    calibration = bpwise.CalibrationConfig(rows=rows, row_tokens=row_tokens)
    measuring = bpwise.MeasureConfig(calibration=calibration)
    measurement = output / "measurement.safetensors"
    if not measurement.exists():
        bpwise.measure(model, measurement, measuring)
    for rate in map(float, bpw.split(",")):
        config = bpwise.QuantizeConfig(
            bpw=rate,
            head_bits=head_bits,
            measure=measuring,
            evaluate=bpwise.EvalConfig(rows=4, row_tokens=row_tokens),
        )
        result = bpwise.quantize(model, output / f"{rate:g}bpw", config, measurement=measurement)
        assert result.comparison is not None
        click.echo(
            f"{result.verification.decoder_bpw:.4f} bpw  {result.verification.file_bytes / 2**20:9.1f} MiB  "
            f"predicted {result.plan.damage_nats:.5f}  "
            f"measured {result.comparison.summary.kl_nats.value:.5f} nats/token"
        )


if __name__ == "__main__":
    main()

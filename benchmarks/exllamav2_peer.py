"""ExLlamaV2's own converter on a CPU, on the calibration tokens that bpwise takes: the peer to compare with.

    python benchmarks/exllamav2_peer.py MODEL OUT --exllamav2 PACKAGE --bpw 4.0 --head-bits 6

PACKAGE is the folder ``exllamav2`` of version 0.3.2, unpacked:

    pip download --no-deps exllamav2==0.3.2 && unzip exllamav2-0.3.2-py3-none-any.whl -d build/exl

Its measurement, its choice of widths, its rounding and its file writer run as they are; ``exllamav2_standin.py`` takes
the place of the compiled extension and of CUDA. The measurement stays in the work directory and serves other sizes; a
run that was cut off goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bpwise.checkpoint.files.atomic import atomic_directory, write_json
from bpwise.checkpoint.files.schemas import read_json
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.exl2.file.config import exl2_config
from bpwise.convert.opening import verify_model
from bpwise.errors import BpwiseError, ConfigError, WorkDirectoryError
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig, CalibrationSet
from safetensors.torch import save_file

__all__ = ["HEAD_BITS", "VERSION", "PeerConfig", "PeerResult", "convert", "main"]

VERSION = "0.3.2"
"""The version of ExLlamaV2 whose compiled extension the stand-in follows."""

HEAD_BITS = (2, 3, 4, 5, 6, 8)
"""Widths of the output head that its converter knows."""

_STANDIN = Path(__file__).with_name("exllamav2_standin.py")
_MEASUREMENT = "measurement.json"
_LOG_TAIL_LINES = 8

# Lines of the converter's output that tell how far it is, and what is shown of them.
_PROGRESS = re.compile(
    r" -- (?:Layer: (?P<layer>.*)|(?P<stage>Measuring quantization|Optimizing\.|Quantizing|Compiling))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """What ExLlamaV2 is asked for.

    Attributes:
        package: The folder ``exllamav2``.
        bpw: Target for the decoder in bits per weight. Its optimizer meets it from below.
        head_bits: Width of the output head, one of ``HEAD_BITS``.
        measurement_rows: Calibration rows that widths are measured on, evenly spread over all of them.
        seed: Seed of its simulated annealing.
    """

    package: Path
    bpw: float
    head_bits: int = 6
    measurement_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense, or the package is not there.
        """
        if not 2 <= self.bpw <= 8:
            raise ConfigError(f"bpw must be from 2 to 8, got {self.bpw}.")
        if self.head_bits not in HEAD_BITS:
            raise ConfigError(f"head_bits must be one of {HEAD_BITS}, got {self.head_bits}.")
        if self.measurement_rows < 1:
            raise ConfigError(f"measurement_rows must be at least 1, got {self.measurement_rows}.")
        version = self.package / "version.py"
        if not version.is_file():
            raise ConfigError(f"{self.package}: no version.py, expected the unpacked folder 'exllamav2'.")
        if f'"{VERSION}"' not in version.read_text():
            raise ConfigError(f"{version}: got {version.read_text().strip()}, expected version {VERSION}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """What came of it.

    Attributes:
        directory: The EXL2 directory.
        decoder_bpw: Bits per weight of all decoder linears, overheads included.
        head_bpw: The same of the output head.
        file_bytes: Size of the weights' files.
        measure_seconds: Wall time of the measurement; 0 if one was at hand.
        quantize_seconds: Wall time of all else: choosing widths, quantizing, writing.
    """

    directory: Path
    decoder_bpw: float
    head_bpw: float
    file_bytes: int
    measure_seconds: float
    quantize_seconds: float


def convert(
    model: str | Path, out: Path, config: PeerConfig, calibration: CalibrationSet, work: Path, *, quiet: bool = False
) -> PeerResult:
    """Have ExLlamaV2 convert a model.

    Args:
        model: A local directory or a Hub id.
        out: The EXL2 directory to make; it must not exist, or be empty.
        config: What to ask for.
        calibration: The rows, for its measurement as for its quantization.
        work: Work directory. Keeps the measurement, which goes for this model, these rows and this number of
            measurement rows; with others it is made anew.
        quiet: Do not tell on stderr how far it is.

    Returns:
        The directory, its size and the time.

    Raises:
        BpwiseError: The model cannot be read, ``out`` is occupied, ExLlamaV2 failed (its output is in
            ``WORK/convert.log``), or what it wrote breaks the format's rules.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorkDirectoryError(f"{out}: in the way. Expected nothing or an empty directory. Choose another path.")
    checkpoint = open_model(model)
    work = work.resolve()
    rows = _prepare(checkpoint, calibration, config, work)
    run = _Run(config, work, rows, quiet)
    start = time.monotonic()
    if not (work / _MEASUREMENT).exists():
        run.measure()
    measured = time.monotonic()
    job = work / f"job-{config.bpw:g}-{config.head_bits}-{config.seed}"
    compiled = run.quantize(job)
    found = verify_model(compiled)
    with atomic_directory(out) as temporary:
        shutil.copytree(compiled, temporary, dirs_exist_ok=True)
    shutil.rmtree(job)
    return PeerResult(
        directory=out,
        decoder_bpw=found.rates["decoder"],
        head_bpw=found.rates["head"],
        file_bytes=found.file_bytes,
        measure_seconds=measured - start,
        quantize_seconds=time.monotonic() - measured,
    )


class _Run:
    """Starts the converter with what all its runs share."""

    def __init__(self, config: PeerConfig, work: Path, rows: Sequence[str], quiet: bool) -> None:
        self._config = config
        self._work = work
        self._rows = rows
        self._quiet = quiet

    def measure(self) -> None:
        """Make the measurement."""
        job = self._work / "measure"
        measurement = job / _MEASUREMENT
        self._run(job, ["-om", str(measurement)])
        measurement.replace(self._work / _MEASUREMENT)
        shutil.rmtree(job)

    def quantize(self, job: Path) -> Path:
        """Quantize with the measurement, in the folder ``job``, and return the finished model's folder in it."""
        compiled = job / "compiled"
        if not _finished(job):
            # Files of a run that was cut off while it wrote them.
            shutil.rmtree(compiled, ignore_errors=True)
        options = ["-m", str(self._work / _MEASUREMENT), "-cf", str(compiled)]
        self._run(job, [*options, "-b", str(self._config.bpw), "-hb", str(self._config.head_bits)])
        return compiled

    def _run(self, job: Path, options: Sequence[str]) -> None:
        # A job that is finished would say so and fail.
        if not _finished(job):
            self._start(job, options)

    def _start(self, job: Path, options: Sequence[str]) -> None:
        command = [sys.executable, "-u", str(_STANDIN), str(self._config.package.resolve().parent)]
        command += [str(self._config.seed), "-i", str(self._work / "model"), "-o", str(job), *self._rows, *options]
        log = self._work / "convert.log"
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        with (
            log.open("a", encoding="utf-8") as file,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment
            ) as process,
        ):
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines = [*lines[1 - _LOG_TAIL_LINES :], line]
                self._tell(line)
        if process.returncode or not _finished(job):
            raise BpwiseError(f"ExLlamaV2's converter failed, its output is in {log}. It ends:\n{''.join(lines)}")

    def _tell(self, line: str) -> None:
        match = None if self._quiet else _PROGRESS.match(line)
        if match:
            click.echo(f"  {match['layer']}" if match["layer"] else f"ExLlamaV2: {match['stage'].lower()}", err=True)


def _finished(job: Path) -> bool:
    # Some of its errors end the process without an exit status.
    job_file = job / "job_new.json"
    return job_file.exists() and read_json(job_file, WorkDirectoryError).get("progress") == "finished"


def _prepare(checkpoint: Checkpoint, calibration: CalibrationSet, config: PeerConfig, work: Path) -> list[str]:
    """Write the model and the rows as the converter reads them, and return its options for the rows.

    What other tokens or another model left in the work directory goes.
    """
    rows, row_tokens = calibration.tokens.shape
    measurement_rows = min(config.measurement_rows, rows)
    identity: dict[str, Any] = {
        "exllamav2": VERSION,
        "model": checkpoint.fingerprint,
        "calibration": calibration.fingerprint,
        "measurement_rows": measurement_rows,
    }
    identity_file = work / "identity.json"
    if not identity_file.exists() or read_json(identity_file, WorkDirectoryError) != identity:
        (work / _MEASUREMENT).unlink(missing_ok=True)
        for job in (work / "measure", *work.glob("job-*")):
            shutil.rmtree(job, ignore_errors=True)
        write_json(identity_file, identity)
    _link_model(checkpoint, work / "model")
    tokens = work / "calibration.safetensors"
    save_file({"input_ids": calibration.tokens.contiguous()}, tokens)
    options = {"-c": tokens, "-r": rows, "-mr": measurement_rows, "-l": row_tokens, "-ml": row_tokens}
    return [str(part) for option in options.items() for part in option]


def _link_model(checkpoint: Checkpoint, target: Path) -> None:
    # Its files by links, but for a config with the keys that ExLlamaV2 reads: it would take a rope_theta that stands
    # only in rope_parameters for 10000.
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in checkpoint.directory.iterdir():
        if file.is_file() and file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    config = exl2_config(checkpoint.config, {}, tied_embeddings=checkpoint.tied_embeddings)
    del config["quantization_config"]
    write_json(target / "config.json", config)


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--exllamav2",
    "package",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help=f"The unpacked folder 'exllamav2' of version {VERSION}.",
)
@click.option("--bpw", type=float, required=True, help="Decoder bits per weight, overheads included.")
@click.option("--head-bits", type=click.Choice([str(bits) for bits in HEAD_BITS]), default="6", help="Output head.")
@click.option("--rows", type=click.IntRange(1), default=32, help="Calibration rows.")
@click.option("--row-tokens", type=click.IntRange(2), default=1024, help="Tokens in each row.")
@click.option("--measurement-rows", type=click.IntRange(1), default=16, help="How many of them it measures on.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Chooses rows, and its simulated annealing.")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/exllamav2"),
    help="Keeps the measurement and the converter's output.",
)
def main(
    model: str,
    out: Path,
    package: Path,
    bpw: float,
    head_bits: str,
    rows: int,
    row_tokens: int,
    measurement_rows: int,
    seed: int,
    work_dir: Path,
) -> None:
    """Have ExLlamaV2 convert MODEL, a directory or a Hub id, to the EXL2 directory OUT."""
    try:
        config = PeerConfig(
            package=package, bpw=bpw, head_bits=int(head_bits), measurement_rows=measurement_rows, seed=seed
        )
        calibration = calibration_rows(
            open_model(model), CalibrationConfig(rows=rows, row_tokens=row_tokens, seed=seed)
        )
        result = convert(model, out, config, calibration, work_dir)
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"size        {result.file_bytes / (1 << 20):.1f} MiB")
    click.echo(f"decoder     {result.decoder_bpw:.4f} bpw (asked {bpw:g}), head {result.head_bpw:.4f} bpw")
    click.echo(f"measure     {result.measure_seconds:10.1f} s")
    click.echo(f"quantize    {result.quantize_seconds:10.1f} s")
    click.echo(f"output      {result.directory}")


if __name__ == "__main__":
    main()

"""What a change of the code did to quality: KL divergence of this version's models over that of an older one's.

    git worktree add ../older 3f39a10
    python benchmarks/versions.py ../older MODEL
    python benchmarks/versions.py ../older MODEL --exl2 8,4,2.5 --gguf 6.5,5,4.3 --seeds 3

Both versions measure, plan and round the same model from the same calibration rows, each by its own command line in a
process of its own, to the same bits per weight. This version judges both on the same held-out rows, so that the
ratio of the two mean divergences is known better than either: its interval is that of a bootstrap over the rows, each
averaged over all seeds.

Finished results stay in the work directory, so that a run that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree

import click
import numpy as np
from bpwise.checkpoint.files.paths import work_beside
from bpwise.checkpoint.source.original import open_model
from bpwise.convert.registry import require_format
from bpwise.errors import BpwiseError
from bpwise.eval.config import EvalConfig
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.judge import Judge

__all__ = ["Result", "main", "ratio_interval", "table"]

_THIS = Path(__file__).parents[1]
_DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One model by one version.

    Attributes:
        version: ``old`` or ``new``.
        format: Name of the format.
        bpw: Bits per weight that were asked for.
        seed: Of calibration rows and probes.
        kl_nats: Mean KL divergence from the original of every held-out row, nats per token.
    """

    version: str
    format: str
    bpw: float
    seed: int
    kl_nats: list[float]


def ratio_interval(new: Sequence[float], old: Sequence[float], draws: int = _DRAWS) -> tuple[float, float, float]:
    """Return the ratio of two means over the same rows, and the ends of its 95 % interval.

    Args:
        new: A number for each row.
        old: The other's.
        draws: Drawings of the bootstrap over rows (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3).

    Returns:
        Ratio, 2.5 % and 97.5 % quantile.
    """
    above, below = np.asarray(new), np.asarray(old)
    drawn = np.random.default_rng(0).integers(len(above), size=(draws, len(above)))
    low, high = np.quantile(above[drawn].mean(axis=1) / below[drawn].mean(axis=1), (0.025, 0.975))
    return float(above.mean() / below.mean()), float(low), float(high)


def table(results: Sequence[Result]) -> str:
    """Return all sizes that both versions have made as Markdown, each over all seeds."""
    of = {(each.version, (each.format, each.bpw, each.seed)): each.kl_nats for each in results}
    lines = ["| format | bpw | seeds | KL, old | new | new / old | 95 % interval |", "| --- |" + " --- |" * 6]
    for format_, bpw in dict.fromkeys((each.format, each.bpw) for each in results):
        places = [(format_, bpw, seed) for seed in sorted({each.seed for each in results})]
        places = [place for place in places if ("old", place) in of and ("new", place) in of]
        if not places:
            continue
        # Rows are the same for all seeds: each counts once.
        old, new = (np.mean([of[version, place] for place in places], axis=0).tolist() for version in ("old", "new"))
        ratio, low, high = ratio_interval(new, old)
        lines.append(
            f"| {format_} | {bpw:g} | {len(places)} | {np.mean(old):.6f} | {np.mean(new):.6f} "
            f"| {ratio:.3f} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)


class _Comparison:
    """Two versions on one model; what is finished is kept in a directory."""

    def __init__(self, older: Path, model: str, work: Path, evaluate: EvalConfig) -> None:
        self._model = model
        self._work = work
        self._checkpoint = open_model(model)
        self._judge = Judge(self._checkpoint, evaluate)
        self._paths = {"old": self._path("old", older), "new": self._path("new", _THIS)}
        self._results = work / "results.jsonl"

    def results(self) -> list[Result]:
        lines = self._results.read_text().splitlines() if self._results.exists() else []
        return [Result(**json.loads(line)) for line in lines]

    def run(self, seed: int, rows: int, row_tokens: int, sizes: Sequence[tuple[str, float]]) -> None:
        done = {(each.version, (each.format, each.bpw), each.seed) for each in self.results()}
        text = self._work / f"rows-{seed}.safetensors"
        if not text.exists():
            config = CalibrationConfig(rows=rows, row_tokens=row_tokens, seed=seed)
            calibration_rows(self._checkpoint, config).save(text)
        for version in ("new", "old"):
            left = [size for size in sizes if (version, size, seed) not in done]
            measurement = self._work / f"{version}-{seed}.safetensors"
            if left and not measurement.exists():
                options = ["--calibration", str(text), "--seed", str(seed), "-o", str(measurement)]
                self._bpwise(version, "measure", self._model, *options)
            for format_, bpw in left:
                self._make(version, format_, bpw, seed, measurement)

    def _make(self, version: str, format_: str, bpw: float, seed: int, measurement: Path) -> None:
        output = self._work / f"{version}-{seed}-{bpw}-{format_}{'.gguf' if format_ == 'gguf' else ''}"
        _delete(output)  # of a run that was cut off before it was judged
        options = ["--bpw", str(bpw), "-m", str(measurement), "--no-eval"]
        self._bpwise(version, "quantize", self._model, str(output), *options)
        model = require_format(output).open(output).beside(self._checkpoint)
        compared = self._judge.compare(output, model, predicted_nats=None)
        row_means = list(compared.profile.row_means.kl_nats)
        with self._results.open("a") as file:
            result = Result(version=version, format=format_, bpw=bpw, seed=seed, kl_nats=row_means)
            file.write(json.dumps(asdict(result)) + "\n")
        click.echo(f"{version} {format_} {bpw:g} bpw, seed {seed}: {np.mean(row_means):.6f}", err=True)
        _delete(output)
        rmtree(work_beside(output), ignore_errors=True)

    def _path(self, version: str, checkout: Path) -> Path:
        # A folder in which the package has its name, whatever the checkout is called.
        path = self._work / version
        path.mkdir(parents=True, exist_ok=True)
        link = path / "bpwise"
        if not link.exists():
            link.symlink_to(checkout.resolve(), target_is_directory=True)
        return path.resolve()

    def _bpwise(self, version: str, *arguments: str) -> None:
        start = "import sys; from bpwise.cli import main; sys.exit(main())"
        environment = {**os.environ, "PYTHONPATH": str(self._paths[version])}
        subprocess.run([sys.executable, "-c", start, *arguments], env=environment, check=True)


def _delete(output: Path) -> None:
    if output.is_dir():
        rmtree(output)
    else:
        output.unlink(missing_ok=True)


def _sizes(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    try:
        return [float(each) for each in value.split(",") if each]
    except ValueError:
        raise click.BadParameter("not numbers with commas between them", context, parameter) from None


@click.command()
@click.argument("older", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("model")
@click.option("--exl2", default="8,4,2.5", show_default=True, callback=_sizes, help="Bits per weight of the decoder.")
@click.option("--gguf", default="6.5,5,4.3", show_default=True, callback=_sizes, help="Bits per weight of all tensors.")
@click.option("--seeds", default=1, show_default=True, help="Seeds of calibration rows and probes.")
@click.option("-r", "--rows", default=8, show_default=True, help="Calibration rows.")
@click.option("-l", "--row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option("--eval-rows", default=16, show_default=True, help="Held-out rows of the built-in text.")
@click.option("--eval-row-tokens", default=512, show_default=True, help="Tokens in each.")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("build/versions"), show_default=True)
def main(
    older: Path,
    model: str,
    exl2: list[float],
    gguf: list[float],
    seeds: int,
    rows: int,
    row_tokens: int,
    eval_rows: int,
    eval_row_tokens: int,
    work_dir: Path,
) -> None:
    """Compare models made of MODEL by this version and by the checkout OLDER."""
    work_dir.mkdir(parents=True, exist_ok=True)
    sizes = [*(("exl2", bpw) for bpw in exl2), *(("gguf", bpw) for bpw in gguf)]
    try:
        comparison = _Comparison(older, model, work_dir, EvalConfig(rows=eval_rows, row_tokens=eval_row_tokens))
        for seed in range(seeds):
            comparison.run(seed, rows, row_tokens, sizes)
    except BpwiseError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(comparison.results()))


if __name__ == "__main__":
    main()

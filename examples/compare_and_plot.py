"""Plot damage against size for all quantized models of one original, from the reports that lie beside them.

    python examples/compare_and_plot.py OUT                          # every report below OUT, also of a series
    python examples/compare_and_plot.py OUT other/model.report.json -o damage.svg

Needs matplotlib. Reports are what ``bpwise quantize`` and ``bpwise eval`` write; only those made on the same text are
compared, so nothing is run again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

__all__ = ["main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One quantized model.

    Attributes:
        name: Its name.
        size_bytes: Size of its weights.
        kl_nats: Mean KL divergence from the original, per token.
        kl_error: Its standard error; 0 where one row leaves it unknown.
        text: Fingerprint of the original and of the text that both were run on, and what ran them.
    """

    name: str
    size_bytes: int
    kl_nats: float
    kl_error: float
    text: tuple[str, str, str]


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="damage.svg",
    show_default=True,
    help="The plot: .svg, .png or .pdf.",
)
def main(paths: tuple[Path, ...], output: Path) -> None:
    """Plot all reports in PATHS: report.json files, or directories to search."""
    points = sorted(
        {point.name: point for path in _reports(paths) if (point := _point(path))}.values(),
        key=lambda point: point.size_bytes,
    )
    if not points:
        raise click.ClickException("no report of a quantized model found. Run `bpwise eval` first.")
    if len({point.text for point in points}) > 1:
        raise click.ClickException("the reports are of different originals or texts. Evaluate all models alike.")
    for point in points:
        click.echo(f"{point.size_bytes / 1e6:10.1f} MB  {point.kl_nats:.3g} nats/token  {point.name}")
    _plot(points, output)
    click.echo(f"plot -> {output}")


def _reports(paths: tuple[Path, ...]) -> list[Path]:
    return [file for path in paths for file in (sorted(path.rglob("*report.json")) if path.is_dir() else [path])]


def _point(path: Path) -> Point | None:
    # A series' own report has no comparison at the top; those of its outputs are found beside their models.
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    comparison = content.get("comparison")
    if not isinstance(comparison, dict) or comparison["quantized"]["stored_bytes"] is None:
        return None
    kl = comparison["summary"]["kl_nats"]
    return Point(
        name=comparison["quantized"]["name"],
        size_bytes=comparison["quantized"]["stored_bytes"],
        kl_nats=kl["value"],
        kl_error=kl["standard_error"] or 0.0,
        text=(comparison["original"]["fingerprint"], comparison["text_fingerprint"], comparison["engine"]),
    )


def _plot(points: list[Point], output: Path) -> None:
    # Not pyplot: that would choose a window system.
    from matplotlib.figure import Figure  # noqa: PLC0415 - a message about no reports needs no plots

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = [point.size_bytes / 1e6 for point in points]
    axes.errorbar(sizes, [p.kl_nats for p in points], yerr=[p.kl_error for p in points], marker="o", capsize=3)
    for size, point in zip(sizes, points, strict=True):
        axes.annotate(point.name, (size, point.kl_nats), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("mean KL divergence from the original, nats per token")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(output)


if __name__ == "__main__":
    main()

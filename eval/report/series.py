"""The report over several outputs of one model, made from one measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import write_json, write_text
from ...checkpoint.files.operations import delete
from ...tables import Table, bytes_text, cell
from ...version import __version__
from ..comparison import Comparison
from .content import Report
from .html import html_report
from .report import HTML_NAME, JSON_NAME, MARKDOWN_NAME
from .tables import models_table
from .verdict import Judged

__all__ = ["SeriesOutput", "series_table", "write_series_report"]

_SERIES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesOutput(Judged):
    """One output of a series.

    Attributes:
        path: Directory or file.
        format: Name of its format.
        asked: Size that was asked for: bits per weight, or a label of it.
        bpw: Bits per weight that it has, as its format counts them; None if it is broken.
        file_bytes: Size of all files with tensors; None if it is broken.
        predicted_nats: Damage that the plan predicts, in nats per token; None if it is broken.
        comparison: The original against it; None if it was not evaluated, or is broken.
        broken: Why it is broken, or None if it is not.
        repeated: Whether an earlier run had made all of it.
    """

    path: Path
    format: str
    asked: float | str
    bpw: float | None = None
    file_bytes: int | None = None
    predicted_nats: float | None = None
    comparison: Comparison | None = None
    broken: str | None = None
    repeated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {
            "name": self.path.name,
            "format": self.format,
            "asked_bpw": None if isinstance(self.asked, str) else self.asked,
            "asked_size": self.asked if isinstance(self.asked, str) else None,
            "bpw": self.bpw,
            "file_bytes": self.file_bytes,
            "predicted_nats": self.predicted_nats,
            "broken": self.broken,
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }


def write_series_report(
    original: str, outputs: Sequence[SeriesOutput], directory: Path, counted: Mapping[str, str]
) -> Path:
    """Write the report over all outputs: as JSON, as Markdown, and as a page if any was evaluated.

    Args:
        original: Name of the original.
        outputs: In the order asked.
        directory: Where it goes.
        counted: What bits per weight count, by the title of each format.

    Returns:
        The page, or the Markdown file where there is none.

    Raises:
        WorkDirectoryError: It cannot be written.
    """
    content = {
        "bpwise_series": _SERIES_VERSION,
        "bpwise": __version__,
        "original": original,
        "outputs": [output.to_dict() for output in outputs],
    }
    write_json(directory / JSON_NAME, content)
    write_text(directory / MARKDOWN_NAME, _markdown(original, outputs, counted))
    comparisons = tuple(output.comparison for output in outputs if output.comparison is not None)
    if not comparisons:
        delete(directory / HTML_NAME, missing_ok=True)  # an earlier run's
        return directory / MARKDOWN_NAME
    report = Report(comparisons=comparisons, details=_details(outputs, counted), broken=_broken(outputs))
    write_text(directory / HTML_NAME, html_report(report))
    return directory / HTML_NAME


def series_table(outputs: Sequence[SeriesOutput]) -> Table:
    """Return a row for each output: what was asked for, and what it became."""
    asked = "asked" if any(isinstance(output.asked, str) for output in outputs) else "asked, bpw"
    head = ("model", asked, "bpw", "size of the weights", "predicted KL, nats per token", "measured")
    return Table.of(head, map(_row, outputs))


def _broken(outputs: Sequence[SeriesOutput]) -> tuple[str, ...]:
    return tuple(output.path.name for output in outputs if output.broken is not None)


def _details(outputs: Sequence[SeriesOutput], counted: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    made, broken = {}, {}
    for output in outputs:
        if output.broken is not None:
            broken[output.path.name] = output.broken
        else:
            made[output.path.name] = (
                f"{output.bpw:.4f} bits per weight, {_asked(output)} asked for; "
                f"predicted {output.predicted_nats:.3g} nats/token"
            )
    sections = {"Broken": broken, "Bits per weight": counted, "Sizes": made}
    return {title: section for title, section in sections.items() if section}


def _markdown(original: str, outputs: Sequence[SeriesOutput], counted: Mapping[str, str]) -> str:
    sections = [
        f"# {cell(original)}: {len(outputs)} outputs, from one measurement",
        series_table(outputs).to_markdown(),
        f"Bits per weight (bpw): {'; '.join(f'{title}, {means}' for title, means in counted.items())}.",
        *(f"**{cell(output.path.name)} is broken:** {cell(output.broken)}" for output in outputs if output.broken),
    ]
    comparisons = [output.comparison for output in outputs if output.comparison is not None]
    if comparisons:
        first = comparisons[0]
        sections += [
            "## Against the original",
            models_table(comparisons, _broken(outputs)).to_markdown(),
            f"Over {first.predicted_tokens} tokens ({cell(first.text)}), fingerprint {first.text_fingerprint}; "
            f"{cell(first.engine)}, {first.dtype} on {cell(first.device)}; floor {first.floor_nats:.2g} nats per "
            "token. Numbers after ± are one standard error. Each model's own report has the rest.",
        ]
    return "\n\n".join(sections) + "\n"


def _row(output: SeriesOutput) -> tuple[str, ...]:
    if output.broken is not None:
        return (output.path.name, _asked(output), "", "", "", "broken")
    kl = "not measured" if output.comparison is None else f"{output.comparison.summary.kl_nats.value:.3g}"
    assert output.bpw is not None
    assert output.file_bytes is not None
    size = bytes_text(output.file_bytes)
    return (output.path.name, _asked(output), f"{output.bpw:.4f}", size, f"{output.predicted_nats:.3g}", kl)


def _asked(output: SeriesOutput) -> str:
    return output.asked if isinstance(output.asked, str) else f"{output.asked:g}"

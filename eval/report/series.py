"""The report over several outputs of one model, made from one measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import write_json, write_text
from ...tables import Table, cell
from ...version import __version__
from ..comparison import Comparison
from .report import JSON_NAME, MARKDOWN_NAME
from .tables import models_table

__all__ = ["SeriesOutput", "write_series_report"]

_SERIES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesOutput:
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
    """

    path: Path
    format: str
    asked: float | str
    bpw: float | None = None
    file_bytes: int | None = None
    predicted_nats: float | None = None
    comparison: Comparison | None = None
    broken: str | None = None

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
    """Write the report over all outputs, as JSON and as Markdown.

    Args:
        original: Name of the original.
        outputs: In the order asked.
        directory: Where it goes.
        counted: What bits per weight count, by the title of each format.

    Returns:
        The Markdown file.

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
    path = directory / MARKDOWN_NAME
    write_text(path, _markdown(original, outputs, counted))
    return path


def _markdown(original: str, outputs: Sequence[SeriesOutput], counted: Mapping[str, str]) -> str:
    asked = "asked" if any(isinstance(output.asked, str) for output in outputs) else "asked, bpw"
    head = ("model", asked, "bpw", "size of the weights", "predicted KL, nats per token", "measured")
    sections = [
        f"# {cell(original)}: {len(outputs)} outputs, from one measurement",
        Table.of(head, map(_row, outputs)).to_markdown(),
        f"Bits per weight (bpw): {'; '.join(f'{title}, {means}' for title, means in counted.items())}.",
        *(f"**{cell(output.path.name)} is broken:** {cell(output.broken)}" for output in outputs if output.broken),
    ]
    comparisons = [output.comparison for output in outputs if output.comparison is not None]
    if comparisons:
        first = comparisons[0]
        sections += [
            "## Against the original",
            models_table(comparisons).to_markdown(),
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
    size = f"{output.file_bytes / 1e6:.1f} MB"
    return (output.path.name, _asked(output), f"{output.bpw:.4f}", size, f"{output.predicted_nats:.3g}", kl)


def _asked(output: SeriesOutput) -> str:
    return output.asked if isinstance(output.asked, str) else f"{output.asked:g}"

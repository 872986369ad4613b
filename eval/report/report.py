"""Comparisons as reports: for people (HTML, Markdown, terminal) and for programs (JSON, CSV)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import atomic_file, try_file, write_json, write_text
from ...checkpoint.files.paths import refuse_foreign, try_directory
from ...checkpoint.files.schemas import read_json
from ...convert.format import LinearCost
from ...convert.publishing.names import REPORT_FILE
from ...errors import FormatError
from ...version import __version__
from ..comparison import Comparison
from ..metrics.paired import paired_differences
from .extras import NO_EXTRAS, Extras, extras_content, extras_csv
from .html import HtmlReport, charts_of, html_report
from .markdown import (
    Details,
    comparison_table,
    joint_lines,
    joint_markdown,
    markdown_report,
    method_rows,
    paired_rows,
    sentence,
    summary_lines,
)
from .png import png_bytes
from .verdict import headline, verdict_sentence

__all__ = [
    "CSV_NAME",
    "HTML_NAME",
    "JSON_NAME",
    "MARKDOWN_NAME",
    "PLOTS_NAME",
    "Details",
    "Extras",
    "ReportFiles",
    "carried_over",
    "comparison_table",
    "earlier_details",
    "joint_lines",
    "joint_markdown",
    "markdown_report",
    "report_names",
    "summary_lines",
    "try_report",
    "write_joint_report",
    "write_report",
]

JSON_NAME = REPORT_FILE
MARKDOWN_NAME = "report.md"
HTML_NAME = "report.html"
CSV_NAME = "report.csv"
PLOTS_NAME = "report-plots"

_REPORT_VERSION = 1

_OURS = {
    ".json": re.compile(rb'\A\{\s*"bpwise_(report|series)"'),
    ".csv": re.compile(rb"\Amodel,(stored_bytes,bits_per_parameter|task,part_of|length,depth),"),
    # A row of every report on comparisons, and the title of one on a series.
    ".md": re.compile(rb"^\| bpwise \| |\A# .* bitrates, from one measurement$", re.MULTILINE),
    ".html": re.compile(re.escape(b'<meta name="generator" content="bpwise ')),
}
"""What tells files of a report from those of others, by their suffix."""

_MOST_BYTES = 1 << 20

_OF_EVALUATION = "evaluate"
"""Entry of a section on stages that belongs to the evaluation itself, and not to how the model was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """Where a report is.

    Attributes:
        json: Everything that was measured.
        csv: The table of models.
        markdown: The summary.
        html: The page.
        extras: Tables of benchmarks and needles as CSV; empty if they were not measured.
        plots: The drawings as SVG and PNG files; empty if they were not asked for.
    """

    json: Path
    csv: Path
    markdown: Path
    html: Path
    extras: tuple[Path, ...]
    plots: tuple[Path, ...]


def write_report(
    comparison: Comparison,
    directory: Path,
    details: Details | None = None,
    *,
    costs: Sequence[LinearCost] = (),
    extras: Extras = NO_EXTRAS,
    prefix: str = "",
    plots: Sequence[str] = (),
) -> ReportFiles:
    """Write the report on one model into a directory, each file atomically.

    Args:
        comparison: What was measured.
        directory: Made if it is missing; reports of the same names in it are replaced.
        details: More sections, after the comparison in their order: a title, and rows of names and values.
        costs: What each linear got, for the maps.
        extras: Benchmarks and needles of the same models.
        prefix: Put before all names, to tell reports of models apart that lie in one directory.
        plots: Formats that the drawings are written in too: ``svg``, ``png``.

    Raises:
        BpwiseError: PNG files are asked for, and their renderer is not installed.
        NumericalError: A number of ``details`` is NaN or infinite.
        WorkDirectoryError: A file cannot be written.
    """
    content = {
        "headline": sentence(comparison),
        "verdict": verdict_sentence(comparison),
        "comparison": comparison.to_dict(),
        "linears": [asdict(cost) for cost in costs],
        **extras_content(extras),
        "details": {title: dict(section) for title, section in (details or {}).items()},
    }
    page = HtmlReport(
        comparisons=(comparison,),
        costs=(tuple(costs),),
        methods=method_rows([comparison]),
        details=details,
        extras=extras,
    )
    return _write(Path(directory), prefix, content, markdown_report(comparison, details, extras), page, plots)


def write_joint_report(
    comparisons: Sequence[Comparison],
    directory: Path,
    details: Details | None = None,
    *,
    costs: Sequence[Sequence[LinearCost]] | None = None,
    extras: Extras = NO_EXTRAS,
    prefix: str = "",
    plots: Sequence[str] = (),
) -> ReportFiles:
    """Write one report on several models into a directory, each file atomically.

    Args:
        comparisons: At least one; all with the same original on the same text.
        directory: As in ``write_report``.
        details: As in ``write_report``.
        costs: What each linear of each model got, in the models' order.
        extras: As in ``write_report``.
        prefix: As in ``write_report``.
        plots: As in ``write_report``.

    Raises:
        ConfigError: The comparisons are of different originals or texts.
        BpwiseError: PNG files are asked for, and their renderer is not installed.
        NumericalError: A number of ``details`` is NaN or infinite.
        WorkDirectoryError: A file cannot be written.
    """
    paired = paired_differences(comparisons)
    costs = [()] * len(comparisons) if costs is None else costs
    content = {
        "headline": headline(comparisons),
        "verdicts": [verdict_sentence(each) for each in comparisons],
        "comparisons": [each.to_dict() for each in comparisons],
        "paired": [asdict(pair) for pair in paired],
        "linears": [[asdict(cost) for cost in each] for each in costs],
        **extras_content(extras),
        "details": {title: dict(section) for title, section in (details or {}).items()},
    }
    page = HtmlReport(
        comparisons=tuple(comparisons),
        costs=tuple(map(tuple, costs)),
        paired=paired_rows(paired),
        methods=method_rows(comparisons),
        details=details,
        extras=extras,
    )
    return _write(Path(directory), prefix, content, joint_markdown(comparisons, details, extras), page, plots)


def report_names(prefix: str = "") -> tuple[str, ...]:
    """Return the names of all files that a report may have, its drawings apart."""
    tables = (f"report.{name}.csv" for name in extras_csv(NO_EXTRAS))
    return tuple(f"{prefix}{name}" for name in (JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME, *tables))


def try_report(directory: Path, *, prefix: str = "", plots: Sequence[str] = ()) -> None:
    """Refuse a place that a report cannot be written to, or where it would replace other files, before the long work.

    Args:
        directory: As in ``write_report``.
        prefix: As in ``write_report``.
        plots: As in ``write_report``.

    Raises:
        WorkDirectoryError: A file of it cannot be made, or is of something else.
    """
    for name in report_names(prefix):
        refuse_foreign(directory / name, _is_report, "a report", advice="move it away")
        try_file(directory / name)
    if plots:
        try_directory(directory / f"{prefix}{PLOTS_NAME}")


def _is_report(path: Path) -> bool:
    # Each file is asked itself: one of ours does not make those of others beside it ours. One that was cut is ours.
    try:
        with path.open("rb") as file:
            return _OURS[path.suffix].search(file.read(_MOST_BYTES)) is not None
    except OSError:
        return False


def earlier_details(directory: Path, comparison: Comparison, *, prefix: str = "") -> Details:
    """Return the further sections of the report that is there; none if it is of another model, or cannot be read.

    Args:
        directory: As in ``write_report``.
        comparison: What was measured of the model now.
        prefix: As in ``write_report``.
    """
    try:
        report = read_json(directory / f"{prefix}{JSON_NAME}", FormatError)
        model = report["comparison"]["quantized"]
        same = (model["name"], model["stored_bytes"]) == (comparison.quantized.name, comparison.quantized.stored_bytes)
        sections = {title: dict(section) for title, section in report["details"].items()} if same else {}
    except (FormatError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    for section in sections.values():
        section.pop(_OF_EVALUATION, None)
    return sections


def carried_over(details: Details, earlier: Details) -> Details:
    """Return sections with what an earlier report told of the same model's making, which is not done again.

    Args:
        details: Sections of now.
        earlier: Those of the earlier report; where both have an entry, it is theirs that tells of the making.
    """
    made = {title: {**section, **earlier.get(title, {})} for title, section in details.items()}
    return {**made, **{title: section for title, section in earlier.items() if title not in made}}


def _write(
    directory: Path, prefix: str, content: Mapping[str, Any], markdown: str, page: HtmlReport, plots: Sequence[str]
) -> ReportFiles:
    path = {name: directory / f"{prefix}{name}" for name in (JSON_NAME, CSV_NAME, MARKDOWN_NAME, HTML_NAME, PLOTS_NAME)}
    write_json(path[JSON_NAME], {"bpwise_report": _REPORT_VERSION, "bpwise": __version__, **content})
    _write_csv(path[CSV_NAME], [_csv_row(each) for each in page.comparisons])
    for name, text in ((MARKDOWN_NAME, markdown), (HTML_NAME, html_report(page))):
        write_text(path[name], text)
    tables = []
    for name, rows in extras_csv(page.extras).items():
        table = directory / f"{prefix}report.{name}.csv"
        if rows:
            _write_csv(table, rows)
            tables.append(table)
        else:
            table.unlink(missing_ok=True)  # an earlier report's
    drawn = []
    for name, drawing in charts_of(page).items() if plots else ():
        for form in plots:
            drawn.append(path[PLOTS_NAME] / f"{name}.{form}")
            if form == "png":
                _write_bytes(drawn[-1], png_bytes(drawing))
            else:
                write_text(drawn[-1], drawing.render(standalone=True) + "\n")
    return ReportFiles(
        json=path[JSON_NAME],
        csv=path[CSV_NAME],
        markdown=path[MARKDOWN_NAME],
        html=path[HTML_NAME],
        extras=tuple(tables),
        plots=tuple(drawn),
    )


def _write_bytes(path: Path, data: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows([{**row, "model": _no_formula(row["model"])} for row in rows])
    write_text(path, text.getvalue())


def _no_formula(name: str) -> str:
    # A spreadsheet would take a name that begins so for a formula.
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name


def _csv_row(comparison: Comparison) -> dict[str, Any]:
    model = comparison.quantized
    row: dict[str, Any] = {
        "model": model.name,
        "stored_bytes": model.stored_bytes,
        "bits_per_parameter": model.bits_per_parameter,
    }
    for key, value in asdict(comparison.summary).items():
        if isinstance(value, dict):
            row[key], row[f"{key}_standard_error"] = value["value"], value["standard_error"]
        else:
            row[key] = value
    return {
        **row,
        "floor_nats": comparison.floor_nats,
        "bfloat16_floor_nats": comparison.bfloat16_floor_nats,
        "text_fingerprint": comparison.text_fingerprint,
    }

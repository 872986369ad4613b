"""A comparison as a report: for people (Markdown, terminal) and for programs (JSON)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..convert.files import atomic_file, write_json
from ..convert.markdown import cell as _cell
from ..convert.markdown import table as _table
from ..version import __version__
from .comparison import Comparison, ModelSummary
from .estimate import Estimate

__all__ = [
    "JSON_NAME",
    "MARKDOWN_NAME",
    "Details",
    "comparison_table",
    "markdown_report",
    "summary_lines",
    "write_report",
]

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"

_REPORT_VERSION = 1

_SMALL_NATS = 1e-4
"""Below it a divergence is written with an exponent."""

Details = Mapping[str, Mapping[str, str | float]]
"""More sections of a report: titles, and for each the rows of its table."""


def write_report(
    comparison: Comparison, directory: Path, details: Details | None = None, *, prefix: str = ""
) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.md`` into a directory, each atomically.

    Args:
        comparison: What was measured.
        directory: Made if it is missing; reports of the same names in it are replaced.
        details: More sections, after the comparison in their order: a title, and rows of names and values.
        prefix: Put before both names, to tell reports of models apart that lie in one directory.

    Returns:
        The paths of the JSON file and of the Markdown file.

    Raises:
        NumericalError: A number of ``details`` is NaN or infinite.
        WorkDirectoryError: A file cannot be written.
    """
    content = {
        "bpwise_report": _REPORT_VERSION,
        "bpwise": __version__,
        "headline": _headline(comparison),
        "comparison": comparison.to_dict(),
        "details": {title: dict(section) for title, section in (details or {}).items()},
    }
    json_path, markdown_path = (Path(directory) / f"{prefix}{name}" for name in (JSON_NAME, MARKDOWN_NAME))
    write_json(json_path, content)
    with atomic_file(markdown_path) as temporary:
        temporary.write_text(markdown_report(comparison, details), encoding="utf-8")
    return json_path, markdown_path


def markdown_report(comparison: Comparison, details: Details | None = None) -> str:
    """Return the report as Markdown.

    Args:
        comparison: What was measured.
        details: As in ``write_report``.
    """
    sections = [
        f"# {_cell(comparison.quantized.name)} against {_cell(comparison.original.name)}",
        _headline(comparison),
        *([_floor_note(comparison)] if comparison.within_floor else []),
        _damage_table(comparison),
        "Numbers after ± are one standard error. They take rows, not tokens, as independent, because the tokens of a "
        "row are alike; differences are paired on the same tokens.",
        "## KL divergence per token",
        _divergence_table(comparison),
        "## How it was measured",
        _method_table(comparison),
    ]
    for title, section in (details or {}).items():
        rows = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in section.items()]
        sections += [f"## {_cell(title)}", _table(("", ""), rows)]
    return "\n\n".join(sections) + "\n"


def summary_lines(comparison: Comparison) -> list[str]:
    """Return the result in a few lines for a terminal."""
    summary = comparison.summary
    lines = [
        f"perplexity  {_perplexity(summary.original_perplexity)} -> {_perplexity(summary.quantized_perplexity)}"
        f"  (difference {_perplexity(summary.perplexity_difference, sign='+')})",
        f"KL          {_nats(summary.kl_nats)} nats per token"
        f"  (median {_nats(summary.kl_median_nats)}, 99 % below {_nats(summary.kl_p99_nats)},"
        f" max {_nats(summary.kl_max_nats)}, floor {_nats(comparison.floor_nats)})",
        f"top-1       {_percent(summary.top1_agreement)} of tokens agree",
    ]
    return [*lines, _floor_note(comparison)] if comparison.within_floor else lines


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table with the original in its first row and a quantized model in each other.

    Args:
        comparisons: At least one; all with the same original on the same text.
    """
    first = comparisons[0]
    rows = [
        (*_model_cells(first.original), _perplexity(first.summary.original_perplexity), "", "0", "100 %"),
        *(
            (
                *_model_cells(each.quantized),
                _perplexity(each.summary.quantized_perplexity),
                _perplexity(each.summary.perplexity_difference, sign="+"),
                _nats(each.summary.kl_nats),
                _percent(each.summary.top1_agreement),
            )
            for each in comparisons
        ),
    ]
    head = ("model", "size", "bits per parameter", "perplexity", "difference", "KL, nats per token", "top-1 agreement")
    return _table(head, rows)


def _headline(comparison: Comparison) -> str:
    summary = comparison.summary
    change = summary.perplexity_ratio
    percent = _estimate(change.scaled(100 * (change.value - 1), 100), 2, "+")
    return (
        f"Over {comparison.predicted_tokens} tokens of held-out text the quantized model's predictions are "
        f"{_nats(summary.kl_nats.value)} nats per token away from the original's (mean KL divergence), "
        f"{_percent(Estimate(summary.top1_agreement.value, None))} of its most likely next tokens are the same, "
        f"and its perplexity is {summary.quantized_perplexity.value:.3f} instead of "
        f"{summary.original_perplexity.value:.3f} ({percent} %)."
    )


def _floor_note(comparison: Comparison) -> str:
    return (
        f"The mean KL divergence is within the floor of {_nats(comparison.floor_nats)} nats per token: it cannot be "
        f"told from what {comparison.dtype} arithmetic alone does to the original."
    )


def _damage_table(comparison: Comparison) -> str:
    summary = comparison.summary
    original, quantized = _model_cells(comparison.original), _model_cells(comparison.quantized)
    rows = [
        ("size of the weights", original[1], quantized[1], ""),
        ("bits per parameter of the original", original[2], quantized[2], ""),
        (
            "perplexity",
            _perplexity(summary.original_perplexity),
            _perplexity(summary.quantized_perplexity),
            _perplexity(summary.perplexity_difference, sign="+"),
        ),
        ("perplexity ratio", "", "", _estimate(summary.perplexity_ratio, 5)),
        ("mean KL divergence, nats per token", "", "", _nats(summary.kl_nats)),
        ("same most likely token", "", "", _percent(summary.top1_agreement)),
    ]
    return _table(("", "original", "quantized", "difference"), rows)


def _divergence_table(comparison: Comparison) -> str:
    summary = comparison.summary
    rows = [
        ("mean", _nats(summary.kl_nats)),
        ("median", _nats(summary.kl_median_nats)),
        ("90 % below", _nats(summary.kl_p90_nats)),
        ("99 % below", _nats(summary.kl_p99_nats)),
        ("99.9 % below", _nats(summary.kl_p999_nats)),
        ("largest", _nats(summary.kl_max_nats)),
        ("floor of the mean", _nats(comparison.floor_nats)),
    ]
    return _table(("KL(original ‖ quantized)", "nats"), rows)


def _method_table(comparison: Comparison) -> str:
    rows = [
        ("text", comparison.text),
        ("fingerprint of the token ids", comparison.text_fingerprint),
        (
            "window and stride",
            f"{comparison.rows} rows of {comparison.row_tokens} tokens, stride {comparison.stride}: none sees another",
        ),
        ("BOS", "each row begins with it" if comparison.adds_bos else "none, as the tokenizer adds none"),
        ("predicted tokens", f"{comparison.predicted_tokens}: all but the first of each row"),
        ("run by", comparison.engine),
        ("dtype and device", f"{comparison.dtype} on {comparison.device}"),
        ("floor", f"{_nats(comparison.floor_nats)} nats per token: {comparison.floor_definition}"),
        ("original", f"{comparison.original.name}, fingerprint {comparison.original.fingerprint}"),
        ("quantized", f"{comparison.quantized.name}, fingerprint {comparison.quantized.fingerprint}"),
        ("time", f"{comparison.seconds:.1f} s"),
        ("bpwise", __version__),
    ]
    return _table(("", ""), rows)


def _model_cells(model: ModelSummary) -> tuple[str, str, str]:
    size = "" if model.stored_bytes is None else f"{model.stored_bytes / 1e6:.1f} MB"
    bits = "" if model.bits_per_parameter is None else f"{model.bits_per_parameter:.3f}"
    return model.name, size, bits


def _perplexity(estimate: Estimate, sign: str = "") -> str:
    # Never fewer than 3 decimals: the standard error comes mostly from the choice of the text, which both models share.
    return _estimate(estimate, 3, sign)


def _percent(estimate: Estimate) -> str:
    return f"{_estimate(estimate.scaled(100 * estimate.value, 100), 2)} %"


def _nats(number: Estimate | float) -> str:
    value, error = (number.value, number.standard_error) if isinstance(number, Estimate) else (number, None)
    if abs(value) >= _SMALL_NATS and error is not None:
        # Three significant digits of the value, or two of the error where that is more.
        return _estimate(Estimate(value, error), max(0, 2 - math.floor(math.log10(abs(value)))))
    shown = f"{value:.3g}"
    return shown if error is None else f"{shown} ± {error:.1g}"


def _estimate(estimate: Estimate, decimals: int, sign: str = "") -> str:
    value, error = estimate.value, estimate.standard_error
    if error is None:
        return f"{value:{sign}.{decimals}f}"
    if error > 0:
        decimals = max(decimals, min(decimals + 3, 1 - math.floor(math.log10(error))))
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"

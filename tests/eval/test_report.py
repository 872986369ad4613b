import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from bpwise.errors import NumericalError
from bpwise.eval.comparison import Comparison, ModelSummary
from bpwise.eval.divergence import Summary
from bpwise.eval.estimate import Estimate
from bpwise.eval.report import comparison_table, markdown_report, summary_lines, write_report


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        original=ModelSummary(name="llama", fingerprint="f0", stored_bytes=16_000_000, bits_per_parameter=16.0),
        quantized=ModelSummary(name="llama-4bpw", fingerprint="f1", stored_bytes=4_100_000, bits_per_parameter=4.1),
        summary=Summary(
            original_perplexity=Estimate(10.0, 0.5),
            quantized_perplexity=Estimate(10.25, 0.52),
            perplexity_ratio=Estimate(1.025, 0.0031),
            perplexity_difference=Estimate(0.25, 0.031),
            kl_nats=Estimate(0.01234, 0.00045),
            kl_median_nats=0.007,
            kl_p90_nats=0.03,
            kl_p99_nats=0.1,
            kl_p999_nats=0.4,
            kl_max_nats=1.25,
            top1_agreement=Estimate(0.9344, 0.0021),
            top5_agreement=Estimate(0.9512, 0.0019),
            probability_change=Estimate(-0.00123, 0.00031),
            probability_change_rms=Estimate(0.0345, 0.0011),
        ),
        floor_nats=2.5e-9,
        floor_tokens=512,
        text="some text: 16 rows",
        text_fingerprint="f2",
        rows=16,
        row_tokens=1024,
        stride=1024,
        adds_bos=True,
        dtype="float32",
        device="cpu",
        seconds=12.34,
    )


def with_kl(comparison: Comparison, kl: Estimate) -> Comparison:
    return replace(comparison, summary=replace(comparison.summary, kl_nats=kl))


def table_rows(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in rows}


def test_markdown(comparison: Comparison) -> None:
    text = markdown_report(comparison)
    assert text.startswith("# llama-4bpw against llama\n")
    headline = text.splitlines()[2]
    assert "16368 tokens" in headline
    assert "0.0123 nats per token" in headline
    assert "93.44 %" in headline
    assert "10.250 instead of 10.000 (+2.50 ± 0.31 %)" in headline
    rows = table_rows(text)
    assert rows["perplexity"] == ["10.000 ± 0.500", "10.250 ± 0.520", "+0.250 ± 0.031"]
    assert rows["mean KL divergence, nats per token"][-1] == "0.01234 ± 0.00045"
    assert rows["same most likely token"][-1] == "93.44 ± 0.21 %"
    assert rows["size of the weights"][:2] == ["16.0 MB", "4.1 MB"]
    assert [rows[name] for name in ("median", "99 % below", "largest")] == [["0.007"], ["0.1"], ["1.25"]]
    assert "stride 1024" in rows["window and stride"][0]
    assert rows["BOS"] == ["each row begins with it"]
    assert rows["dtype and device"] == ["float32 on cpu"]
    assert "2.5e-09 nats per token: mean KL divergence of the original in float32" in rows["floor"][0]
    assert rows["text"] == ["some text: 16 rows"]
    assert "within the floor" not in text


def test_within_the_floor_is_said(comparison: Comparison) -> None:
    tiny = with_kl(comparison, Estimate(2e-9, 1e-10))
    assert "within the floor of 2.5e-09" in markdown_report(tiny)
    assert "within the floor" in summary_lines(tiny)[-1]
    assert len(summary_lines(comparison)) == 3


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (Estimate(0.00146, 0.00008), "0.001460 ± 0.000080"),
        (Estimate(1.5, None), "1.5"),
        (Estimate(3e-6, 2e-7), "3e-06 ± 2e-07"),
        (Estimate(0.0, 0.0), "0 ± 0"),
        (Estimate(-1e-12, None), "-1e-12"),
        (Estimate(0.01, 0.0), "0.0100 ± 0.0000"),
    ],
    ids=["eight-bit", "one-row", "tiny", "zero", "negative", "no-error"],
)
def test_divergences_keep_their_digits(comparison: Comparison, kl: Estimate, expected: str) -> None:
    rows = table_rows(markdown_report(with_kl(comparison, kl)))
    assert rows["mean"] == [expected]


def test_terminal(comparison: Comparison) -> None:
    text = "\n".join(summary_lines(comparison))
    for part in ("10.000 ± 0.500 -> 10.250 ± 0.520", "+0.250 ± 0.031", "0.01234 ± 0.00045", "93.44 ± 0.21 %"):
        assert part in text


def test_table_of_several(comparison: Comparison) -> None:
    other = replace(
        comparison, quantized=ModelSummary(name="b", fingerprint="", stored_bytes=None, bits_per_parameter=None)
    )
    rows = table_rows(comparison_table([comparison, other]))
    assert list(rows) == ["model", "---", "llama", "llama-4bpw", "b"]
    assert rows["llama"] == ["16.0 MB", "16.000", "10.000 ± 0.500", "", "0", "100 %"]
    assert rows["llama-4bpw"][-2:] == ["0.01234 ± 0.00045", "93.44 ± 0.21 %"]
    assert rows["b"][:2] == ["", ""]


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    details = {"Time": {"measure": 12.5, "round": "3 min"}, "Size": {"bpw": 4.0999999, "bytes": 123456789}}
    json_path, markdown_path = write_report(comparison, tmp_path / "new", details)
    assert (json_path, markdown_path) == (tmp_path / "new" / "report.json", tmp_path / "new" / "report.md")
    content = json.loads(json_path.read_text())
    assert content["bpwise_report"] == 1
    assert content["details"] == details
    assert content["comparison"]["summary"]["kl_nats"] == {"value": 0.01234, "standard_error": 0.00045}
    assert content["comparison"]["quantized"]["stored_bytes"] == 4_100_000
    assert content["comparison"]["predicted_tokens"] == 16 * 1023
    assert content["comparison"]["within_floor"] is False
    text = markdown_path.read_text()
    assert text == markdown_report(comparison, details)
    assert text.index("## Time") < text.index("## Size")
    assert table_rows(text)["round"] == ["3 min"]
    assert table_rows(text)["bpw"] == ["4.1"]
    assert table_rows(text)["bytes"] == ["123456789"]
    write_report(comparison, tmp_path / "new")
    assert json.loads(json_path.read_text())["details"] == {}


def test_no_nan_in_json(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"report\.json"):
        write_report(comparison, tmp_path, {"Damage": {"predicted": math.nan}})
    assert list(tmp_path.iterdir()) == []


def test_names_cannot_break_the_table(comparison: Comparison) -> None:
    hostile = replace(comparison, text="a | b\n\n# c <script>&amp;")
    lines = markdown_report(hostile).splitlines()
    assert "| text | a \\| b # c &lt;script>&amp;amp; |" in lines

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bpwise.convert.plan import LinearCost
from bpwise.errors import NumericalError, WorkDirectoryError
from bpwise.eval.answers import Answers
from bpwise.eval.comparison import Comparison
from bpwise.eval.metrics.estimate import Estimate
from bpwise.eval.models import ModelSummary
from bpwise.eval.report.content import Report
from bpwise.eval.report.made import command_line
from bpwise.eval.report.markdown import joint_lines, markdown_report, summary_lines
from bpwise.eval.report.report import clear_report, report_names, try_report, write_report
from bpwise.eval.report.tables import Details, models_table
from bpwise.eval.report.verdict import GOOD_ENOUGH_NATS, LEVELS, beaten_by, headline, verdict, verdict_sentence


def with_kl(comparison: Comparison, kl: Estimate) -> Comparison:
    return replace(comparison, summary=replace(comparison.summary, kl_nats=kl))


def of(*comparisons: Comparison, details: Details | None = None, costs: tuple[LinearCost, ...] = ()) -> Report:
    return Report(comparisons=comparisons, costs=(costs,) if costs else (), details=details or {})


def table_rows(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in rows}


def test_markdown(comparison: Comparison) -> None:
    text = markdown_report(of(comparison))
    assert text.startswith("# llama-4bpw against llama\n")
    assert text.splitlines()[2] == (
        "**4.1 MB, 26 % of the original: close to the original (based on only 4 sequences of text). "
        "93 of 100 next tokens are the same.**"
    )
    summary = text.splitlines()[4]
    assert "1020 tokens" in summary
    assert "0.0123 nats per token" in summary
    assert "93.44 %" in summary
    assert "10.250 instead of 10.000 (+2.50 ± 0.31 %)" in summary
    rows = table_rows(text)
    assert "| model | llama | llama-4bpw |" in text
    assert rows["perplexity"] == ["10.000 ± 0.500", "10.250 ± 0.520 (+0.250 ± 0.031)"]
    # Student's t with three degrees of freedom: 3.182 standard errors either way.
    assert rows["KL, nats/token"] == ["0", "0.01234 ± 0.00045 (0.0109 to 0.0138)"]
    assert rows["top-1 agreement"] == ["100 %", "93.44 ± 0.21 % (top-5 95.12 ± 0.19 %)"]
    assert rows["Δp, RMS"] == ["0", "3.45 ± 0.11 % (mean -0.123 ± 0.031 %)"]
    assert list(rows)[list(rows).index("1 to 1") :][:4] == ["1 to 1", "2 to 3", "4 to 7", "8 to 15"]
    assert rows["prose"][0] == "2"
    assert rows["size"] == ["16.0 MB (16.000 bits/parameter)", "4.1 MB (4.100 bits/parameter)"]
    assert [rows[name] for name in ("median", "99 % below", "largest")] == [["0.007"], ["0.1"], ["1.25"]]
    assert "stride 256" in rows["window and stride"][0]
    assert rows["BOS"] == ["each row begins with it"]
    assert rows["dtype and device"] == ["float32 on cpu"]
    assert "2.5e-09 nats per token: mean KL divergence of the original in float32" in rows["floor"][0]
    assert rows["text"] == ["some text: 4 rows"]
    assert "within the floor" not in text


def test_within_the_floor_is_said(comparison: Comparison) -> None:
    tiny = with_kl(comparison, Estimate(2e-9, 1e-10))
    assert "within the floor of 2.5e-09" in markdown_report(of(tiny))
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
    rows = table_rows(markdown_report(of(with_kl(comparison, kl))))
    assert rows["KL, nats/token"][1].split(" (")[0] == expected


def test_terminal(comparison: Comparison) -> None:
    text = "\n".join(summary_lines(comparison))
    for part in ("10.000 ± 0.500 -> 10.250 ± 0.520", "+0.250 ± 0.031", "0.01234 ± 0.00045", "93.44 ± 0.21 %"):
        assert part in text


def test_table_of_several(comparison: Comparison) -> None:
    other = replace(
        comparison, quantized=ModelSummary(name="b", fingerprint="", stored_bytes=None, bits_per_parameter=None)
    )
    rows = table_rows(models_table([comparison, other]).to_markdown())
    names = ["llama", "llama-4bpw (close to the original)", "b (close to the original)"]
    assert list(rows) == ["model", "---", *names]
    size = "16.0 MB (16.000 bits/parameter)"
    assert rows["llama"] == ["0", "100 %", size, "10.000 ± 0.500", "0"]
    assert rows[names[1]][:2] == ["0.01234 ± 0.00045 (0.0109 to 0.0138)", "93.44 ± 0.21 % (top-5 95.12 ± 0.19 %)"]
    assert rows[names[2]][2] == "unknown"


def test_speed_is_a_column_where_it_is_known(comparison: Comparison) -> None:
    fast = replace(comparison, tokens_per_second=12.345)
    assert "tokens/s" not in markdown_report(of(comparison))
    header, _, original, first, second = models_table([fast, comparison]).to_markdown().splitlines()
    assert [line.split(" | ")[-1] for line in (header, original, first, second)] == [
        "tokens/s |",
        "– |",
        "12.3 |",
        "– |",
    ]
    assert "speed       12.3 tokens per second in llama.cpp on this machine" in summary_lines(fast)
    assert table_rows(markdown_report(of(fast)))["tokens/s"] == ["–", "12.3"]


def test_files(comparison: Comparison, tmp_path: Path) -> None:
    details = {"Time": {"measure": 12.5, "round": "3 min"}, "Size": {"bpw": 4.0999999, "bytes": 123456789}}
    report = of(comparison, details=details)
    files = write_report(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        f"report.{end}" for end in ("csv", "html", "json", "md")
    ]
    assert files.plots == ()
    json_path, markdown_path = files.json, files.markdown
    content = json.loads(json_path.read_text())
    assert content["bpwise_report"] == 1
    assert content["details"] == details
    assert content["comparison"]["summary"]["kl_nats"] == {"value": 0.01234, "standard_error": 0.00045}
    assert content["comparison"]["quantized"]["stored_bytes"] == 4_100_000
    assert content["comparison"]["predicted_tokens"] == 1020
    assert content["comparison"]["within_floor"] is False
    text = markdown_path.read_text()
    assert text == markdown_report(report)
    assert text.index("## Time") < text.index("## Size")
    assert table_rows(text)["round"] == ["3 min"]
    assert table_rows(text)["bpw"] == ["4.1"]
    assert table_rows(text)["bytes"] == ["123456789"]
    write_report(of(comparison), tmp_path / "new")
    assert json.loads(json_path.read_text())["details"] == {}


def test_csv(comparison: Comparison, tmp_path: Path) -> None:
    risky = replace(comparison, quantized=replace(comparison.quantized, name="=1+1", stored_bytes=None))
    with write_report(of(comparison, risky), tmp_path).csv.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["model"] == "llama-4bpw"
    assert float(first["kl_nats"]) == 0.01234
    assert float(first["kl_nats_standard_error"]) == 0.00045
    assert float(first["kl_p999_nats"]) == 0.4
    assert (second["model"], second["stored_bytes"]) == ("'=1+1", "")


def test_joint_report(comparison: Comparison, tmp_path: Path) -> None:
    means = comparison.profile.row_means
    worse = with_kl(comparison, Estimate(0.5, 0.01))
    worse = replace(
        worse,
        quantized=replace(worse.quantized, name="b|c"),
        profile=replace(
            worse.profile, row_means=replace(means, kl_nats=tuple(value + 0.25 for value in means.kl_nats))
        ),
    )
    costs = ((LinearCost("model.layers.0.mlp.up_proj", 4.5, 1e-3),), ())
    report = Report(comparisons=(comparison, worse), details={"Time": {"all": 3.0}}, costs=costs)
    files = write_report(report, tmp_path, plots=["svg"])
    content = json.loads(files.json.read_text())
    assert [each["quantized"]["name"] for each in content["comparisons"]] == ["llama-4bpw", "b|c"]
    (pair,) = content["paired"]
    assert pair["kl_nats"] == {"value": pytest.approx(0.25), "standard_error": pytest.approx(0.0, abs=1e-12)}
    assert pair["kl_interval"]["low"] == pytest.approx(0.25)
    assert content["linears"][0][0] == {"name": "model.layers.0.mlp.up_proj", "bpw": 4.5, "damage_nats": 1e-3}
    text = files.markdown.read_text()
    assert text == markdown_report(report)
    assert "| llama-4bpw | b\\|c | +0.25 (+0.25 to +0.25) |" in text
    assert {path.stem for path in files.plots} == {
        "histogram", "kinds", "map-bits-1", "map-damage-1", "positions", "size"
    }  # fmt: skip
    for path in files.plots:
        ElementTree.parse(path)
    assert len(joint_lines([comparison, worse])) == 3
    assert "| llama-4bpw | 0.007 | 0.03 | 0.1 | 0.4 | 1.25 | 2.5e-09 | unknown |" in text
    assert "Differences between the models" not in markdown_report(of(comparison))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (1e-9, "the same as the original as far as can be measured"),
        (0.0009, "indistinguishable in use"),
        (0.002, "indistinguishable in use"),
        (0.0055, "very close to the original"),
        (0.031, "close to the original"),
        (0.1, "noticeably different from the original"),
        (0.3, "damaged"),
        (2.0, "badly damaged"),
    ],
)
def test_verdict(comparison: Comparison, kl: float, expected: str) -> None:
    measured = with_kl(comparison, Estimate(kl, 0.1))
    assert verdict(measured) == expected
    sentence = f"4.1 MB, 26 % of the original: {expected}. 93 of 100 next tokens are the same."
    assert verdict_sentence(replace(measured, rows=8)) == sentence


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.0, "0 of 100 next tokens are the same"),
        (0.9944, "99 of 100 next tokens are the same"),
        (0.9964, "996 of 1000 next tokens are the same"),
        (0.99999, "Nearly all next tokens are the same"),
        (1.0, "All next tokens are the same"),
    ],
)
def test_tokens_are_counted_so_that_none_is_rounded_away(comparison: Comparison, share: float, said: str) -> None:
    summary = replace(comparison.summary, top1_agreement=Estimate(share, None))
    unknown = replace(comparison.quantized, stored_bytes=None)
    assert verdict_sentence(replace(comparison, summary=summary, quantized=unknown, rows=8)) == (
        f"Close to the original. {said}."
    )


SPREAD = (0.98, 1.02, 0.99, 1.01)


def sized(
    comparison: Comparison, name: str, kl: float, size: int | None, factors: tuple[float, ...] = SPREAD
) -> Comparison:
    """A model of this size, whose rows have these multiples of its divergence."""
    row_means = replace(comparison.profile.row_means, kl_nats=tuple(kl * factor for factor in factors))
    return replace(
        with_kl(comparison, Estimate(kl, None)),
        quantized=ModelSummary(name=name, fingerprint="", stored_bytes=size, bits_per_parameter=None),
        profile=replace(comparison.profile, row_means=row_means),
    )


def test_headline_of_several(comparison: Comparison) -> None:
    assert [limit for limit, _ in LEVELS] == sorted(limit for limit, _ in LEVELS)
    assert GOOD_ENOUGH_NATS in [limit for limit, _ in LEVELS]
    several = [
        sized(comparison, *each)
        for each in (("large", 0.0005, 2_340_000_000), ("middle", 0.03, 8_000_000), ("worse", 0.035, 9_000_000),
                     ("small", 0.1, 4_000_000), ("unknown", 0.2, None))
    ]  # fmt: skip
    text = headline(several)
    assert text.startswith("Smallest that is good enough: middle. 8.0 MB, 50 % of the original: close to the original")
    assert "Closest to the original: large. 2.34 GB, 14625 % of the original: indistinguishable in use" in text
    assert text.endswith("worse is larger than middle, and worse.")
    assert "small" not in text.replace("Smallest", "")
    rows = table_rows(models_table(several).to_markdown())
    assert "worse (close to the original; larger than middle, and worse)" in rows
    assert "middle (close to the original)" in rows
    none_good = headline(several[3:])
    assert none_good.startswith("Closest to the original: small.")


def test_a_difference_within_its_error_is_not_worse(comparison: Comparison) -> None:
    first = sized(comparison, "a", 0.03, 8)
    noisy = sized(comparison, "b", 0.0301, 9, (1.02, 0.98, 1.01, 0.99))
    assert beaten_by([first, noisy]) == [None, None]
    assert beaten_by([first, sized(comparison, "b", 0.0301, 9)]) == [None, first]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [
                "/usr/bin/bpwise",
                "eval",
                "/home/me/secret/llama",
                "out dir/x.gguf",
                "--lora=/a/b",
                "-c",
                "self=2,/t/u.txt",
            ],
            "bpwise eval llama 'out dir/x.gguf' --lora=b -c self=2,u.txt",
        ),
        (["bpwise", "eval", "Qwen/Qwen3-0.6B", "../up/x.gguf", "~/y/"], "bpwise eval Qwen/Qwen3-0.6B x.gguf y"),
        (["C:\\bin\\bpwise.exe", "eval", "C:\\me\\m", "blk.0.*=Q8_0"], None),
        (["/usr/bin/pytest", "eval"], None),
        ([], None),
    ],
)
def test_commands_tell_nothing_of_the_machine(arguments: list[str], expected: str | None) -> None:
    assert command_line(arguments) == expected


def test_how_it_was_made_is_in_every_file(comparison: Comparison, tmp_path: Path) -> None:
    hashed = replace(comparison, quantized=replace(comparison.quantized, sha256={"a.gguf": "ab" * 32}))
    made = {"date": "2026-01-02 03:04 UTC", "command": "bpwise eval a b", "hardware": "an abacus"}
    files = write_report(Report(comparisons=(hashed,), made=made), tmp_path)
    rows = table_rows(files.markdown.read_text())
    assert [rows[name] for name in made] == [[value] for value in made.values()]
    assert rows["SHA-256 of a.gguf"] == ["ab" * 32]
    assert json.loads(files.json.read_text())["made"] == made
    page = files.html.read_text()
    assert all(value in page for value in (*made.values(), "ab" * 32))
    assert {"date", "hardware", "software"} <= Report(comparisons=(comparison,)).made.keys()


def test_answers(comparison: Comparison, tmp_path: Path) -> None:
    asked = [
        replace(comparison, answers=Answers(prompt="Why <b>?", original="Because it is.", quantized=answer))
        for answer in ("Because I\nsay so.", "Because it is.")
    ]
    files = write_report(Report(comparisons=tuple(asked)), tmp_path)
    text = files.markdown.read_text()
    assert "> Why &lt;b>?" in text
    assert "| llama | Because it is. |" in text
    assert "| llama-4bpw | Because I say so. |" in text
    page = files.html.read_text()
    assert "Because <mark>I\nsay so.</mark>" in page
    assert page.count('<p class="answer">Because it is.</p>') == 2
    assert "The same prompt" not in markdown_report(of(comparison))


def test_no_nan_in_json(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match=r"report\.json"):
        write_report(of(comparison, details={"Damage": {"predicted": math.nan}}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_cannot_break_the_table(comparison: Comparison) -> None:
    hostile = replace(comparison, text="a | b\n\n# c <script>&amp;")
    lines = markdown_report(of(hostile)).splitlines()
    assert "| text | a \\| b # c &lt;script>&amp;amp; |" in lines


def test_any_name_can_be_written(comparison: Comparison, tmp_path: Path) -> None:
    # Half of a surrogate pair stands for a byte that is no UTF-8 in the name of a file.
    name = "a\udcff\x1b[31m|b\\|c\u202e<i>[x](y)\n# d"
    hostile = replace(comparison, quantized=replace(comparison.quantized, name=name), text=name)
    costs = (LinearCost(f"model.layers.0.{name}", 4.0, 0.1), LinearCost("model.layers.1.x", 4.0, 0.1))
    files = write_report(of(hostile, costs=costs), tmp_path, plots=["svg"])
    markdown = files.markdown.read_text(encoding="utf-8")
    assert markdown.replace("\n", "").isprintable()
    assert "\n# d" not in markdown and "<i>" not in markdown
    assert "<i>" not in files.html.read_text(encoding="utf-8")
    for drawing in files.plots:
        ElementTree.fromstring(drawing.read_text(encoding="utf-8"))
    with files.csv.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"].replace("\\udcff", "\udcff") == name
    assert json.loads(files.json.read_text(encoding="utf-8"))["comparison"]["quantized"]["name"] == name


def test_what_a_killed_run_left_beside_a_report_goes(comparison: Comparison, tmp_path: Path) -> None:
    write_report(Report(comparisons=(comparison,)), tmp_path, prefix="a.")
    whole = sorted(tmp_path.iterdir())
    (tmp_path / ".a.report.lock").touch()
    (tmp_path / f".a.report.md.partial-{1 << 22}-00000000").touch()
    clear_report(tmp_path, "a.")
    assert sorted(tmp_path.iterdir()) == whole


@pytest.mark.parametrize("theirs", report_names())
def test_files_of_others_are_theirs_beside_a_report_of_ours(
    theirs: str, comparison: Comparison, tmp_path: Path
) -> None:
    write_report(of(comparison), tmp_path)
    try_report(tmp_path)
    (tmp_path / theirs).write_text('{"thesis": "the only copy"}')
    with pytest.raises(WorkDirectoryError, match=f"{theirs}: in the way"):
        try_report(tmp_path)


@pytest.mark.parametrize("name", ["report.json", "report.csv", "report.md", "report.html"])
def test_each_file_of_a_report_is_known_alone(name: str, comparison: Comparison, tmp_path: Path) -> None:
    write_report(of(comparison), tmp_path)
    for path in tmp_path.iterdir():
        if path.name != name:
            path.unlink()
    try_report(tmp_path)
    (tmp_path / name).unlink()
    write_report(of(comparison, comparison), tmp_path)
    try_report(tmp_path)

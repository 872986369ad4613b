"""The page as text, and as a real browser shows it."""

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bpwise.convert.plan import LinearCost
from bpwise.eval.comparison import Comparison
from bpwise.eval.metrics.drift import BlockDrift
from bpwise.eval.metrics.estimate import Estimate
from bpwise.eval.report.content import Report
from bpwise.eval.report.extras import Extras
from bpwise.eval.report.report import write_report
from bpwise.eval.report.series import SeriesOutput, write_series_report
from bpwise.eval.tasks.benchmarks import TaskReport
from bpwise.eval.tasks.needle import DEPTHS, NeedleCell, NeedleLength, NeedleModel, NeedleReport
from bpwise.eval.tasks.scores import QuantizedScore, TaskScore

from ...policed import Policed

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e&\"'"


def costs(blocks: int = 3) -> tuple[LinearCost, ...]:
    linears = [
        LinearCost(f"model.layers.{block}.{kind}", 3 + (block + place) % 6, 10.0 ** -(block + place))
        for block in range(blocks)
        for place, kind in enumerate(("self_attn.q_proj", "mlp.down_proj"))
    ]
    return (*linears, LinearCost("lm_head", 6.0, 1e-4))


def variant(comparison: Comparison, name: str, kl: float, size: int) -> Comparison:
    return replace(
        comparison,
        quantized=replace(comparison.quantized, name=name, stored_bytes=size),
        summary=replace(comparison.summary, kl_nats=Estimate(kl, kl / 10)),
        bfloat16_floor_nats=1e-5,
        drift=tuple(
            BlockDrift(block=block, error=Estimate(kl * 2**step, kl / 9), first_token=Estimate(kl, None))
            for step, block in enumerate((None, 0, 1, 2))
        ),
    )


def extras(names: list[str]) -> Extras:
    """A group of two benchmarks, and needles at two lengths: as many models as names after the original's."""

    def score(task: str, part_of: str | None, questions: int) -> TaskScore:
        return TaskScore(
            task=task,
            part_of=part_of,
            metric="acc",
            filter="none" if part_of else HOSTILE,
            version="1.0",
            fewshot=5,
            questions=questions,
            higher_is_better=True,
            original=Estimate(0.5, 0.01),
            quantized=tuple(
                QuantizedScore(score=Estimate(0.475, 0.01), difference=Estimate(-0.025, 0.004), changed=0.0875)
                for _ in names[1:]
            ),
        )

    tasks = TaskReport(
        original=names[0],
        quantized=tuple(names[1:]),
        scores=(score(HOSTILE, None, 300), score("part-a", HOSTILE, 100), score("part-b", HOSTILE, 200)),
        engine="lm-eval 0",
        limit=None,
        num_fewshot=None,
        batch_size="1",
        apply_chat_template=False,
        dtype="float32",
        device="cpu",
        seconds=1.0,
    )
    needle = NeedleReport(
        models=tuple(
            NeedleModel(
                name=name,
                cells=tuple(
                    NeedleCell(length=length, depth=depth, found=depth, nats=2.5)
                    for length in (512, 131072)
                    for depth in DEPTHS
                ),
                lengths=tuple(
                    NeedleLength(
                        length=length,
                        found=Estimate(0.5, 0.25),
                        nats=Estimate(2.5, 0.5),
                        found_change=Estimate(-0.25, 0.125) if number else None,
                        nats_change=Estimate(1.5, 0.25) if number else None,
                    )
                    for length in (512, 131072)
                ),
            )
            for number, name in enumerate(names)
        ),
        samples=4,
        text="some text",
        dtype="float32",
        device="cpu",
        seconds=1.0,
    )
    return Extras(tasks=tasks, needle=needle)


@pytest.fixture
def several(comparison: Comparison) -> list[Comparison]:
    return [
        variant(comparison, "m-8bpw", 0.0009, 9_000_000),
        variant(comparison, HOSTILE, 0.3, 3_000_000),
        variant(comparison, "m-10bpw", 0.0001, 11_000_000),
    ]


def write(several: list[Comparison], folder: Path) -> Path:
    details = {HOSTILE: {"a": HOSTILE, "b": 1.5}}
    names = [several[0].original.name, *(each.quantized.name for each in several)]
    report = Report(comparisons=tuple(several), details=details, costs=(costs(), costs(), ()), extras=extras(names))
    return write_report(report, folder, plots=["svg"]).html


def write_series(several: list[Comparison], folder: Path) -> Path:
    outputs = [
        SeriesOutput(
            path=Path(each.quantized.name),
            format="exl2",
            asked=4.0,
            bpw=3.99,
            file_bytes=each.quantized.stored_bytes,
            predicted_nats=0.01,
            comparison=each,
        )
        for each in several
    ]
    broken = SeriesOutput(path=Path(HOSTILE), format="exl2", asked=2.0, broken=HOSTILE * 3)
    return write_series_report(HOSTILE, [*outputs, broken], folder, {"EXL2": "of all linears"})


class TestText:
    def test_needs_nothing_else(self, several: list[Comparison], tmp_path: Path) -> None:
        text = write(several, tmp_path).read_text()
        assert not re.findall(r"""(?:src|href)=(?!["']data:,)""", text.replace("&lt;img src=x", ""))
        assert "@import" not in text
        assert "url(" not in text
        addresses = set(re.findall(r"https?://[^\"'<\s]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not a place

    def test_everything_is_escaped(self, several: list[Comparison], tmp_path: Path) -> None:
        hostile = replace(several[1], text=HOSTILE, original=replace(several[1].original, name=HOSTILE))
        details, more = {"x": {HOSTILE: HOSTILE}}, extras([HOSTILE] * 2)
        report = Report(comparisons=(hostile,), details=details, costs=(costs(),), extras=more)
        single = write_report(report, tmp_path / "single", plots=["svg"])
        for text in (write(several, tmp_path).read_text(), single.html.read_text()):
            assert "<img" not in text
            assert "alert(1)</script>" not in text
            assert "\u202e" not in text
            assert text.count("<script") == text.count("</script") == 1
        for path in single.plots:
            assert "<img" not in path.read_text()

    def test_the_policy_allows_nothing_but_the_pages_own(self, several: list[Comparison], tmp_path: Path) -> None:
        page = Policed(write(several, tmp_path).read_text())
        assert page.refused == []
        assert page.policy.pop("script-src")[0].startswith("'sha256-")
        assert page.policy.pop("style-src")[0].startswith("'sha256-")
        nothing = {name: ["'none'"] for name in ("default-src", "base-uri", "form-action")}
        assert page.policy == nothing | {"img-src": ["data:"]}

    def test_extras(self, several: list[Comparison], tmp_path: Path) -> None:
        page = write(several, tmp_path)
        markdown, text = page.with_suffix(".md").read_text(), page.read_text()
        # Parts of groups stand on the page only; there what belongs to a number stands beneath it.
        assert markdown.count("47.50 % (-2.50 ± 0.40 %; 8.8 % changed)") == 3
        assert text.count("47.50 %<small>-2.50 ± 0.40 %; 8.8 % changed</small>") == 3 * 3
        for each in (markdown, text.replace("<small>", " (").replace("</small>", ")")):
            assert "50.00 ± 1.00 %" in each
            assert "50.00 ± 25.00 % (-25.00 ± 12.50 %)" in each
            assert "2.50 ± 0.50 (+1.500 ± 0.250)" in each
        assert "| 25 % | 25 % | 25 % |" in markdown
        assert "| block 2 |" in markdown
        assert "| bfloat16 alone | 1e-05 nats per token" in markdown
        with (tmp_path / "report.tasks.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 3 * 4
        assert [row["difference"] for row in rows[:2]] == ["", "-0.025"]
        assert {row["part_of"] for row in rows} == {"", HOSTILE}
        assert (tmp_path / "report.needle.csv").exists()
        # Without benchmarks: their tables are not of this report.
        write_report(Report(comparisons=tuple(several)), tmp_path)
        assert not list(tmp_path.glob("report.*.csv"))

    def test_below_bfloat16(self, comparison: Comparison, tmp_path: Path) -> None:
        tiny = variant(comparison, "tiny", 5e-6, 1)
        files = write_report(Report(comparisons=(tiny,)), tmp_path)
        assert "smaller than the effect of running the original in bfloat16" in files.html.read_text()
        assert "below 1e-05 nats per token: less than running the original in bfloat16" in files.markdown.read_text()

    def test_ids_where_there_is_no_tokenizer(self, comparison: Comparison, tmp_path: Path) -> None:
        worst = comparison.profile.worst[0]
        bare = replace(
            worst,
            context=None,
            original=replace(worst.original, text=None),
            original_choices=tuple(replace(choice, text=None) for choice in worst.original_choices),
        )
        profile = replace(comparison.profile, worst=(bare,))
        text = write_report(Report(comparisons=(replace(comparison, profile=profile),)), tmp_path).html.read_text()
        assert f"#{worst.original.id}</mark>" in text
        assert " ".join(map(str, worst.context_ids)) in text

    def test_one_row_has_no_errors(self, comparison: Comparison, tmp_path: Path) -> None:
        alone = replace(
            comparison, summary=replace(comparison.summary, kl_nats=Estimate(0.0, None)), rows=1, floor_nats=0.0
        )
        text = write_report(Report(comparisons=(alone,)), tmp_path).html.read_text()
        assert "as far as can be measured" in text
        assert "based on only 1 sequence of text" in text


def show(browser: Any, page: Path, *, width: int = 1200, mode: str = "light") -> None:
    feature = {"name": "prefers-color-scheme", "value": mode}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def column(browser: Any, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('#models tbody tr')].map(r => r.cells[arguments[0]].dataset.key)"
    keys: list[str] = browser.execute_script(script, number)
    return keys


class TestBrowser:
    def test_no_errors_and_all_plots_have_marks(self, browser: Any, several: list[Comparison], tmp_path: Path) -> None:
        show(browser, write(several, tmp_path))
        assert browser.get_log("browser") == []
        marks = browser.execute_script(
            "return Object.fromEntries([...document.querySelectorAll('svg[aria-label]')].map(s => [s.ariaLabel, "
            "[...s.querySelectorAll('.mark')].filter(m => m.getBoundingClientRect().width > 0).length]))"
        )
        buckets, kinds = len(several[0].profile.positions), len(several[0].profile.kinds)
        expected = {
            "KL divergence of single tokens": 3,
            "KL divergence by position in the text": 3 * (buckets + 1),
            "KL divergence against size": 3 + 1,
            "KL divergence by kind of text": 3 * kinds,
            "Damage — m-8bpw": 7,
            "Bits per weight — m-8bpw": 7,
            "Measured error by block, other tokens": 3 * (3 + 1),
            "Measured error by block, first token": 3 * (3 + 1),
            "Needles found — m-8bpw": 2 * len(DEPTHS),
        }
        assert {name: marks[name] for name in expected} == expected
        assert len(marks) == 14

    def test_bars_of_a_single_model(self, browser: Any, comparison: Comparison, tmp_path: Path) -> None:
        show(browser, write_report(Report(comparisons=(comparison,)), tmp_path).html)
        assert browser.get_log("browser") == []
        count = browser.execute_script(
            "return document.querySelector('svg[aria-label]').querySelectorAll('rect.mark').length"
        )
        assert count == len(comparison.profile.histogram.counts)
        assert "4.1 MB, 26 % of the original" in browser.find_element("id", "verdict").text

    def test_plots_are_files_too(self, browser: Any, several: list[Comparison], tmp_path: Path) -> None:
        write(several, tmp_path)
        paths = sorted((tmp_path / "report-plots").iterdir())
        assert len(paths) == 14
        for path in paths:
            show(browser, path)
            assert browser.execute_script("return document.querySelectorAll('.mark').length") > 0
        assert browser.get_log("browser") == []

    def test_table_sorts(self, browser: Any, several: list[Comparison], tmp_path: Path) -> None:
        show(browser, write(several, tmp_path))
        buttons = browser.find_elements("css selector", "#models th button")
        assert column(browser, 1) == ["0.0", "0.0009", "0.3", "0.0001"]
        buttons[1].click()
        assert column(browser, 1) == ["0.0", "0.0001", "0.0009", "0.3"]
        buttons[1].click()
        assert column(browser, 1) == ["0.3", "0.0009", "0.0001", "0.0"]
        heads = browser.find_elements("css selector", "#models th")
        assert [head.get_attribute("aria-sort") for head in heads][:3] == [None, "descending", None]
        buttons[3].click()  # sizes: as numbers 11 MB is more than 9 MB
        assert column(browser, 3) == ["3000000", "9000000", "11000000", "16000000"]
        buttons[0].click()  # names: numbers in them count as numbers too
        names = column(browser, 0)
        assert names.index("m-8bpw") < names.index("m-10bpw")

    @pytest.mark.parametrize("mode", ["light", "dark"])
    @pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desk"])
    @pytest.mark.parametrize("kind", ["one", "several", "series"])
    def test_fits_and_can_be_read(
        self, browser: Any, several: list[Comparison], tmp_path: Path, kind: str, width: int, mode: str
    ) -> None:
        make = write_series if kind == "series" else write
        page = make(several[1:2] if kind == "one" else several, tmp_path)
        show(browser, page, width=width, mode=mode)
        browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        ink, paper = browser.execute_script(
            "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        )
        light = {"light": paper, "dark": ink}[mode], {"light": ink, "dark": paper}[mode]
        bright, dim = (sum(numbers(color)) for color in light)
        assert bright > 600
        assert dim < 200
        # Nothing but the cells of maps has to be moved aside to be read.
        wide = "t => t.offsetWidth > t.parentNode.clientWidth"
        assert browser.execute_script(f"return [...document.querySelectorAll('table')].filter({wide}).length") == 0
        ends = (
            "return [...document.querySelectorAll('svg text:not([text-anchor=middle])')]"
            ".filter(t => t.getBoundingClientRect().right > t.closest('.card').getBoundingClientRect().right)"
            ".map(t => t.textContent)"
        )
        assert browser.execute_script(ends) == []
        if width < 600:
            label = "return getComputedStyle(document.querySelector('#models td[data-label]'), '::before').content"
            assert browser.execute_script(label) == '"KL, nats/token"'

    def test_of_several_the_sizes_come_first(self, browser: Any, several: list[Comparison], tmp_path: Path) -> None:
        show(browser, write(several, tmp_path))
        title, *texts = browser.execute_script(
            "const s = document.querySelector('svg');"
            "return [s.ariaLabel, ...[...s.querySelectorAll('text')].map(t => t.textContent)]"
        )
        assert title == "KL divergence against size"
        assert {"m-8bpw", "m-10bpw"} <= set(texts)
        top = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
        assert browser.execute_script(top, "svg") < browser.execute_script(top, "#models")

    def test_numbers_are_explained(self, browser: Any, several: list[Comparison], tmp_path: Path) -> None:
        show(browser, write(several, tmp_path))
        fold = browser.find_element("id", "meanings")
        assert "Q4_K_M" not in fold.text
        fold.find_element("tag name", "summary").click()
        rows = [row.text for row in fold.find_elements("css selector", "tr")]
        # As tools/perplexity/README.md of llama.cpp has them, and in this page's words.
        assert "Q4_K_M 0.0313 91.9 % 5.519 % 4.58 GiB close to the original" in rows
        assert "Q8_0 0.0014 97.7 % 1.198 % 7.96 GiB indistinguishable in use" in rows

    def test_details_open(self, browser: Any, several: list[Comparison], tmp_path: Path) -> None:
        show(browser, write(several, tmp_path))
        cards = browser.find_elements("css selector", "details[open] .tokens .card")
        assert len(cards) == 2 * 4  # two of each sequence
        shown = browser.execute_script(
            "return [...document.querySelectorAll('details[open] .tokens .card')[0].querySelectorAll('li')].length"
        )
        assert shown == 10


def numbers(color: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", color)[:3]]

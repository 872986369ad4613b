"""The Python interface as its users meet it: signatures, strings, formats by name, what notebooks show."""

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bpwise
import pytest
from bpwise.convert.exl2.options import Exl2Options
from bpwise.convert.gguf.options import GgufOptions
from bpwise.convert.gguf.plan.plan import TypeOverride
from bpwise.eval.config import EvalConfig
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.progress import (
    ExpectedPart,
    ProgressBars,
    ProgressEvent,
    ProgressEvents,
    RunForecast,
    default_progress,
    silent,
)
from bpwise.quantize.config import chosen_evaluation, chosen_target, options_naming
from bpwise.tables import Table, html_summary

from .runs import refused

FUNCTIONS = [name for name in bpwise.__all__ if inspect.isfunction(getattr(bpwise, name))]
MEASURE = MeasureConfig(calibration=CalibrationConfig(rows=4, row_tokens=32), device="cpu")
EVALUATE = EvalConfig(rows=2, row_tokens=32, device="cpu")


def test_an_editor_sees_all_names() -> None:
    assert set(bpwise.__all__) <= set(dir(bpwise))
    assert {"quantize_model", "measure_model", "push_model", "write_card", "export_imatrix"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_tell_all(name: str) -> None:
    signature = inspect.signature(getattr(bpwise, name))
    for parameter in signature.parameters.values():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        assert parameter.annotation not in (parameter.empty, "Any")
        # A path may be a string everywhere.
        assert "Path" not in str(parameter.annotation) or "str | Path" in str(parameter.annotation), parameter


@pytest.mark.parametrize(
    ("name", "made"), [("a.gguf", GgufOptions), ("a.GGUF", GgufOptions), ("a", Exl2Options), ("a.b", Exl2Options)]
)
def test_the_name_chooses_the_format(name: str, made: type) -> None:
    assert options_naming(Path(name)) == made()


NO_SIZE = {"bpw": None, "max_bytes": None}


def test_without_a_size_it_is_the_command_lines() -> None:
    exl2 = {"target": bpwise.Target(bpw=8.0), "options": Exl2Options(head_bits=8)}
    assert chosen_target(Path("a"), None, NO_SIZE) == exl2
    assert chosen_target(Path("a.gguf"), None, NO_SIZE) == {"target": bpwise.Target(bpw=4.5), "options": GgufOptions()}
    own = GgufOptions(feedback=False)
    assert chosen_target(Path("a"), own, NO_SIZE) == {"target": bpwise.Target(bpw=4.5), "options": own}
    tuned = {"target": bpwise.Target(bpw=8.0), "options": Exl2Options(effort="high", head_bits=8)}
    assert chosen_target(Path("a"), Exl2Options(effort="high"), NO_SIZE) == tuned
    six = Exl2Options(head_bits=6)
    assert chosen_target(Path("a"), six, NO_SIZE) == {"target": bpwise.Target(bpw=8.0), "options": six}
    mixture = GgufOptions(mixture="Q4_0")
    assert chosen_target(Path("a"), mixture, NO_SIZE) == {"target": None, "options": mixture}
    sized = chosen_target(Path("a"), None, {"bpw": None, "max_bytes": 1000})
    assert sized == {"target": bpwise.Target(max_bytes=1000), "options": Exl2Options(head_bits=6)}


@pytest.mark.parametrize(
    ("output", "line", "given", "target", "head"),
    [
        ("a", (), {}, {"bpw": 8.0}, 8),
        ("a", ("-b", 8), {"bpw": 8.0}, {"bpw": 8.0}, 6),
        ("a", ("-b", 4.5, "-hb", 4), {"bpw": 4.5, "options": Exl2Options(head_bits=4)}, {"bpw": 4.5}, 4),
        ("a", ("-ss", 1), {"options": Exl2Options(shard_bytes=1 << 20)}, {"bpw": 8.0}, 8),
        ("a", ("-hb", 6), {"options": Exl2Options(head_bits=6)}, {"bpw": 8.0}, 6),
        ("a", ("--max-size", "150kB"), {"max_bytes": 150_000}, {"max_bytes": 150_000}, 6),
        (
            "a",
            ("--vram", "8.5GB", "--context", 64),
            {"vram_bytes": 8_500_000_000, "context_tokens": 64},
            {"vram_bytes": 8_500_000_000, "context_tokens": 64},
            6,
        ),
        ("a.gguf", (), {}, {"bpw": 4.5}, None),
        ("a.gguf", ("--no-feedback",), {"options": GgufOptions(feedback=False)}, {"bpw": 4.5}, None),
        ("a.gguf", ("-b", 9), {"bpw": 9.0}, {"bpw": 9.0}, None),
        ("a.gguf", ("--type", "Q8_0"), {"options": GgufOptions(mixture="Q8_0")}, None, None),
    ],
    ids=str,
)
def test_both_routes_make_the_same(
    output: str,
    line: tuple[object, ...],
    given: dict[str, Any],
    target: dict[str, Any] | None,
    head: int | None,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def begin(lines: Any, *_: Any, **__: Any) -> None:
        ((_, config, _),) = lines
        seen.append((config.target, config.options))
        raise bpwise.BpwiseError("seen")

    monkeypatch.setattr("bpwise.quantize.run.begin_jobs", begin)
    monkeypatch.setattr("bpwise.quantize.run.require_convertible", lambda _: None)  # ggml may be missing
    with pytest.raises(bpwise.BpwiseError, match="seen"):
        bpwise.quantize_model(tiny_model, tmp_path / output, **given)
    assert refused("quantize", tiny_model, tmp_path / output, *line) == "Error: seen"
    assert seen[0] == seen[1]
    assert seen[0][0] == (None if target is None else bpwise.Target(**target))
    assert getattr(seen[0][1], "head", None) == head


def test_options_of_an_evaluation() -> None:
    assert chosen_evaluation(False) is None
    assert chosen_evaluation(True) == EvalConfig()
    assert chosen_evaluation(EVALUATE) is EVALUATE


def test_options_take_text() -> None:
    options = GgufOptions(llama_cpp="there", overrides=("blk.0.*=Q8_0",))  # type: ignore[arg-type]
    assert options.llama_cpp == Path("there")
    assert options.overrides == (TypeOverride.parse("blk.0.*=Q8_0"),)
    assert MeasureConfig(offload_dir="there").offload_dir == Path("there")  # type: ignore[arg-type]
    assert EvalConfig(offload_dir="there").offload_dir == Path("there")  # type: ignore[arg-type]


def test_an_unknown_format_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(bpwise.BpwiseError, match=r"Got \['ggml'\]. Expected one of exl2, gguf"):
        bpwise.measure_model(tiny_model, tmp_path / "m.safetensors", formats=["ggml"])


def test_a_measurement_in_memory_serves_a_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[ProgressEvent] = []
    measured = bpwise.measure_model(
        str(tiny_model), "m.safetensors", formats=["exl2"], measure=MEASURE, progress=ProgressEvents(events.append)
    )
    assert repr(measured).endswith("4 sequences of 32 tokens, for exl2)")
    assert {"measure: forward", "measure: backward, curves"} <= {event.label for event in events}
    assert all(event.seconds_left is not None and 0 <= event.done <= event.total for event in events)

    result = bpwise.quantize_model(str(tiny_model), "out", bpw=6.0, measurement=measured, evaluate=EVALUATE)
    assert result.bpw == result.verification.bpw <= 6.0
    assert result.file_bytes == sum(each.stat().st_size for each in Path("out").glob("*.safetensors"))
    assert result.comparison is not None
    assert result.kl == result.comparison.summary.kl_nats.value == result.comparison.kl
    assert result.verdict is not None and result.verdict in repr(result)
    assert result.measurement == Path("out.work/measurement.safetensors")
    assert bpwise.Measurement.load("out.work/measurement.safetensors").to_bytes() == measured.to_bytes()

    with pytest.raises(bpwise.BpwiseError, match="a mixture takes its importances from a file"):
        bpwise.quantize_model(
            tiny_model, "x.gguf", measurement=measured, options=GgufOptions(mixture="Q8_0"), evaluate=False
        )

    shown = result._repr_html_()
    assert shown.startswith("<p><b>out</b></p>") and result.verdict in shown and "<table" in shown
    assert "<table" in result.comparison._repr_html_() and len(repr(result.comparison)) < 200
    series = bpwise.quantize_series(tiny_model, "series", [6.0], measurement=measured, evaluate=False)
    (output,) = series.outputs
    assert (output.kl, output.verdict) == (None, None)
    assert repr(series) == f"SeriesResult({output.path.name})"
    assert output.path.name in series._repr_html_()
    assert series.measurement.is_file()
    for plan in (result.plan, bpwise.make_plan("m.safetensors", bpw=5.0)):
        assert repr(plan).startswith(f"Exl2Plan({plan.bpw:.4f} bpw, predicted damage ")
        assert "model.layers.0.self_attn.q_proj" in plan._repr_html_()


def test_html_is_harmless() -> None:
    evil = "<script>alert(1)</script>"
    shown = html_summary(evil, [evil], Table.of((evil,), [(evil,)]), folded=True)
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 4
    assert "<summary>1 rows</summary>" in shown


def test_events() -> None:
    told: list[ProgressEvent] = []
    progress = ProgressEvents(told.append)
    assert list(progress("ab", "evaluate: logits")) == ["a", "b"]
    assert [(event.label, event.done, event.total) for event in told] == [
        ("evaluate: logits", 0, 2),
        ("evaluate: logits", 1, 2),
        ("evaluate: logits", 2, 2),
    ]
    assert {event.seconds_left for event in told} == {None}
    progress.expect(RunForecast(parts=(ExpectedPart(step="round", label="later", seconds=60.0),)))
    assert list(progress([], "none")) == []
    assert told[-1] == ProgressEvent(label="none", place="1/1 round", done=0, total=0, seconds_left=60.0)


def test_bars(capsys: pytest.CaptureFixture[str]) -> None:
    bars = ProgressBars()
    bars.expect(RunForecast(parts=(ExpectedPart(step="round", label="later", seconds=3700.0),)))
    assert list(bars([1, 2], "measure: forward")) == [1, 2]
    shown = capsys.readouterr().err
    assert "[1/1 round] forward:   0%" in shown and "100%" in shown and "1:01:40 left of the run" in shown


@pytest.mark.parametrize(
    ("shell", "bars"),
    [(None, False), (SimpleNamespace(config={}), False), (SimpleNamespace(config={"IPKernelApp": {}}), True)],
    ids=["script", "ipython", "notebook"],
)
def test_bars_are_the_default_in_notebooks(shell: Any, bars: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert isinstance(default_progress(), ProgressBars) is bars
    monkeypatch.delitem(sys.modules, "IPython")
    assert default_progress() is silent


def test_one_target() -> None:
    with pytest.raises(bpwise.BpwiseError, match="target: none, or several"):
        bpwise.quantize_model("model", "out", bpw=4.0, max_bytes=1000)

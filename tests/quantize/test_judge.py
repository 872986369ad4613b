"""A broken model cannot look finished, and text that was calibrated on is no test."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.exl2.rounding.rounder import rounded_linear
from bpwise.errors import BrokenModelError, ConfigError
from bpwise.eval.config import EvalConfig
from bpwise.eval.publishing.mark import clear_mark, mark_broken, mark_path, read_mark
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.judge import Judge, broken_because
from bpwise.quantize.run import quantize_model
from click.testing import Result

from .runs import EVALUATION, TEXT, arguments, bpwise, exl2, measurement_of


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """From now on every linear is written with scales that are too large."""

    def spoiled(*arguments: Any, **named: Any) -> Any:
        linear = rounded_linear(*arguments, **named)
        return replace(linear, max_scales=(linear.max_scales.float() * factor).half())

    monkeypatch.setattr("bpwise.convert.exl2.conversion.rounded_linear", spoiled)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert bpwise("quantize", tiny_model, out, "--bpw", 4.5, *TEXT, *EVALUATION).exit_code == 0
    return out


@pytest.fixture
def command(tiny_model: Path, finished: Path, tmp_path: Path) -> Callable[..., Result]:
    """Quantize from the finished run's measurement to tmp_path/out."""

    def run(*options: object) -> Result:
        common = ("--bpw", 4.5, "--device", "cpu", "-m", measurement_of(finished))
        return bpwise("quantize", tiny_model, tmp_path / "out", *common, *options)

    return run


class TestBroken:
    @pytest.mark.parametrize(
        ("kl", "predicted", "broken"),
        [
            (1.01, 0.2, True),
            (0.99, 0.001, False),
            (1.5, 0.31, False),
            (3.0, None, False),
            (float("inf"), 2.0, True),
            (float("nan"), None, True),
        ],
        ids=["far-off", "below-a-nat", "foreseen", "no-plan", "infinite", "nan"],
    )
    def test_when(self, kl: float, predicted: float | None, broken: bool) -> None:
        assert (broken_because(kl, predicted) is not None) == broken

    def test_exit_code_mark_and_measurement(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        arguments = ("quantize", tiny_model, out, "--bpw", 4.5, *TEXT)
        with monkeypatch.context() as patch:
            spoil(patch, 12)
            result = bpwise(*arguments, *EVALUATION)
        assert result.exit_code == 1
        assert result.stdout == ""
        message = result.stderr.splitlines()[-1]
        assert message.startswith(f"Error: {out}: broken. Its mean KL divergence from the original is ")
        assert "the plan predicted 0.0" in message
        assert (tmp_path / "out.work" / "measurement.safetensors").is_file()
        assert [path.name for path in (tmp_path / "out.work").iterdir() if path.is_dir()] == []
        measured = json.loads((out / "report.json").read_text())["comparison"]["summary"]["kl_nats"]["value"]
        mark = (out / "BROKEN.md").read_text()
        assert measured > 1
        assert f"{measured:.3g} nats per token" in mark
        assert "Evaluated on: bpwise's own texts" in mark

        # The same command without evaluation, or with it, does not make it whole.
        again = bpwise(*arguments, "--no-eval")
        assert again.exit_code == 1
        assert "marked as broken by an earlier run. Its mean KL" in again.stderr
        assert bpwise(*arguments, *EVALUATION).exit_code == 1
        assert (out / "BROKEN.md").is_file()

    def test_an_evaluation_that_finds_nothing_takes_the_mark_away(
        self, command: Callable[..., Result], tmp_path: Path
    ) -> None:
        assert command("--no-eval").exit_code == 0
        mark_broken(tmp_path / "out", "It was.")
        assert command(*EVALUATION).exit_code == 0
        assert not (tmp_path / "out" / "BROKEN.md").exists()

    def test_logits_that_are_not_finite(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        spoil(monkeypatch, 3000)  # beyond float16, which the original is not
        config = exl2(
            measure=MeasureConfig(device="cpu"),
            evaluate=EvalConfig(rows=2, row_tokens=32, device="cpu", dtype="float16"),
        )
        with pytest.raises(BrokenModelError, match=r"broken. quantized model, .*: NaN or infinity"):
            quantize_model(tiny_model, out, **arguments(config), measurement=measurement_of(finished))
        assert "NaN or infinity" in (read_mark(out) or "")
        assert not (out / "report.json").exists()

    def test_marks_of_files_and_directories(self, tmp_path: Path) -> None:
        file, folder = tmp_path / "x.gguf", tmp_path / "y"
        file.write_bytes(b"")
        folder.mkdir()
        for output, name in ((file, tmp_path / "x.gguf.BROKEN.md"), (folder, folder / "BROKEN.md")):
            assert read_mark(output) is None
            assert mark_broken(output, "It\nis.") == mark_path(output) == name
            assert read_mark(output) == "It is."
            clear_mark(output)
            clear_mark(output)
            assert read_mark(output) is None


class TestEvaluationText:
    @pytest.fixture
    def words(self, tmp_path: Path) -> Path:
        path = tmp_path / "words.txt"
        path.write_text(" ".join(f"{number * number % 977}" for number in range(2000)))
        return path

    @pytest.fixture
    def copied(self, words: Path, tmp_path: Path) -> Path:
        """The same text under another name, after some of its own."""
        path = tmp_path / "copied.txt"
        path.write_text("Something new. " + words.read_text())
        return path

    def test_refused_before_the_long_work(
        self, tiny_model: Path, words: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bpwise.quantize.measuring.measure_checkpoint", lambda *_: pytest.fail("was measured"))
        result = bpwise(
            *("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, "-c", words, "-r", 40, "-l", 100),
            *("--device", "cpu", "--eval-text", copied, "--eval-rows", 8, "--eval-row-tokens", 100),
        )
        assert result.exit_code == 1
        assert "of its tokens are in the calibration text" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_forced(self, tiny_model: Path, words: Path, copied: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        small = ("--eval-rows", 8, "--eval-row-tokens", 100, "--force-eval-text")
        text = ("-c", words, "-r", 40, "-l", 100, "--device", "cpu")
        result = bpwise("quantize", tiny_model, out, "--bpw", 4.5, *text, "--eval-text", copied, *small)
        assert result.exit_code == 0, result.stderr
        share = json.loads((out / "report.json").read_text())["details"]["Evaluation text"]
        assert next(iter(share.values())) > 25
        for name in ("report.md", "README.md"):
            assert "NOT HELD OUT, at least" in (out / name).read_text()
        # The output itself remembers what it was calibrated on.
        again = ("eval", tiny_model, out, "--text", copied, "-r", 8, "-l", 100, "--device", "cpu")
        refused = bpwise(*again)
        assert refused.exit_code == 1
        assert "of its tokens are in the calibration text" in refused.stderr
        assert bpwise(*again, "--force-eval-text").exit_code == 0
        assert "NOT HELD OUT, at least" in (out / "report.md").read_text()
        # Other text is welcome, and so is any text for a model that does not say.
        other = tmp_path / "other.txt"
        other.write_text(" ".join(f"{number}" for number in range(10000, 10400)))
        assert bpwise("eval", tiny_model, out, "--text", other, "-r", 8, "-l", 100, "--device", "cpu").exit_code == 0
        (out / "bpwise.json").unlink()
        assert bpwise(*again).exit_code == 0

    def test_the_same_name(self) -> None:
        measure = MeasureConfig(calibration=CalibrationConfig(source="a.txt"))
        with pytest.raises(ConfigError, match=r"a\.txt: cannot be calibration and evaluation text at once"):
            exl2(measure=measure, evaluate=EvalConfig(text="a.txt"))
        exl2(measure=measure, evaluate=EvalConfig(text="a.txt", allow_calibration_text=True))

    def test_held_out_text_is_said_to_be(self, finished: Path) -> None:
        section = json.loads((finished / "report.json").read_text())["details"]["Evaluation text"]
        assert list(section.values()) == [0]


def test_copies_keep_their_mark(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "a")
    mark_broken(tmp_path / "a", "It is.")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_mark(tmp_path / "b") == "It is."
    verified = bpwise("verify", tmp_path / "b")
    assert verified.exit_code == 0  # its bytes are what was intended
    assert "is marked as broken. It is." in verified.stderr


def test_a_device_that_is_not_there_shows_first(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device: cannot be used here .*Got 'cuda:99'"):
        Judge(Checkpoint.open(tiny_model), EvalConfig(device="cuda:99"))
    result = bpwise("quantize", tiny_model, tmp_path / "x.gguf", "--type", "Q8_0", "--device", "cuda:99")
    assert result.exit_code == 1
    assert "device: cannot be used here" in result.stderr

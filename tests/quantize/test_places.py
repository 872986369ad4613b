"""Places that people name: in each other's way, read-only, gone, of others; and what a run may do there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.files.paths import reserved
from bpwise.checkpoint.files.resume import ResumeStore
from bpwise.errors import WorkDirectoryError
from bpwise.eval.publishing.mark import mark_broken
from bpwise.measure.measurement import Measurement
from bpwise.quantize import judge
from bpwise.quantize import measuring as obtain

from .runs import EVALUATION, TEXT, bpwise, measurement_of, refused, succeed

DRIFT = "Drift of the hidden states (first token, other tokens; relative)"


def weights(directory: Path) -> bytes:
    return (directory / "output.safetensors").read_bytes()


def report(directory: Path, prefix: str = "") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / f"{prefix}report.json").read_text())
    return content


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that no test may change, its work directory beside it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    succeed("quantize", tiny_model, out, "--bpw", 4.5, *TEXT, *EVALUATION)
    return out


@pytest.fixture(scope="module")
def measurement(finished: Path) -> Path:
    return measurement_of(finished)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / "out"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("began to work")

    monkeypatch.setattr(obtain, "measure_checkpoint", fail)
    monkeypatch.setattr("bpwise.measure.run.measure_checkpoint", fail)
    monkeypatch.setattr("bpwise.measure.run.load_or_make_rows", fail)
    monkeypatch.setattr("bpwise.eval.comparison.evaluation_rows", fail)
    monkeypatch.setattr(judge, "evaluation_rows", fail)


class TestReadOnly:
    """Where nobody may write, root included: it shows in one sentence, before any work."""

    PLACE = "/proc/nowhere"

    @pytest.mark.parametrize(
        "options",
        [
            ("quantize", "MODEL", "PLACE", "--bpw", 4.5),
            ("quantize", "MODEL", "PLACE", "--bpw", "4.5,3.5"),
            ("quantize", "MODEL", "PLACE.gguf", "--bpw", 5),
            ("quantize", "MODEL", "PLACE.gguf", "--type", "Q8_0"),
            ("quantize", "MODEL", "OUT", "--bpw", 4.5, "--work-dir", "PLACE"),
            ("quantize", "MODEL", "OUT", "--bpw", "4.5,3.5", "--work-dir", "PLACE"),
            ("quantize", "MODEL", "OUT", "--bpw", 4.5, "--offload-dir", "PLACE"),
            ("quantize", "MODEL", "OUT.gguf", "--bpw", 5, "--offload-dir", "PLACE"),
            ("measure", "MODEL", "-o", "PLACE"),
            ("measure", "MODEL", "-o", "OUT", "--work-dir", "PLACE"),
            ("measure", "MODEL", "-o", "OUT", "--offload-dir", "PLACE"),
            ("plan", "MEASUREMENT", "--bpw", 4.5, "-o", "PLACE"),
            ("plan", "MEASUREMENT", "--format", "gguf", "--bpw", 5, "-o", "PLACE"),
            ("plan", "MEASUREMENT", "--html", "PLACE"),
            ("measure", "MODEL", "-o", "OUT", "--keep-hessians", "PLACE"),
            ("export", "MEASUREMENT", "--for", "exllamav3", "--bpw", 5, "-o", "PLACE"),
            ("imatrix", "MEASUREMENT", "-o", "PLACE"),
            ("imatrix", "MEASUREMENT", "-o", "PLACE.dat"),
            ("eval", "MODEL", "FINISHED", "-o", "PLACE"),
            ("eval", "MODEL", "FINISHED", "FINISHED", "-o", "PLACE"),
            ("eval", "MODEL", "FINISHED", "-o", "OUT", "--cache-dir", "PLACE"),
            ("eval", "MODEL", "FINISHED", "-o", "OUT", "--offload-dir", "PLACE"),
            ("dequantize", "FINISHED", "PLACE"),
        ],
        ids=lambda options: " ".join(map(str, options)),
    )
    @pytest.mark.usefixtures("no_work")
    def test_shows_before_the_work(
        self, options: tuple[object, ...], tiny_model: Path, finished: Path, measurement: Path, tmp_path: Path
    ) -> None:
        names = {"MODEL": tiny_model, "FINISHED": finished, "MEASUREMENT": measurement}
        places = [str(names.get(str(each), each)).replace("PLACE", self.PLACE) for each in options]
        message = refused(*(place.replace("OUT", str(tmp_path / "out")) for place in places))
        assert self.PLACE in message
        assert "cannot be written" in message
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("no_work")
    def test_the_report_of_eval_in_the_model_itself(
        self, tiny_model: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read_only(path: Path, _: bytes) -> None:
            raise PermissionError(13, os.strerror(13), str(path))

        monkeypatch.setattr("bpwise.checkpoint.files.operations.write", read_only)
        assert "report.json: cannot be written" in refused("eval", tiny_model, copied, "-r", 2, "-l", 32)


@pytest.mark.usefixtures("no_work")
def test_a_place_for_drawings_that_is_none(tiny_model: Path, copied: Path) -> None:
    (copied / "report-plots").write_text("")
    assert "report-plots: in the way" in refused("eval", tiny_model, copied, "--plots")


def test_numbers_are_shown_though_the_report_finds_no_room(
    tiny_model: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: object) -> None:
        raise WorkDirectoryError(f"{path}: not written, the disk is full")

    monkeypatch.setattr("bpwise.eval.report.report.write_json", full)
    result = bpwise("eval", tiny_model, copied, "-r", 2, "-l", 32, "--device", "cpu", "-o", tmp_path / "report")
    assert result.exit_code == 1
    assert "report.json: not written" in result.stderr
    assert "KL" in result.stdout


class TestInTheWay:
    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize(
        "options",
        [
            ("measure", "MODEL", "-o", "MODEL/m.safetensors"),
            ("measure", "MODEL", "-o", "MODEL/model.safetensors", "--force"),
            ("measure", "MODEL", "-o", "OUT", "--work-dir", "MODEL"),
            ("quantize", "MODEL", "MODEL", "--bpw", 4.5),
            ("quantize", "MODEL", "MODEL/out", "--bpw", 4.5),
            ("quantize", "MODEL", "MODEL/out", "--bpw", "4.5,3.5"),
            ("quantize", "MODEL", "MODEL/m.gguf", "--bpw", 5),
            ("quantize", "MODEL", "MODEL/m.gguf", "--type", "Q8_0"),
            ("quantize", "MODEL", "OUT", "--bpw", 4.5, "--work-dir", "OUT"),
            ("quantize", "MODEL", "OUT", "--bpw", "4.5,3.5", "--work-dir", "OUT"),
            ("quantize", "MODEL", "OUT", "--bpw", 4.5, "--work-dir", "OUT/work"),
            ("quantize", "MODEL", "OUT", "--bpw", 4.5, "--offload-dir", "OUT/states"),
            ("eval", "MODEL", "FINISHED", "-o", "MODEL/report"),
            ("eval", "MODEL", "FINISHED", "-o", "OUT", "--cache-dir", "MODEL"),
            ("plan", "MEASUREMENT", "--bpw", 4.5, "-o", "MEASUREMENT", "--force"),
            ("plan", "MEASUREMENT", "--html", "MEASUREMENT", "--force"),
            ("measure", "MODEL", "-o", "OUT", "--keep-hessians", "MODEL"),
            ("measure", "MODEL", "-o", "OUT", "--keep-hessians", "OUT"),
            ("export", "MEASUREMENT", "--for", "exllamav3", "--bpw", 5, "-o", "MEASUREMENT", "--force"),
            ("imatrix", "MEASUREMENT", "-o", "MEASUREMENT", "--force"),
        ],
        ids=lambda options: " ".join(map(str, options)),
    )
    def test_nothing_goes_into_what_is_read(
        self, options: tuple[object, ...], tiny_model: Path, finished: Path, measurement: Path, tmp_path: Path
    ) -> None:
        model, own = tmp_path / "model", tmp_path / "measurement.safetensors"
        shutil.copytree(tiny_model, model)
        shutil.copyfile(measurement, own)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        names = {"MODEL": model, "FINISHED": finished, "MEASUREMENT": own, "OUT": tmp_path / "out"}
        command = [str(each) for each in options]
        for name, path in names.items():
            command = [each.replace(name, str(path)) if each.split("/")[0] == name else each for each in command]
        refused(*command)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize(
        "options",
        [
            ("measure", "MODEL", "-o", "FILE", "--formats", "exl2", *TEXT),
            ("plan", "MEASUREMENT", "--bpw", 4.5, "-o", "FILE"),
            ("plan", "MEASUREMENT", "--html", "FILE"),
        ],
        ids=["measure", "plan", "html"],
    )
    def test_other_files_are_replaced_only_by_force(
        self, options: tuple[object, ...], tiny_model: Path, measurement: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "thesis"
        names = {"MODEL": tiny_model, "MEASUREMENT": measurement, "FILE": file}
        command = [names.get(str(each), each) for each in options]
        succeed(*command)
        made = file.read_bytes()
        succeed(*command)  # its own is replaced
        assert file.read_bytes() == made
        for theirs in (b"the only copy", b"{}", b'{"weights": []}', (tiny_model / "model.safetensors").read_bytes()):
            file.write_bytes(theirs)
            assert "replace it with --force" in refused(*command)
            assert file.read_bytes() == theirs
        succeed(*command, "--force")
        assert file.read_bytes() == made

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("name", ["report.md", "report.csv", "report.json", "report.html", "report.tasks.csv"])
    def test_reports_of_others_are_not_replaced(
        self, name: str, tiny_model: Path, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path(name).write_text('{"thesis": "the only copy"}')
        assert f"{name}: in the way" in refused("eval", tiny_model, copied, copied)  # several: into this directory
        assert f"{name}: in the way" in refused("quantize", tiny_model, ".", "--bpw", "4.5,3.5", *TEXT)
        assert Path(name).read_text() == '{"thesis": "the only copy"}'

    def test_a_quantized_model_is_read_as_one_too(self, copied: Path) -> None:
        before = {path.name for path in copied.iterdir()}
        assert "read as one model" in refused("dequantize", copied, copied / "dense")
        assert {path.name for path in copied.iterdir()} == before

    def test_own_reports_are_replaced(self, tiny_model: Path, copied: Path, tmp_path: Path) -> None:
        command = ("eval", tiny_model, copied, "-r", 2, "-l", 32, "--device", "cpu", "-o", tmp_path / "report")
        succeed(*command)
        succeed(*command)
        (tmp_path / "report" / "report.json").unlink()
        succeed(*command)

    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize(
        "options", [("--bpw", "4.5"), ("--bpw", "4.5,3.5"), ("--format", "gguf", "--bpw", "5")], ids=" ".join
    )
    def test_two_runs_do_not_make_the_same_output(
        self, options: tuple[str, ...], tiny_model: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / ("out.gguf" if "gguf" in options else "out")
        with reserved(out):
            message = refused("quantize", tiny_model, out, *options, *TEXT, "--work-dir", tmp_path / "other")
        assert f"{out}: in use by another bpwise run" in message
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("no_work")
    def test_two_runs_do_not_make_the_same_measurement(self, tiny_model: Path, tmp_path: Path) -> None:
        with reserved(tmp_path / "m"):
            assert "in use" in refused("measure", tiny_model, "-o", tmp_path / "m", "--work-dir", tmp_path / "w")


def test_a_home_as_work_directory(tiny_model: Path, measurement: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "photos" / "2020").mkdir(parents=True)
    (home / "photos" / "2020" / "1.jpg").write_text("the only copy")
    (home / ".ssh").mkdir()
    # What another run keeps there to go on with is not this run's either.
    ResumeStore(home, "rounded", {"model": "another"})
    before = {path.relative_to(home) for path in home.rglob("*")}
    command = ("--bpw", 4.5, "--no-eval", "--device", "cpu", "--work-dir", home)
    succeed("quantize", tiny_model, tmp_path / "home" / "q", *command, "-m", measurement)
    made = {Path("calibration.safetensors"), Path("finished.json"), Path("plan.json")}
    left = {path.relative_to(home) for path in home.rglob("*") if "q" not in path.relative_to(home).parts}
    assert left == before | made
    assert (home / "q" / "output.safetensors").is_file()


class TestWorkDirectoriesWithFiles:
    @pytest.mark.usefixtures("no_work")
    @pytest.mark.parametrize("output", ["out", "out.gguf"])
    @pytest.mark.parametrize(
        "name", ["plan.json", "measurement.safetensors", "calibration.safetensors", "finished.json"]
    )
    def test_those_of_others_are_not_replaced(self, name: str, output: str, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / name).write_text('{"format_version": "1.2"}')  # as another program's plan.json
        command = ("quantize", tiny_model, tmp_path / output, "--bpw", 5, *TEXT, "--work-dir", tmp_path)
        assert f"{name}: in the way" in refused(*command)
        assert (tmp_path / name).read_text() == '{"format_version": "1.2"}'

    @pytest.mark.parametrize("damage", ["empty", "cut", "other-version"])
    def test_a_measurement_that_cannot_be_read_is_made_again(
        self, damage: str, tiny_model: Path, measurement: Path, tmp_path: Path
    ) -> None:
        kept = tmp_path / "out.work" / "measurement.safetensors"
        kept.parent.mkdir()
        content = measurement.read_bytes()
        if damage == "other-version":
            kept.write_bytes(content.replace(b'\\"version\\": 7', b'\\"version\\": 5'))
            assert kept.read_bytes() != content
        else:
            kept.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
        if damage == "cut":
            rows = measurement.with_name("calibration.safetensors").read_bytes()
            (kept.parent / "calibration.safetensors").write_bytes(rows[: len(rows) // 2])
        succeed("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, "--no-eval")
        assert kept.read_bytes() == content


class TestNamesOfOutputs:
    @pytest.mark.parametrize("options", [("--bpw", "4.5"), ("--bpw", "4.5,4")], ids=["one", "series"])
    def test_the_current_directory(
        self,
        options: tuple[str, ...],
        tiny_model: Path,
        measurement: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = tmp_path / "mine"
        folder.mkdir()
        monkeypatch.chdir(folder)
        model = os.path.relpath(tiny_model)
        succeed("quantize", model, ".", *options, "--device", "cpu", *EVALUATION, "-m", measurement)
        outputs = [path.parent for path in Path().rglob("output.safetensors")]  # as a shell that stands there sees it
        assert len(outputs) == len(options[1].split(","))
        assert {path.name for path in tmp_path.iterdir()} == {"mine", "mine.work"}
        monkeypatch.chdir(outputs[0])
        for command in (("verify", "."), ("inspect", "."), ("card", "."), ("eval", tiny_model, ".", "-r", 2, "-l", 32)):
            succeed(*command)

    def test_the_directory_above(self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").mkdir()
        monkeypatch.chdir(tmp_path / "a")
        assert f"{tmp_path}: exists already" in refused("quantize", tiny_model, "..", "--bpw", 4.5, *TEXT)

    @pytest.mark.parametrize("spelled", ["out/", "./out", "link", "link/", "~/out"])
    def test_other_spellings(
        self, spelled: str, tiny_model: Path, measurement: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "disk").mkdir()
        (tmp_path / "link").symlink_to("disk")
        command = ("--bpw", 4.5, "--device", "cpu", "--no-eval", "-m", measurement)
        succeed("quantize", tiny_model, spelled, *command)
        target = tmp_path / ("disk" if "link" in spelled else "out")
        assert (target / "output.safetensors").is_file()
        name = "link" if "link" in spelled else "out"
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "link", target.name, f"{name}.work"}
        succeed("quantize", tiny_model, spelled, *command)

    def test_no_name_at_all(self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        result = bpwise("quantize", tiny_model, "", "--bpw", 4.5, *TEXT)
        assert result.exit_code == 2
        assert "the path is empty" in result.stderr
        assert list(tmp_path.iterdir()) == []


class TestGone:
    """Work directories that are cleared away under a run, wholly or file by file."""

    @pytest.fixture
    def during(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int, Callable[[], object]], None]]:
        with monkeypatch.context() as patch:

            def set_up(stage: str, after: int, act: Callable[[], object]) -> None:
                def progress(items: Sequence[Any], name: str) -> Iterable[Any]:
                    for number, item in enumerate(items):
                        if name == stage and number == after:
                            act()
                        yield item

                patch.setattr("bpwise.cli.quantize.RunBar", lambda: progress)

            yield set_up

    @pytest.mark.parametrize(
        ("stage", "after"), [("measure: backward, curves", 1), ("quantize: round", 1)], ids=["measuring", "rounding"]
    )
    def test_the_next_run_makes_it_all_again(
        self, during: Any, stage: str, after: int, tiny_model: Path, finished: Path, tmp_path: Path
    ) -> None:
        command = ("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, "--no-eval")
        during(stage, after, lambda: shutil.rmtree(tmp_path / "out.work", ignore_errors=True))
        assert "has gone" in refused(*command)
        during("", 0, lambda: None)
        succeed(*command)
        assert weights(tmp_path / "out") == weights(finished)

    def test_while_evaluating_nothing_is_lost(
        self, during: Any, tiny_model: Path, finished: Path, tmp_path: Path
    ) -> None:
        during("evaluate: logits", 0, lambda: shutil.rmtree(tmp_path / "out.work", ignore_errors=True))
        succeed("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, *EVALUATION)
        assert weights(tmp_path / "out") == weights(finished)
        assert (tmp_path / "out" / "report.html").is_file()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(
        ("stage", "after", "lost"),
        [
            ("measure: forward", 1, "input-0"),
            ("measure: backward, curves", 1, "input-0"),
            ("measure: backward, curves", 1, "gradient-1"),
            ("measure: backward, curves", 1, "curves-1"),
            ("quantize: round", 1, "drift-0"),
            ("quantize: round", 1, "state-0"),
            ("quantize: round", 1, "model.layers.0.mlp.up_proj"),
        ],
    )
    def test_single_files(
        self, during: Any, stage: str, after: int, lost: str, tiny_model: Path, finished: Path, tmp_path: Path
    ) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        command = ("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, "--no-eval")
        during(stage, after, stop)
        assert bpwise(*command).exit_code == 130
        (file,) = (tmp_path / "out.work").rglob(f"{lost}.safetensors")
        file.unlink()
        during("", 0, lambda: None)
        succeed(*command)
        assert weights(tmp_path / "out") == weights(finished)
        assert {path.name for path in (tmp_path / "out.work").iterdir()} == {
            "calibration.safetensors",
            "finished.json",
            "measurement.safetensors",
            "plan.json",
        }


def test_a_directory_that_was_being_filled_when_the_run_was_killed(
    tiny_model: Path, finished: Path, measurement: Path, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    out = tmp_path / "out"
    (out / f".out.partial-{ended.pid}-00ff00ff").mkdir(parents=True)
    (out / f".out.partial-{ended.pid}-00ff00ff" / "output-00001.partial").write_text("half")
    succeed("quantize", tiny_model, out, "--bpw", 4.5, "--no-eval", "--device", "cpu", "-m", measurement)
    assert weights(out) == weights(finished)
    assert not list(out.glob(".*"))


def test_what_a_killed_run_left_goes(tiny_model: Path, copied: Path) -> None:
    # Killed after the output was there and before its stages were let go.
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    dead = f"partial-{ended.pid}-00ff00ff"
    work = copied.with_name("out.work")
    (work / "finished.json").unlink()
    stage = ResumeStore(work, "measure", Measurement.load(work / "measurement.safetensors").provenance)
    (stage.path / f".input-0.safetensors.{dead}").write_text("half")
    (copied.parent / f".out.{dead}").mkdir()
    (copied.parent / f".out.{dead}" / "output-00001.partial").write_text("half")
    for path in (copied / f".report.html.{dead}", work / f".plan.json.{dead}", work / ".lock"):
        path.write_text("half")
    succeed("quantize", tiny_model, copied, "--bpw", 4.5, *TEXT, *EVALUATION)
    assert {path.name for path in copied.parent.iterdir()} == {"out", "out.work"}
    kept = {"calibration.safetensors", "finished.json", "measurement.safetensors", "plan.json"}
    assert {path.name for path in work.iterdir()} == kept
    assert not list(copied.glob(".*"))


class TestReportsAreKept:
    def test_the_same_command_again(self, tiny_model: Path, finished: Path, copied: Path) -> None:
        first = report(finished)["details"]
        assert DRIFT in first
        written = report(copied)
        written["details"]["Plan"]["damping of model.layers.0.self_attn.q_proj"] = 0.5  # as of a fallback
        (copied / "report.json").write_text(json.dumps(written))
        succeed("quantize", tiny_model, copied, "--bpw", 4.5, *TEXT, *EVALUATION)
        again = report(copied)["details"]
        assert again[DRIFT] == first[DRIFT]
        assert again["Plan"]["damping of model.layers.0.self_attn.q_proj"] == 0.5
        steps = "Steps (time, peak of memory)"
        assert {**again[steps], "evaluate": 0} == {**first[steps], "evaluate": 0}
        assert "Drift of the hidden states" in (copied / "report.html").read_text()

    def test_a_run_that_was_cut_off_while_it_was_evaluated(
        self, tiny_model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        command = ("quantize", tiny_model, tmp_path / "out", "--bpw", 4.5, *TEXT, *EVALUATION)
        with monkeypatch.context() as patch:
            patch.setattr(judge.Judge, "compare", stop)
            assert bpwise(*command).exit_code == 130
        succeed(*command)
        assert report(tmp_path / "out")["details"][DRIFT] == report(finished)["details"][DRIFT]

    def test_a_report_of_another_model_tells_nothing(self, tiny_model: Path, copied: Path) -> None:
        written = report(copied)
        written["comparison"]["quantized"]["stored_bytes"] += 1
        (copied / "report.json").write_text(json.dumps(written))
        succeed("quantize", tiny_model, copied, "--bpw", 4.5, *TEXT, *EVALUATION)
        assert DRIFT not in report(copied)["details"]

    @pytest.mark.parametrize("content", ["", ", ", ": 1}", ': 1, "comparison": 3, "details": 4}'])
    def test_a_damaged_report_is_no_harm(self, content: str, tiny_model: Path, copied: Path) -> None:
        (copied / "report.json").write_text(f'{{"bpwise_report"{content}')
        succeed("eval", tiny_model, copied, "-r", 2, "-l", 32, "--device", "cpu")
        assert report(copied)["comparison"]["rows"] == 2

    def test_another_evaluation(self, tiny_model: Path, finished: Path, copied: Path) -> None:
        succeed("eval", tiny_model, copied, "-r", 3, "-l", 32, "--device", "cpu")
        assert report(copied)["comparison"]["rows"] == 3
        first, again = report(finished)["details"], report(copied)["details"]
        assert again[DRIFT] == first[DRIFT]
        assert again["Plan"] == first["Plan"]
        assert "evaluate" not in again["Steps (time, peak of memory)"]
        damages = [{each["name"]: each["damage_nats"] for each in report(x)["linears"]} for x in (finished, copied)]
        assert damages[0] == damages[1]

    def test_predictions_of_a_series(self, tiny_model: Path, measurement: Path, tmp_path: Path) -> None:
        command = ("--bpw", "4.5,4", "--device", "cpu", "--no-eval", "-m", measurement)
        succeed("quantize", tiny_model, tmp_path / "out", *command)
        out = tmp_path / "out" / "tiny-4.0bpw-6hb-exl2"
        succeed("eval", tiny_model, out, "-r", 2, "-l", 32, "--device", "cpu")
        plan = json.loads((tmp_path / "out.work" / out.name / "plan.json").read_text())
        planned = {each["name"]: each["damage_nats"] for each in (*plan["linears"], plan["head"])}
        assert {each["name"]: each["damage_nats"] for each in report(out)["linears"]} == planned


class TestMarks:
    EVAL = ("-r", 2, "-l", 32, "--device", "cpu")

    def test_an_evaluation_that_finds_nothing_takes_it_away(self, tiny_model: Path, copied: Path) -> None:
        mark_broken(copied, "It was.")
        succeed("eval", tiny_model, copied, *self.EVAL)
        assert not (copied / "BROKEN.md").exists()

    @pytest.mark.parametrize("known", [True, False], ids=["predicted", "prediction-unknown"])
    def test_one_that_finds_it_broken_does_not(
        self, known: bool, tiny_model: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # What counts as broken is moved to below what the model has.
        measured = report(copied)["comparison"]["summary"]["kl_nats"]["value"]
        monkeypatch.setattr(judge, "BROKEN_NATS", measured / 10)
        monkeypatch.setattr(judge, "BROKEN_RATIO", 1e-3)
        if not known:
            (copied / "bpwise.json").unlink()
            shutil.rmtree(copied.with_name("out.work"))
        mark_broken(copied, "It is.")
        result = bpwise("eval", tiny_model, copied, *self.EVAL)
        assert result.exit_code == 0
        assert "stays marked as broken" in result.stderr
        assert "It is." in (copied / "BROKEN.md").read_text()

    def test_what_was_foreseen_is_not_broken(
        self, tiny_model: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(judge, "BROKEN_NATS", 1e-9)  # the plan foresaw a fifth of it or more
        mark_broken(copied, "It was.")
        succeed("eval", tiny_model, copied, *self.EVAL)
        assert not (copied / "BROKEN.md").exists()

    def test_of_several_models_each_has_its_own(
        self, tiny_model: Path, finished: Path, copied: Path, tmp_path: Path
    ) -> None:
        mark_broken(copied, "It was.")
        succeed("eval", tiny_model, finished, copied, *self.EVAL, "-o", tmp_path / "report")
        assert not (copied / "BROKEN.md").exists()

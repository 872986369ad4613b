"""Commands that have finished, repeated: what they take for their own output, and what not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.files.paths import locked
from bpwise.convert.gguf.conversion import GgufConversion
from bpwise.convert.gguf.file.header import read_gguf_header
from bpwise.convert.registry import load_plan
from bpwise.errors import WorkDirectoryError
from bpwise.measure.text.calibration import CalibrationSet
from bpwise.quantize.measuring import FinishedCommand
from bpwise.quantize.run import quantize_model

from ..conftest import llama_cpp_dir
from .runs import TEXT, arguments, bpwise, gguf, refused, succeed


@pytest.fixture(scope="module")
def finished(save_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an EXL2 output that no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_model(folder / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    succeed(*command(folder))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def command(folder: Path, bpw: float = 4.5, output: str = "out") -> tuple[object, ...]:
    place = ("--work-dir", folder / "out.work")
    return ("quantize", folder / "model", folder / output, "--bpw", bpw, "--no-eval", *TEXT, *place)


def test_another_chat_template_is_another_output(folder: Path) -> None:
    # A measurement brings its rows along; otherwise the template is known by those that are made with it.
    measured = ("-m", folder / "out.work" / "measurement.safetensors", "--device", "cpu")
    again = (*command(folder)[:6], *measured, "--work-dir", folder / "out.work")
    for _ in range(2):
        assert succeed(*again).startswith("finished already: ")
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[1].content }}")
    assert "is not the output of this run" in refused(*again)


def test_a_refused_run_leaves_the_plan(folder: Path) -> None:
    plan = folder / "out.work" / "plan.json"
    before = plan.read_bytes()
    assert "is not the output of this run" in refused(*command(folder, 5.0))
    assert plan.read_bytes() == before
    assert succeed(*command(folder)).startswith("finished already: ")


def test_another_plan_is_not_taken_for_the_outputs(folder: Path) -> None:
    plan = folder / "out.work" / "plan.json"
    before = plan.read_bytes()
    succeed("plan", folder / "out.work" / "measurement.safetensors", "--bpw", 5, "-o", folder / "other.json")
    shutil.copyfile(folder / "other.json", plan)
    assert load_plan(plan).bpw > 4.5
    succeed(*command(folder))
    assert plan.read_bytes() == before


def test_another_name_in_the_same_work_directory(folder: Path) -> None:
    assert "finished already" not in succeed(*command(folder, output="second"))
    assert (folder / "second" / "output.safetensors").read_bytes() == (
        folder / "out" / "output.safetensors"
    ).read_bytes()


def test_the_record_is_written_under_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = folder / "out.work"
    (work / "finished.json").unlink()
    save, saved = FinishedCommand.save, []

    def save_locked(record: FinishedCommand, place: Path) -> None:
        with pytest.raises(WorkDirectoryError), locked(work / ".lock", work, "wait"):
            pass
        save(record, place)
        saved.append(place)

    monkeypatch.setattr(FinishedCommand, "save", save_locked)
    succeed(*command(folder))
    assert saved == [work]


def test_a_gguf_file_in_parts(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    model, output = converted["mistral"].directory, tmp_path / "out.gguf"
    tokens = torch.randint(0, 320, (4, 32), generator=torch.Generator().manual_seed(1))
    rows = CalibrationSet(tokens=tokens, origins=("random",) * 4, description="random ids", adds_bos=False)
    options = arguments(gguf(8.5, feedback=False, base=converted["mistral"].file, split_max_size=100_000))
    first = quantize_model(model, output, **{**options, "base_model": "org/one"}, calibration=rows)
    assert first.output.name.startswith("out-00001-of-0000")
    assert read_gguf_header(first.output).metadata["general.source.repo_url"] == "https://huggingface.co/org/one"
    with pytest.raises(WorkDirectoryError, match="is not the output of this run"):
        quantize_model(model, output, **{**options, "base_model": "org/two"}, calibration=rows)
    monkeypatch.setattr(
        "bpwise.convert.gguf.conversion.GgufConversion.prepare", lambda *_: pytest.fail("was converted again")
    )
    again = quantize_model(model, output, **{**options, "base_model": "org/one"}, calibration=rows)
    assert again.repeated
    assert again.output == first.output


def test_a_newer_converter_is_not_taken_for_the_old(
    converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    model, checkout = converted["mistral"].directory, Path(shutil.copytree(llama_cpp_dir(), tmp_path / "llama.cpp"))
    command = ("quantize", model, tmp_path / "out.gguf", "--bpw", 8.5, "--no-feedback", "--no-eval", *TEXT)
    succeed(*command, "--llama-cpp", checkout)
    calls: list[object] = []
    prepare = GgufConversion.prepare
    monkeypatch.setattr(GgufConversion, "prepare", lambda *given: calls.append(given) or prepare(*given))
    assert succeed(*command, "--llama-cpp", checkout).startswith("finished already: ")
    assert calls == []
    with (checkout / "convert_hf_to_gguf.py").open("a") as script:
        script.write("\n# newer\n")
    succeed(*command, "--llama-cpp", checkout)
    assert len(calls) == 1


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls of what converts a model."""
    calls: list[object] = []
    prepare = GgufConversion.prepare
    monkeypatch.setattr(GgufConversion, "prepare", lambda *given: calls.append(given) or prepare(*given))
    return calls


def test_a_series_is_not_converted_to_know_that_it_is_there(
    converted: Any, converting: list[object], tmp_path: Path
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    (tmp_path / "notes.txt").write_text("".join(f"Sentence {each} is about {each * each}.\n" for each in range(400)))
    model, out = converted["mistral"].directory, tmp_path / "out"
    text = ("-c", tmp_path / "notes.txt", *TEXT)
    command = ("quantize", model, out, "--format", "gguf,exl2", "--bpw", "8.5,7", "--no-feedback", "--no-eval", *text)
    succeed(*command)
    made = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith("report.")]
    before = {path: path.stat().st_mtime_ns for path in made}
    converting.clear()
    assert succeed(*command).startswith("finished already: ")
    assert converting == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Other text, though of the same name, is another command.
    (tmp_path / "notes.txt").write_text("".join(f"Verse {each} is about {each + each}.\n" for each in range(400)))
    assert "is not the output of this run" in refused(*command)
    assert converting != []


def test_a_mixture(converted: Any, converting: list[object], tmp_path: Path) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    output = tmp_path / "out.gguf"
    command = ("quantize", converted["mistral"].directory, output, "--no-eval")
    for split in ((), ("--split-max-size", "100kB")):
        succeed(*command, "--type", "Q8_0", *split)
        converting.clear()
        assert succeed(*command, "--type", "Q8_0", *split).startswith("finished already: ")
        assert "is not the output of this run" in refused(*command, "--type", "Q4_0", *split)
        for path in tmp_path.glob("*.gguf"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        assert "is not the output of this run" in refused(*command, "--type", "Q8_0", *split)
        assert converting == []
        for path in tmp_path.glob("*.gguf"):
            path.unlink()


def test_a_mixture_that_was_cut_off_while_it_was_evaluated(
    converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    evaluation = ("--eval-rows", 2, "--eval-row-tokens", 32, "--device", "cpu")
    output = tmp_path / "out.gguf"
    command = ("quantize", converted["mistral"].directory, output, "--type", "Q8_0", *evaluation)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bpwise.quantize.judge.Judge.compare", killed)
        assert bpwise(*command).exit_code == 130
    made = output.stat().st_mtime_ns
    assert not (tmp_path / "out.report.json").exists()
    assert "KL" in succeed(*command)
    assert output.stat().st_mtime_ns == made
    assert (tmp_path / "out.report.json").is_file()
    assert (tmp_path / "out.recipe.yaml").is_file()
    assert succeed(*command).startswith("finished already: ")


def test_a_mixture_is_evaluated_again_without_its_report(
    converted: Any, converting: list[object], tmp_path: Path
) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    evaluation = ("--eval-rows", 2, "--eval-row-tokens", 32, "--device", "cpu")
    command = ("quantize", converted["mistral"].directory, tmp_path / "out.gguf", "--type", "Q8_0", *evaluation)
    succeed(*command)
    converting.clear()
    assert succeed(*command).startswith("finished already: ")
    assert converting == []
    (tmp_path / "out.report.json").unlink()
    assert "KL" in succeed(*command)
    assert (tmp_path / "out.report.json").is_file()

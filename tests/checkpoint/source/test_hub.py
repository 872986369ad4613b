"""Models on the Hub, asked of a server on this machine: revisions, files by name and by tag."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bpwise.cli import cli
from bpwise.convert.opening import locate_model
from bpwise.errors import CheckpointError
from click.testing import CliRunner

from ...fuzz.hub import UNANNOUNCED_BYTES, answers_of, lying_hub

FILES = {
    "README.md": b"words",
    "L-Q4_K_M.gguf": b"GGUF4",
    "L-BF16-00001-of-00002.gguf": b"GGUF1",
    "L-BF16-00002-of-00002.gguf": b"GGUF2",
    "mmproj-L-BF16.gguf": b"GGUFm",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository of GGUF files, and one of an EXL2 model on the branch 4.0bpw; its cache."""
    answers = json.loads(answers_of(FILES, "org/L-GGUF"))
    exl2 = {"config.json": b"{}", "output.safetensors": b"weights", "bpwise.json": b"{}", "notes.txt": b"private"}
    for path, answer in json.loads(answers_of(exl2, "org/L-exl2")).items():
        answers[path.replace("/revision/main", "/revision/4.0bpw")] = answer
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with lying_hub(tmp_path / "answers.json", tmp_path / "cache"):
        yield tmp_path / "cache"


def downloaded(cache: Path, repo: str) -> set[str]:
    return {path.name for path in (cache / f"models--org--{repo}" / "snapshots").glob("*/*")}


@pytest.mark.parametrize("name", ["org/L-GGUF:q4_k_m", "hf.co/org/L-GGUF:Q4_K_M", "org/L-GGUF@main/L-Q4_K_M.gguf"])
def test_one_file(name: str, hub: Path) -> None:
    path = locate_model(name)
    assert path.read_bytes() == b"GGUF4"
    assert path.name == "L-Q4_K_M.gguf"
    assert downloaded(hub, "L-GGUF") == {"README.md", "L-Q4_K_M.gguf"}


@pytest.mark.parametrize("file", ["README.md", "L-Q4_K_M.gguf"])
@pytest.mark.usefixtures("hub")
def test_a_body_without_end_is_refused(file: str, tmp_path: Path) -> None:
    answers = json.loads((tmp_path / "answers.json").read_bytes())
    (path,) = [path for path in answers if path.endswith(file)]
    answers[path]["ends"] = "overlong"
    (tmp_path / "endless.json").write_text(json.dumps(answers))
    refused = pytest.raises(CheckpointError, match=r"received \d+ bytes, but only \d+ were announced")
    with lying_hub(tmp_path / "endless.json", tmp_path / "empty"), refused:
        locate_model("org/L-GGUF:Q4_K_M")
    written = [path.stat().st_size for path in (tmp_path / "empty").rglob("*") if path.is_file()]
    assert sum(written) <= 2 * UNANNOUNCED_BYTES


def test_all_parts_of_a_split_file(hub: Path) -> None:
    assert locate_model("org/L-GGUF:BF16").read_bytes() == b"GGUF1"
    assert downloaded(hub, "L-GGUF") == {"README.md", *(name for name in FILES if name.startswith("L-BF16"))}


def test_downloads_of_one_model_at_once(hub: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(3), context.SimpleQueue()

    def run() -> None:
        start.wait()
        try:
            answers.put(locate_model("org/L-GGUF:Q4_K_M").read_bytes())
        except Exception as error:
            answers.put(repr(error))

    runs = [context.Process(target=run) for _ in range(3)]
    for each in runs:
        each.start()
    assert [answers.get() for _ in runs] == [b"GGUF4"] * 3
    for each in runs:
        each.join()
    assert downloaded(hub, "L-GGUF") == {"README.md", "L-Q4_K_M.gguf"}
    assert not [*hub.rglob("*.incomplete")]


def test_a_repository_of_several_files_needs_a_name(hub: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one file is needed\. Got several.*L-Q4_K_M\.gguf"):
        locate_model("org/L-GGUF")
    assert downloaded(hub, "L-GGUF") == {"README.md"}


def test_a_revision(hub: Path) -> None:
    directory = locate_model("org/L-exl2@4.0bpw")
    assert {path.name for path in directory.iterdir()} == {"config.json", "output.safetensors", "bpwise.json"}
    with pytest.raises(CheckpointError, match="org/L-exl2"):
        locate_model("org/L-exl2@8.0bpw")


def test_compared_in_one_line(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    (tmp_path / "answers.json").write_bytes(answers_of(files, "org/tiny"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with lying_hub(tmp_path / "answers.json", tmp_path / "cache"):
        line = ["eval", "org/tiny", "org/tiny@main", "-r", "2", "-l", "32", "--no-cache"]
        result = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert json.loads(Path("report.json").read_text())["comparison"]["summary"]["kl_nats"]["value"] < 1e-6
    assert not list((tmp_path / "cache").rglob("report.*"))


def test_an_unquantized_file_to_work_from(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    model, file = converted["mistral"].directory, converted["mistral"].file
    (tmp_path / "answers.json").write_bytes(answers_of({"M-F32.gguf": file.read_bytes(), "M-Q4_0.gguf": b""}, "org/M"))
    used: list[Path] = []
    monkeypatch.setattr(
        "bpwise.eval.engines.engine.evaluate_in_engine",
        lambda *_, base, **__: (_ for _ in ()).throw(CheckpointError(str(used.append(base)))),
    )
    with lying_hub(tmp_path / "answers.json", tmp_path / "cache"):
        for name in (file, "org/M:F32"):
            line = [
                "quantize",
                model,
                tmp_path / "out" / Path(name).name,
                "--type",
                "Q8_0",
                "--no-eval",
                "--base",
                name,
            ]
            result = CliRunner().invoke(cli, [str(each) for each in line], catch_exceptions=False)
            assert result.exit_code == 0, result.stderr
        line = ["quantize", str(model), str(tmp_path / "x.gguf"), "--bpw", "9", "--dry-run", "--base", "org/M:F16"]
        assert "org/M: one file is needed. Got none of this name" in CliRunner().invoke(cli, line).stderr
        line = ["eval", str(model), str(file), "--engine", "llama.cpp", "--base", "org/M:F32"]
        CliRunner().invoke(cli, line)
    here, on_hub = sorted(tmp_path.glob("out/*.gguf"))
    assert here.read_bytes() == on_hub.read_bytes()
    assert [path.read_bytes() for path in used] == [file.read_bytes()]


def test_what_is_here_wins(hub: Path) -> None:
    Path("org/L-GGUF").mkdir(parents=True)
    Path("org/L-GGUF/L-Q4_K_M.gguf").write_bytes(b"mine")
    assert locate_model("org/L-GGUF") == Path("org/L-GGUF")
    assert locate_model("org/L-GGUF/L-Q4_K_M.gguf").read_bytes() == b"mine"
    assert not hub.exists()


@pytest.mark.parametrize("name", ["gone.gguf", "gone/gone.gguf", "./gone/gone/gone.gguf"])
def test_a_path_that_is_not_there_never_reaches_the_hub(name: str, hub: Path) -> None:
    with pytest.raises(CheckpointError, match="not found"):
        locate_model(name)

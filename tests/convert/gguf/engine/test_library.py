"""llama.cpp in processes of its own: what it refuses, what it dies of, and that none is left behind."""

import _ctypes
import ctypes
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bpwise.convert.gguf.engine import library as engine
from bpwise.convert.gguf.engine import worker
from bpwise.convert.gguf.engine.library import EngineModel, LlamaLibrary, load_library
from bpwise.errors import CheckpointError, ConfigError, NumericalError

pytest.importorskip("xllamacpp", reason="the engine is not installed: pip install '.[engine]'")


@pytest.fixture(scope="module")
def library() -> LlamaLibrary:
    return load_library()


@contextmanager
def loaded(library: LlamaLibrary, path: Path) -> Iterator[EngineModel]:
    with library.model(path, row_tokens=600, threads=1) as model:
        yield model


def process_of(model: EngineModel) -> "subprocess.Popen[bytes]":
    return model._process._process


def with_number(source: Path, target: Path, key: str, value: int) -> Path:
    """A file with another number in its metadata."""
    data = bytearray(source.read_bytes())
    place = data.index(key.encode()) + len(key) + 4  # behind the key stands the value's type
    struct.pack_into("<I", data, place, value)
    target.write_bytes(data)
    return target


def test_logits_are_the_library_s_own(library: LlamaLibrary, converted: Any) -> None:
    # In this process, through the functions that the worker calls: bit for bit the same, batch after batch.
    tokens = torch.randint(320, (600,), generator=torch.Generator().manual_seed(0))
    llama = worker.Llama(str(library._path))
    assert llama.load(str(converted["qwen3"].file)) == {"vocab_size": 320}
    llama.prepare(row_tokens=600, batch_tokens=256, threads=1)
    expected = [
        torch.tensor(list(llama.decode(part.tolist(), fresh=index == 0))).view(-1, 320)
        for index, part in enumerate(tokens.split(256))
    ]
    with loaded(library, converted["qwen3"].file) as model:
        assert model.vocab_size == 320
        for _ in range(2):  # the second row begins anew
            assert all(map(torch.equal, model.logits(tokens), expected))
        next(model.logits(tokens))  # a row that nobody reads to its end is in nobody's way
        assert torch.equal(next(model.logits(tokens[:7])), expected[0][:7])


@pytest.mark.parametrize(("step", "expected"), [(0.25, 4.0), (3.0, 4 / 12)], ids=["all-tokens", "stops-when-slow"])
def test_speed_is_tokens_over_seconds(
    library: LlamaLibrary, converted: Any, monkeypatch: pytest.MonkeyPatch, step: float, expected: float
) -> None:
    clock = itertools.count(100.0, step)
    with loaded(library, converted["qwen3"].file) as model:
        tokens = torch.arange(40)
        before = list(model.logits(tokens))
        monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        assert model.tokens_per_second() == pytest.approx(expected)
        assert all(map(torch.equal, model.logits(tokens), before))


class TestRefusals:
    def test_a_file_that_is_none(self, library: LlamaLibrary, tmp_path: Path) -> None:
        path = tmp_path / "x.gguf"
        path.write_bytes(b"GGUF and nothing more")
        with pytest.raises(CheckpointError, match=r"llama\.cpp cannot load it .*version"), loaded(library, path):
            pass

    def test_a_failed_assertion_is_a_sentence(self, library: LlamaLibrary, converted: Any, tmp_path: Path) -> None:
        path = with_number(converted["llama"].file, tmp_path / "x.gguf", "llama.block_count", 600)
        message = rf"{path}: llama\.cpp aborted while it was to load it \(.*GGML_ASSERT\(.*LLAMA_MAX_LAYERS\) failed\)"
        with pytest.raises(CheckpointError, match=message), loaded(library, path):
            pass
        with loaded(library, converted["llama"].file) as model:  # nothing of it is left here
            assert len(next(model.logits(torch.arange(4)))) == 4

    def test_a_token_that_the_model_does_not_have(self, library: LlamaLibrary, converted: Any) -> None:
        with (
            loaded(library, converted["llama"].file) as model,
            pytest.raises(NumericalError, match=r"failed with code -1, .*invalid token.* Check the original model"),
        ):
            list(model.logits(torch.tensor([320])))

    def test_killed_while_it_works(self, library: LlamaLibrary, converted: Any) -> None:
        with loaded(library, converted["llama"].file) as model:
            process_of(model).kill()
            with pytest.raises(CheckpointError, match=r"was killed while it was to run it\. .*not enough memory"):
                list(model.logits(torch.arange(4)))

    @pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process as POSIX does")
    def test_stuck(self, library: LlamaLibrary, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with loaded(library, converted["llama"].file) as model:
            process_of(model).send_signal(signal.SIGSTOP)
            monkeypatch.setattr(engine, "_LEAST_SECONDS", 0.2)
            with pytest.raises(
                CheckpointError, match=r"gave no answer within 0 s while it was to run it, and was stopped"
            ):
                list(model.logits(torch.arange(4)))


class TestProcesses:
    def test_end_with_their_context(self, library: LlamaLibrary, converted: Any) -> None:
        for failure in (None, KeyboardInterrupt, NumericalError):
            with pytest.raises(failure or EOFError), loaded(library, converted["llama"].file) as model:
                next(model.logits(torch.arange(300)))
                raise failure or EOFError
            assert process_of(model).returncode is not None

    def test_are_not_interrupted_themselves(self, library: LlamaLibrary, converted: Any) -> None:
        # Ctrl-C reaches all processes of a terminal; this one alone decides what ends.
        with loaded(library, converted["llama"].file) as model:
            process_of(model).send_signal(signal.SIGINT)
            assert len(next(model.logits(torch.arange(4)))) == 4

    @pytest.mark.skipif(os.name == "nt", reason="asks for a process as POSIX does")
    def test_end_when_their_parent_is_killed(self, library: LlamaLibrary, converted: Any) -> None:
        code = """
import sys, time
from pathlib import Path
from bpwise.convert.gguf.engine.library import load_library
with load_library().model(Path(sys.argv[1]), row_tokens=8, threads=1) as model:
    print(model._process._process.pid, flush=True)
    time.sleep(60)
"""
        command = [sys.executable, "-c", code, str(converted["llama"].file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            os.kill(child, 0)
            parent.kill()
        for _ in range(100):
            try:
                os.kill(child, 0)
            except ProcessLookupError:
                return
            if "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]:
                return  # it has ended, and nobody has asked how
            time.sleep(0.05)
        pytest.fail("the worker outlives its parent")


class TestInterface:
    def test_other_layout(self, monkeypatch: pytest.MonkeyPatch, library: LlamaLibrary) -> None:
        monkeypatch.setattr(worker, "_DEFAULTS", {**worker._DEFAULTS, "type_k": 7})
        with pytest.raises(worker.RefusedError, match=r"has type_k = 1 by default\. Expected 7"):
            worker.Llama(str(library._path))

    def test_other_library(self) -> None:
        with pytest.raises(ConfigError, match=r"has no function llama_backend_init: .*xllamacpp=="):
            LlamaLibrary(Path(_ctypes.__file__), "no llama.cpp")

    def test_other_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "XLLAMACPP_VERSION", "1.2.3")
        engine._load.cache_clear()
        try:
            with pytest.raises(ConfigError, match=r"Expected 1\.2\.3"):
                load_library()
        finally:
            engine._load.cache_clear()

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no shared library"):
            load_library(tmp_path)
        (tmp_path / "build" / "bin").mkdir(parents=True)
        (tmp_path / "build" / "bin" / "libllama.so").write_bytes(b"no library")
        with pytest.raises(ConfigError, match="cannot be loaded"):
            load_library(tmp_path)

    def test_fields_stand_where_c_puts_them(self) -> None:
        # From the header of llama.cpp: 22 fields of 4 bytes, two pointers, two enumerations.
        parameters = worker._ContextParameters
        assert parameters.n_threads.offset == 28
        assert parameters.flash_attn_type.offset == 52
        assert parameters.cb_eval.offset == 88
        assert (parameters.type_k.offset, parameters.type_v.offset) == (104, 108)
        assert ctypes.sizeof(worker._Batch) == 56

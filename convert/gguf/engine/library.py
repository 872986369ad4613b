"""llama.cpp as a library: logits of a model file on given token ids, computed in a process of its own.

llama.cpp ends its process where an assertion fails, as it does on metadata that it does not expect. So each model runs
in a child process (``worker``), which ends with the context that it was made in, or with this process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ....checkpoint.files.operations import unnamed
from ....errors import CheckpointError, ConfigError, NumericalError
from ..file.split import parts_beside
from . import worker

__all__ = ["XLLAMACPP_VERSION", "EngineModel", "LlamaLibrary", "load_library"]

XLLAMACPP_VERSION = "2026.10.11549"
"""The version of the PyPI package whose parameters are laid out as ``worker`` has them."""

_LIBRARY_NAMES = ("libllama.so", "libllama.dylib", "llama.dll")
_LIBRARY_FOLDERS = ("", "build/bin", "build/lib", "bin", "lib")

_BATCH_TOKENS = 256
"""Tokens whose logits the library holds at once: 128 MiB for a vocabulary of 128k."""

_PYTHON = (sys.executable, "-I", "-S")
"""Isolated and without site packages: the worker needs none, and starts at once."""

_LEAST_SECONDS = 600.0
_SLOWEST_BYTES_PER_SECOND = 1e7
"""Time after which a request counts as stuck, by the size of the file: to load it, or to run 256 tokens through it."""

_TIMED_PROMPT, _TIMED_TOKENS = 16, 32
_TIMED_SECONDS = 10.0
"""A model that is slow is not timed longer."""

_SHOWN_LINES = 3
_READ_BYTES = 4096


class LlamaLibrary:
    """A llama.cpp whose interface is known.

    Attributes:
        description: What it is, for reports.
    """

    def __init__(self, path: Path, description: str) -> None:
        """Check a shared library's interface; use ``load_library``.

        Args:
            path: The shared library.
            description: What it is.

        Raises:
            ConfigError: It cannot be loaded, lacks a function, or lays its parameters out otherwise.
        """
        self.description = description
        self._path = path
        with self._process():
            pass

    @contextmanager
    def model(self, path: Path, *, row_tokens: int, threads: int) -> Iterator[EngineModel]:
        """Load a model file, and free it when the context ends.

        Args:
            path: The file.
            row_tokens: Longest row that it will be run on.
            threads: Threads to compute with.

        Raises:
            CheckpointError: llama.cpp refuses the file or aborts, or there is not enough memory for it.
        """
        with self._process() as process:
            loaded = process.ask(path, "load", {"path": str(path)})
            if "problem" in loaded:
                raise CheckpointError(
                    f"{path}: llama.cpp cannot load it ({loaded['problem']}). Check it with bpwise verify."
                )
            wanted = {"row_tokens": row_tokens, "batch_tokens": _BATCH_TOKENS, "threads": threads}
            made = process.ask(path, "prepare", wanted)
            if "problem" in made:
                raise CheckpointError(f"{path}: llama.cpp cannot prepare it ({made['problem']}). Lower row_tokens.")
            if made["llama_n_ctx"] < row_tokens or made["llama_n_batch"] < 1:
                raise self._unknown(f"made a context of {made} for rows of {row_tokens} tokens")
            yield EngineModel(process, path, loaded["vocab_size"], min(_BATCH_TOKENS, made["llama_n_batch"]))

    @contextmanager
    def _process(self) -> Iterator[_Process]:
        with _started(self._path) as process:
            first = process.ask(self._path, "load")
            if "problem" in first:
                raise self._unknown(first["problem"])
            yield process

    def _unknown(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: {what}: not llama.cpp, or an interface of it that this version of bpwise does not know. "
            f"Use the one it was tested with: pip install xllamacpp=={XLLAMACPP_VERSION}."
        )


class EngineModel:
    """A loaded model; made by ``LlamaLibrary.model``.

    Attributes:
        vocab_size: Number of tokens that it knows.
    """

    def __init__(self, process: _Process, path: Path, vocab_size: int, batch_tokens: int) -> None:
        """Hold what it runs in.

        Args:
            process: The process that has loaded it.
            path: The model's file, for messages.
            vocab_size: Number of tokens that it knows.
            batch_tokens: Tokens that it takes at once.
        """
        self.vocab_size = vocab_size
        self._process = process
        self._path = path
        self._batch_tokens = batch_tokens

    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Run one row from its first token.

        Args:
            tokens: Token ids, int64, shape (tokens,), each below ``vocab_size``.

        Yields:
            Logits of at most 256 positions after another, float32, shape (positions, ``vocab_size``), in memory of
            their own.

        Raises:
            CheckpointError: llama.cpp aborts.
            NumericalError: llama.cpp fails, or a logit is NaN or infinite.
        """
        for first in range(0, len(tokens), self._batch_tokens):
            ids = tokens[first : first + self._batch_tokens].tolist()
            values = self._run(ids, fresh=first == 0)
            if not all(map(torch.isfinite, values.aminmax())):
                raise NumericalError(f"{self._path}: NaN or infinity in llama.cpp's logits. The weights are broken.")
            yield values

    def tokens_per_second(self) -> float:
        """Return how many tokens it writes a second, one after another after a prompt of 16; needs rows of 48 tokens.

        Raises:
            CheckpointError: llama.cpp aborts.
            NumericalError: llama.cpp fails.
        """
        ids = [number % self.vocab_size for number in range(_TIMED_PROMPT + _TIMED_TOKENS)]
        self._run(ids[:_TIMED_PROMPT], fresh=True)
        start, written, seconds = time.perf_counter(), 0, 0.0
        while written < _TIMED_TOKENS and seconds < _TIMED_SECONDS:
            self._run([ids[_TIMED_PROMPT + written]], fresh=False)
            written, seconds = written + 1, time.perf_counter() - start
        return written / seconds

    def _run(self, ids: list[int], *, fresh: bool) -> Tensor:
        answer = self._process.ask(self._path, "run", {"tokens": ids, "fresh": fresh})
        if "problem" in answer:
            raise NumericalError(f"{self._path}: llama.cpp failed with {answer['problem']}. Check the original model.")
        values = torch.empty(len(ids), self.vocab_size)
        self._process.read_into(values, self._path)
        return values


class _Process:
    """A running ``worker``."""

    def __init__(self, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._requests = process.stdin
        self._answers = process.stdout
        self._log = log
        self._stuck_after: float | None = None

    def ask(self, path: Path, doing: str, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request, if there is one, and return the answer; path and what it does are for messages."""
        with self._limited(path):
            with suppress(BrokenPipeError):  # shows as an answer that does not come
                if request is not None:
                    self._requests.write(json.dumps(request).encode() + b"\n")
                    self._requests.flush()
            line = self._answers.readline()
        if not line.endswith(b"\n"):
            raise self._ended(path, doing)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def read_into(self, values: Tensor, path: Path) -> None:
        """Fill a tensor, float32, with what follows an answer."""
        view = values.numpy().data.cast("B")
        with self._limited(path):
            count = self._answers.readinto(view)  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if count != len(view):
            raise self._ended(path, "run")

    @contextmanager
    def _limited(self, path: Path) -> Iterator[None]:
        # Not all systems can wait for a pipe with a limit, but the end of the process ends the waiting.
        size_bytes = sum(each.stat().st_size for each in (path, *parts_beside(path)) if each.exists())
        seconds = _LEAST_SECONDS + size_bytes / _SLOWEST_BYTES_PER_SECOND

        def end() -> None:
            self._stuck_after = seconds
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _ended(self, path: Path, doing: str) -> CheckpointError:
        code = self._process.wait()
        if self._stuck_after is not None:
            return CheckpointError(
                f"{path}: llama.cpp gave no answer within {self._stuck_after:.0f} s while it was to {doing} it, and "
                "was stopped. Look whether memory is short or the disk slow, and run again."
            )
        if code == -getattr(signal, "SIGKILL", 9):
            return CheckpointError(
                f"{path}: llama.cpp was killed while it was to {doing} it. Most likely there was not enough memory. "
                "Free some, or use a smaller model."
            )
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _READ_BYTES))
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        said = " / ".join(lines[-_SHOWN_LINES:]) or f"exit status {code}, and nothing said"
        return CheckpointError(
            f"{path}: llama.cpp aborted while it was to {doing} it ({said}). Expected a model that it can run. Convert "
            "the original again, with the converter of this llama.cpp."
        )


@contextmanager
def _started(library: Path) -> Iterator[_Process]:
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # otherwise it attaches a debugger to itself
    command = [*_PYTHON, worker.__file__, str(library)]
    pipe = subprocess.PIPE
    with unnamed() as log:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=environment)
        try:
            yield _Process(process, log)
        finally:
            process.kill()
            process.communicate()  # which closes the pipes, whatever is left in them


def load_library(directory: Path | None = None) -> LlamaLibrary:
    """Load llama.cpp.

    Args:
        directory: A built llama.cpp, or a folder with its shared library; None for the one in the ``xllamacpp`` wheel.

    Raises:
        ConfigError: There is none, it is of another version, or its interface is not known.
    """
    return _load(None if directory is None else Path(directory).resolve())


@cache
def _load(directory: Path | None) -> LlamaLibrary:
    if directory is not None:
        for folder in _LIBRARY_FOLDERS:
            for name in _LIBRARY_NAMES:
                if (directory / folder / name).is_file():
                    return LlamaLibrary(directory / folder / name, f"llama.cpp in {directory.name}")
        raise ConfigError(
            f"{directory}: no shared library of llama.cpp. Expected {_LIBRARY_NAMES[0]} in it or in build/bin. "
            "Build it with -DBUILD_SHARED_LIBS=ON."
        )
    install = f"Install it: pip install xllamacpp=={XLLAMACPP_VERSION}, or name a built llama.cpp with --llama-cpp."
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"llama.cpp: the Python package xllamacpp is not installed. {install}")
    version = "unknown"
    with suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("xllamacpp")
    if version != XLLAMACPP_VERSION:
        raise ConfigError(f"llama.cpp: not usable. Got xllamacpp {version}. Expected {XLLAMACPP_VERSION}. {install}")
    suffix = ".pyd" if sys.platform == "win32" else ".so"
    files = sorted(Path(found.submodule_search_locations[0]).glob(f"xllamacpp*{suffix}"))
    if not files:
        raise ConfigError(f"llama.cpp: xllamacpp holds no shared library. {install}")
    return LlamaLibrary(files[0], f"llama.cpp (xllamacpp {version})")

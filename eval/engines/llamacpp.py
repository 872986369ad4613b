"""llama.cpp as a library: logits of a model file on given token ids, through its C interface and ctypes.

The C interface passes structs by value, and their fields move between versions. So the wheel that brings the library
is pinned to one version, and any library is asked for its default parameters first: the fields that are used here
stand at the front, and their defaults are a pattern that another layout would not show. What was asked for is read
back from the context. Fields behind them are handed back as they came.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, NumericalError

__all__ = ["XLLAMACPP_VERSION", "EngineModel", "LlamaLibrary", "load_library"]

XLLAMACPP_VERSION = "2026.10.11549"
"""The version of the PyPI package whose parameters are laid out as below."""

_LIBRARY_NAMES = ("libllama.so", "libllama.dylib", "llama.dll")
_LIBRARY_FOLDERS = ("", "build/bin", "build/lib", "bin", "lib")

_BATCH_TOKENS = 256
"""Tokens whose logits the library holds at once: 128 MiB for a vocabulary of 128k."""

_LOG_LINES = 20
_LOG_ERROR = 4
_FLASH_ATTENTION_OFF = 0
_TYPE_F32 = 0

_STRUCT_BYTES = 512
"""More than either struct of parameters has; the library reads and writes only what it knows."""


class _ModelParameters(ctypes.Structure):
    _fields_ = (("opaque", ctypes.c_uint64 * (_STRUCT_BYTES // 8)),)


class _ContextParameters(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int32),
        ("rope_scaling_type", ctypes.c_int32),
        ("pooling_type", ctypes.c_int32),
        ("attention_type", ctypes.c_int32),
        ("flash_attn_type", ctypes.c_int32),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn_ext_factor", ctypes.c_float),
        ("yarn_attn_factor", ctypes.c_float),
        ("yarn_beta_fast", ctypes.c_float),
        ("yarn_beta_slow", ctypes.c_float),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("opaque", ctypes.c_uint64 * (_STRUCT_BYTES // 8 - 14)),
    )


_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "cb_eval_user_data": None,
    "type_k": 1,
    "type_v": 1,
}
"""What an unmodified library answers, field by field; 4 threads and float16 (1) caches among it."""


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

_POINTER, _INT, _UINT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOGGER, _POINTER)),
    "llama_model_default_params": (_ModelParameters, ()),
    "llama_context_default_params": (_ContextParameters, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _ModelParameters)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParameters)),
    "llama_free": (None, (_POINTER,)),
    "llama_n_ctx": (_UINT, (_POINTER,)),
    "llama_n_batch": (_UINT, (_POINTER,)),
    "llama_n_ubatch": (_UINT, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
}


class LlamaLibrary:
    """A loaded llama.cpp whose interface is the one that this module knows.

    Attributes:
        description: What it is, for reports.
    """

    def __init__(self, path: Path, description: str) -> None:
        """Load a shared library and check its interface; use ``load_library``.

        Args:
            path: The shared library.
            description: What it is.

        Raises:
            ConfigError: It cannot be loaded, lacks a function, or lays its parameters out otherwise.
        """
        self.description = description
        self._path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as cause:
            raise ConfigError(
                f"{path}: cannot be loaded ({cause}). Expected llama.cpp's shared library. Choose another."
            ) from cause
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise self._unknown(f"has no function {name}")
            function.restype, function.argtypes = result, arguments
        self._log: list[str] = []
        self._logger = _LOGGER(self._heard)  # the library keeps the pointer, so this must live as long
        self.call("llama_log_set", self._logger, None)
        found = self.call("llama_context_default_params")
        for name, expected in _DEFAULTS.items():
            if getattr(found, name) != expected:
                raise self._unknown(f"has {name} = {getattr(found, name)} by default. Expected {expected}")
        self.call("llama_backend_init")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call one of the library's functions by name."""
        return getattr(self._library, name)(*arguments)

    def complaint(self) -> str:
        """Return the first error that the library logged since this was last asked, or a stand-in."""
        lines = [line for line in self._log if line] or ["no reason given"]
        self._log.clear()
        return lines[0]

    @contextmanager
    def model(self, path: Path, *, row_tokens: int, threads: int) -> Iterator[EngineModel]:
        """Load a model file, and free it when the context ends.

        Args:
            path: The file.
            row_tokens: Longest row that it will be run on.
            threads: Threads to compute with.

        Raises:
            CheckpointError: llama.cpp refuses the file, or there is not enough memory for it.
        """
        self._log.clear()
        model = self.call("llama_model_load_from_file", str(path).encode(), self.call("llama_model_default_params"))
        if not model:
            raise CheckpointError(
                f"{path}: llama.cpp cannot load it ({self.complaint()}). Check it with bpwise verify."
            )
        context = None
        try:
            parameters = self.call("llama_context_default_params")
            parameters.n_ctx = row_tokens
            parameters.n_batch = parameters.n_ubatch = _BATCH_TOKENS
            parameters.n_threads = parameters.n_threads_batch = threads
            # The weights are judged, not the cache: llama.cpp's default rounds keys and values to float16.
            parameters.type_k = parameters.type_v = _TYPE_F32
            parameters.flash_attn_type = _FLASH_ATTENTION_OFF
            context = self.call("llama_init_from_model", model, parameters)
            if not context:
                raise CheckpointError(f"{path}: llama.cpp cannot prepare it ({self.complaint()}). Lower row_tokens.")
            sizes = {name: self.call(name, context) for name in ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch")}
            if sizes["llama_n_ctx"] < row_tokens or sizes["llama_n_batch"] < 1:
                raise self._unknown(f"made a context of {sizes} for rows of {row_tokens} tokens")
            yield EngineModel(self, path, model, context, min(_BATCH_TOKENS, sizes["llama_n_batch"]))
        finally:
            if context:
                self.call("llama_free", context)
            self.call("llama_model_free", model)

    def _heard(self, level: int, text: bytes, _: object) -> None:
        if level == _LOG_ERROR and len(self._log) < _LOG_LINES:
            self._log.append(text.decode("utf-8", "replace").strip())

    def _unknown(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: {what}: an interface of llama.cpp that this version of bpwise does not know. "
            f"Use the one it was tested with: pip install xllamacpp=={XLLAMACPP_VERSION}."
        )


class EngineModel:
    """A loaded model; made by ``LlamaLibrary.model``."""

    def __init__(self, library: LlamaLibrary, path: Path, model: int, context: int, batch_tokens: int) -> None:
        """Hold handles.

        Args:
            library: Whose they are.
            path: The model's file, for messages.
            model: Handle of the model.
            context: Handle of its context.
            batch_tokens: Tokens that it takes at once.
        """
        self._library = library
        self._path = path
        self._context = context
        self._batch_tokens = batch_tokens
        self.vocab_size: int = library.call("llama_vocab_n_tokens", library.call("llama_model_get_vocab", model))

    def logits(self, tokens: Tensor) -> Iterator[Tensor]:
        """Run one row from its first token.

        Args:
            tokens: Token ids, int64, shape (tokens,), each below ``vocab_size``.

        Yields:
            Logits of at most 256 positions after another, float32, shape (positions, ``vocab_size``), in memory of
            their own.

        Raises:
            NumericalError: llama.cpp fails, or a logit is NaN or infinite.
        """
        library = self._library
        library.call("llama_memory_clear", library.call("llama_get_memory", self._context), True)
        for first in range(0, len(tokens), self._batch_tokens):
            ids = np.ascontiguousarray(tokens[first : first + self._batch_tokens].numpy(), dtype=np.int32)
            wanted = np.ones(len(ids), dtype=np.int8)
            # Without positions and sequences llama.cpp goes on where the batch before ended.
            batch = _Batch(n_tokens=len(ids), token=ids.ctypes.data, logits=wanted.ctypes.data)
            code = library.call("llama_decode", self._context, batch)
            if code != 0:
                raise NumericalError(
                    f"{self._path}: llama.cpp failed with code {code} ({library.complaint()})."
                    " Check the original model."
                )
            pointer = library.call("llama_get_logits", self._context)
            values = torch.from_numpy(np.ctypeslib.as_array(pointer, (len(ids), self.vocab_size)).copy())
            if not all(map(torch.isfinite, values.aminmax())):
                raise NumericalError(f"{self._path}: NaN or infinity in llama.cpp's logits. The weights are broken.")
            yield values


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

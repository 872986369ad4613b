"""Runs one model in llama.cpp, in a process of its own: its failed assertions end the process that they fail in.

``library`` runs this file by its path, without site packages: it needs ctypes only, and imports nothing of bpwise. Its
argument is llama.cpp's shared library. Requests are lines of JSON on standard input, answered one after the other on
standard output by a line of JSON: ``problem`` in it is what llama.cpp refuses. The first answer, to no request, says
that the library is known. Logits follow their answer as they lie in memory. What llama.cpp itself prints goes to
standard error. The process ends with its standard input: it never outlives whoever started it.

The C interface passes structs by value, and their fields move between versions. So the wheel that brings the library
is pinned to one version, and any library is asked for its default parameters first: the fields that are used here
stand at the front, and their defaults are a pattern that another layout would not show. What was asked for is read
back from the context. Fields behind them are handed back as they came.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO

__all__ = ["Llama", "RefusedError", "main"]

_WARNING, _ERROR = 3, 4
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
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (_INT, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, _ContextParameters)),
    "llama_n_ctx": (_UINT, (_POINTER,)),
    "llama_n_batch": (_UINT, (_POINTER,)),
    "llama_n_ubatch": (_UINT, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_decode": (_INT, (_POINTER, _Batch)),
    "llama_get_logits": (_POINTER, (_POINTER,)),
}


class RefusedError(Exception):
    """What llama.cpp refuses, or what is wrong with it, in words."""


class Llama:
    """A library whose interface is the one above, and the model that it runs."""

    def __init__(self, path: str) -> None:
        """Load a shared library and check its interface.

        Args:
            path: The shared library.

        Raises:
            RefusedError: It cannot be loaded, lacks a function, or lays its parameters out otherwise.
        """
        try:
            self._library = ctypes.CDLL(path)
        except OSError as cause:
            raise RefusedError(f"cannot be loaded ({cause})") from cause
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise RefusedError(f"has no function {name}")
            function.restype, function.argtypes = result, arguments
        self._complaint = ""
        self._logger = _LOGGER(self._heard)  # the library keeps the pointer, so this must live as long
        self._call("llama_log_set", self._logger, None)
        found = self._call("llama_context_default_params")
        for name, expected in _DEFAULTS.items():
            if getattr(found, name) != expected:
                raise RefusedError(f"has {name} = {getattr(found, name)} by default. Expected {expected}")
        self._call("llama_backend_init")
        self._model: int | None = None
        self._context: int | None = None
        self._vocab_size = 0

    def load(self, path: str) -> dict[str, Any]:
        """Load a model file; the answer is the size of its vocabulary.

        Raises:
            RefusedError: llama.cpp refuses the file, or there is not enough memory for it.
        """
        self._complaint = ""
        parameters = self._call("llama_model_default_params")
        self._model = self._call("llama_model_load_from_file", os.fsencode(path), parameters)
        if not self._model:
            raise self._refused()
        self._vocab_size = self._call("llama_vocab_n_tokens", self._call("llama_model_get_vocab", self._model))
        return {"vocab_size": self._vocab_size}

    def prepare(self, row_tokens: int, batch_tokens: int, threads: int) -> dict[str, Any]:
        """Make room for rows of a length, to be run in batches; the answer is the sizes that llama.cpp made.

        Raises:
            RefusedError: llama.cpp refuses them, or there is not enough memory for them.
        """
        self._complaint = ""
        parameters = self._call("llama_context_default_params")
        parameters.n_ctx = row_tokens
        parameters.n_batch = parameters.n_ubatch = batch_tokens
        parameters.n_threads = parameters.n_threads_batch = threads
        # The weights are judged, not the cache: llama.cpp's default rounds keys and values to float16.
        parameters.type_k = parameters.type_v = _TYPE_F32
        parameters.flash_attn_type = _FLASH_ATTENTION_OFF
        self._context = self._call("llama_init_from_model", self._model, parameters)
        if not self._context:
            raise self._refused()
        names = ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch")
        return {name: self._call(name, self._context) for name in names}

    def decode(self, tokens: list[int], *, fresh: bool) -> ctypes.Array[ctypes.c_float]:
        """Run some tokens.

        Args:
            tokens: Token ids.
            fresh: Whether they begin a row; otherwise they follow those of the last call.

        Returns:
            The logits of all of them, one token after the other, in memory of the library's, until the next call.

        Raises:
            RefusedError: llama.cpp fails.
        """
        self._complaint = ""
        if fresh:
            self._call("llama_memory_clear", self._call("llama_get_memory", self._context), True)
        count = len(tokens)
        ids, wanted = (ctypes.c_int32 * count)(*tokens), (ctypes.c_int8 * count)(*[1] * count)
        # Without positions and sequences llama.cpp goes on where the batch before ended.
        batch = _Batch(n_tokens=count, token=ctypes.addressof(ids), logits=ctypes.addressof(wanted))
        code = self._call("llama_decode", self._context, batch)
        if code != 0:
            raise RefusedError(f"code {code}, {self._refused()}")
        return (ctypes.c_float * (count * self._vocab_size)).from_address(self._call("llama_get_logits", self._context))

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self._library, name)(*arguments)

    def _refused(self) -> RefusedError:
        return RefusedError(self._complaint or "no reason given")

    def _heard(self, level: int, text: bytes, _: object) -> None:
        if level in (_WARNING, _ERROR):
            os.write(2, text)  # for whoever looks why the process ended
        if level == _ERROR and not self._complaint:
            self._complaint = text.decode("utf-8", "replace").strip()


def main() -> None:
    """Answer requests until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints is no answer
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    try:
        llama = Llama(sys.argv[1])
    except RefusedError as refusal:
        _send(answers, {"problem": str(refusal)})
        os._exit(1)
    _send(answers, {})
    while True:
        request = json.loads(requests.get())
        try:
            if "tokens" in request:
                _send(answers, {}, llama.decode(**request))
            else:
                _send(answers, llama.load(**request) if "path" in request else llama.prepare(**request))
        except RefusedError as refusal:
            _send(answers, {"problem": str(refusal)})


def _listen(requests: queue.SimpleQueue[str]) -> None:
    # While llama.cpp computes as well: without whoever started it, nobody wants what it computes.
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _send(answers: BinaryIO, answer: dict[str, Any], logits: ctypes.Array[ctypes.c_float] | None = None) -> None:
    try:
        answers.write(json.dumps(answer).encode() + b"\n")
        if logits is not None:
            answers.write(memoryview(logits).cast("B"))
        answers.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()

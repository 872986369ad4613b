"""Base files of llama-perplexity (``--kl-divergence-base``): an original's predictions, 16 bits each.

The format is that of llama.cpp's tools/perplexity/perplexity.cpp. Little-endian, nothing aligned::

    8 bytes                   _logits_
    int32                     tokens in each window (n_ctx), size of the vocabulary, number of windows
    int32, n_ctx a window     tokens as the text has them, before a BOS token replaces the first of a window
    for each window, for each position from n_ctx / 2 to n_ctx - 2 (each predicts the token behind it):
      float32 scale, float32 lowest log-probability, uint16 codes of the vocabulary, one 0 more if it is odd

A log-probability is ``scale * code + lowest``, in float32. What lies more than 16 below the most likely token is stored
as if it lay 16 below. The file has no checksum: its size is compared, and every distribution must sum to about 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...checkpoint.files.atomic import atomic_file
from ...checkpoint.files.disk_errors import explained_reading, require_room
from ...checkpoint.files.operations import create
from ...errors import FormatError
from .softmax import log_sum_exp

__all__ = ["LEAST_WINDOW", "BaseFile", "base_file_bytes", "counted", "encoded", "is_base_file", "writing_base"]

LEAST_WINDOW = 3
"""Tokens of the shortest window that predicts one in its second half."""

_MAGIC = b"_logits_"
_HEADER_BYTES = len(_MAGIC) + 12
_REACH = 16.0
"""Nats below the most likely token that are stored."""
_LARGEST_CODE = 65535
_ROW_HEAD = 4
"""Two float32 in units of a code."""

_SUM_TOLERANCE = 0.25
"""The floor at 16 nats adds 1e-7 for each token of a vocabulary: 0.1 for a million."""


def counted(window_tokens: int) -> slice:
    """Return the positions of a window whose predictions count: those of its second half but the last."""
    return slice(window_tokens // 2, window_tokens - 1)


def base_file_bytes(windows: int, window_tokens: int, vocab_size: int) -> int:
    """Return the size of a base file."""
    rows = len(range(window_tokens)[counted(window_tokens)])
    return _HEADER_BYTES + windows * (4 * window_tokens + 2 * rows * _row_codes(vocab_size))


def is_base_file(path: Path) -> bool:
    """Return whether a file begins as a base file does."""
    with explained_reading(path, FormatError), path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


@dataclass(frozen=True, slots=True, eq=False)
class BaseFile:
    """A base file, its header and tokens read.

    Attributes:
        path: The file.
        vocab_size: Number of tokens of the vocabulary.
        tokens: Token ids as the text has them, int64, shape (windows, window tokens).
    """

    path: Path
    vocab_size: int
    tokens: Tensor

    @classmethod
    def open(cls, path: Path) -> BaseFile:
        """Read what stands before the predictions.

        Raises:
            FormatError: It is none, is damaged, or cannot be read.
        """
        path = Path(path)
        with explained_reading(path, FormatError), path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
            if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
                raise _damaged(path, f"{head[: len(_MAGIC)]!r} at its start", f"{_MAGIC!r} and three sizes")
            window_tokens, vocab_size, windows = np.frombuffer(head, "<i4", offset=len(_MAGIC)).tolist()
            if window_tokens < LEAST_WINDOW or vocab_size < 1 or windows < 1:
                sizes = f"{windows} windows of {window_tokens} tokens and a vocabulary of {vocab_size}"
                raise _damaged(path, sizes, f"at least 1 window of {LEAST_WINDOW} tokens and a vocabulary of 1")
            expected, size = base_file_bytes(windows, window_tokens, vocab_size), path.stat().st_size
            if size != expected:
                raise _damaged(path, f"{size} bytes", f"{expected} for {windows} windows of {window_tokens} tokens")
            data = file.read(4 * windows * window_tokens)
        tokens = torch.from_numpy(np.frombuffer(data, "<i4").astype(np.int64)).view(windows, window_tokens)
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            found = f"token ids from {int(tokens.min())} to {int(tokens.max())}"
            raise _damaged(path, found, f"ids below the vocabulary's {vocab_size}")
        return cls(path, vocab_size, tokens)

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], Tensor]]:
        """Open the predictions; what is yielded reads the next ones, given how many.

        It returns log-probabilities, float32, shape (predictions, vocabulary), and raises a FormatError if they are
        damaged.
        """
        with explained_reading(self.path, FormatError), self.path.open("rb") as file:
            file.seek(_HEADER_BYTES + 4 * self.tokens.numel())
            yield lambda count: self._read(file, count)

    def _read(self, file: BinaryIO, count: int) -> Tensor:
        width = _row_codes(self.vocab_size)
        data = file.read(2 * width * count)
        if len(data) < 2 * width * count:
            raise _damaged(self.path, "an end that came early", "the predictions that its head tells of")
        rows = np.frombuffer(data, "<u2").reshape(count, width)
        heads = torch.from_numpy(np.ascontiguousarray(rows[:, :_ROW_HEAD]).view("<f4").astype(np.float32))
        scale, lowest = heads[:, :1], heads[:, 1:]
        codes = torch.from_numpy(rows[:, _ROW_HEAD : _ROW_HEAD + self.vocab_size].astype(np.float32))
        found = scale * codes + lowest
        sums = found.double().exp().sum(dim=1)
        wrong = (~((sums - 1).abs() < _SUM_TOLERANCE)).nonzero()  # NaN is wrong, too
        if len(wrong):
            worst = f"probabilities that sum to {float(sums[wrong[0, 0]]):.3g}"
            raise _damaged(self.path, worst, "about 1")
        return found


@contextmanager
def writing_base(path: Path, tokens: Tensor, vocab_size: int) -> Iterator[Callable[[Tensor], None]]:
    """Write a base file; what is yielded takes the logits of all counted positions, window after window.

    The file has its name only when the body ends, and all logits came.

    Args:
        path: The file to make or replace.
        tokens: Token ids as the text has them, int64, shape (windows, window tokens).
        vocab_size: Columns of the logits.

    Raises:
        DiskFullError: The disk has too little room.
        WorkDirectoryError: The file cannot be written.
    """
    windows, window_tokens = tokens.shape
    size = base_file_bytes(windows, window_tokens, vocab_size)
    require_room(path, size)
    with atomic_file(path) as temporary:
        with create(temporary) as file:
            sizes = np.array([window_tokens, vocab_size, windows], "<i4")
            file.write(_MAGIC + sizes.tobytes() + tokens.numpy().astype("<i4").tobytes())
            yield lambda logits: _write(file, logits)
        assert temporary.stat().st_size == size, f"{path}: not all logits came"


def _write(file: BinaryIO, logits: Tensor) -> None:
    file.write(encoded(logits))


def encoded(logits: Tensor) -> bytes:
    """Return predictions as a base file stores them.

    Args:
        logits: Shape (predictions, vocabulary), float32, on the CPU, finite.
    """
    highest = logits.amax(dim=1, keepdim=True)
    lowest = torch.maximum(logits.amin(dim=1, keepdim=True), highest - _REACH)
    scale = (highest - lowest) / _LARGEST_CODE
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = torch.where(logits > lowest, ((logits - lowest) * inverse).round(), 0.0)
    heads = torch.cat([scale, lowest - highest - log_sum_exp(logits, highest)], dim=1)
    rows = np.zeros((len(logits), _row_codes(logits.shape[1])), "<u2")
    rows[:, :_ROW_HEAD] = heads.numpy().astype("<f4").view("<u2")
    rows[:, _ROW_HEAD : _ROW_HEAD + logits.shape[1]] = codes.numpy()
    return rows.tobytes()


def _row_codes(vocab_size: int) -> int:
    return _ROW_HEAD + 2 * ((vocab_size + 1) // 2)


def _damaged(path: Path, got: str, expected: str) -> FormatError:
    return FormatError(
        f"{path}: not a whole file of llama-perplexity's --kl-divergence-base. Got {got}. Expected {expected}. Make it "
        "again."
    )

"""Windows of a text as llama-perplexity cuts it: one after another from its start, the rest left out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.files.disk_errors import explained_reading
from ...errors import CalibrationError
from ...measure.text.calibration import CalibrationSet
from ...measure.text.sources import Document, is_data_set, read_texts
from ...measure.text.tokenizer import LoadedTokenizer, leading_ids

__all__ = ["cut_windows", "model_input", "read_text"]

_BLANK_LINE = " \n"
"""A blank line of WikiText's files; the Hub's data set has an empty row in its place."""

_SHOWN_DIGITS = 16
"""Of a text's SHA-256, so that two can see whether they run the same."""


def read_text(source: str | Path) -> str:
    """Return a text as llama-perplexity reads it from a file: all of it but one newline at its end.

    Args:
        source: A file of any name; or a Hub data set ``name[:config][:split]`` whose rows are the lines of a file, as
            ``Salesforce/wikitext:wikitext-2-raw-v1:test``, of which the bytes of ``wiki.test.raw`` are made again.

    Raises:
        CalibrationError: It cannot be read, is no UTF-8, or the data set's rows are no lines.
    """
    return _decoded(_file_bytes(source), source)


def _file_bytes(source: str | Path) -> bytes:
    path = Path(source)
    if isinstance(source, str) and not path.exists() and is_data_set(source):
        return "".join(map(_line, read_texts(source).documents())).encode()
    with explained_reading(path, CalibrationError):
        return path.read_bytes()


def _decoded(data: bytes, source: str | Path) -> str:
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as cause:
        raise CalibrationError(f"{source}: cannot be read as UTF-8 text ({cause}). Convert it to UTF-8.") from cause


def _line(document: Document) -> str:
    if document.text and not document.text.endswith("\n"):
        raise CalibrationError(
            f"{document.origin}: not a line of a file. Got a row without a newline at its end. Expected a data set as "
            "Salesforce/wikitext:wikitext-2-raw-v1:test. Write the text to a file, and name that."
        )
    return document.text or _BLANK_LINE


def cut_windows(
    tokenizer: LoadedTokenizer, source: str | Path, *, window_tokens: int, most: int | None = None
) -> CalibrationSet:
    """Tokenize a text as a whole and cut it.

    The tokenizer puts BOS before the text if it does so by itself. Special tokens in the text are taken for text.

    Args:
        tokenizer: The model's.
        source: As for ``read_text``.
        window_tokens: Length of each window.
        most: Number of windows to take; None for all.

    Returns:
        The windows as the text has them: BOS in the first of them alone; see ``model_input``. The description tells
        the text's SHA-256.

    Raises:
        CalibrationError: As ``read_text``, or the text is shorter than two windows.
    """
    data, bos = _file_bytes(source), leading_ids(tokenizer)
    ids = [*bos, *tokenizer.text_ids(_decoded(data, source))]
    if len(ids) < 2 * window_tokens:
        raise CalibrationError(
            f"{source}: too little text. Got {len(ids)} tokens. Expected at least {2 * window_tokens}, two windows. "
            "Name another text, or lower --ctx-size."
        )
    digest = hashlib.sha256(data).hexdigest()
    windows = len(ids) // window_tokens
    windows = windows if most is None else min(windows, most)
    return CalibrationSet(
        tokens=torch.tensor(ids[: windows * window_tokens]).view(windows, window_tokens),
        origins=(str(source),) * windows,
        description=f"{windows} windows of {window_tokens} tokens of {source} (SHA-256 {digest[:_SHOWN_DIGITS]})",
        adds_bos=bool(bos),
    )


def model_input(tokens: Tensor, bos: int | None) -> Tensor:
    """Return windows as the model is run on them: where the text begins with BOS, so does each of them.

    Args:
        tokens: Windows as the text has them, int64, shape (windows, window tokens).
        bos: Id of the tokenizer's BOS token; None if it has none.
    """
    inputs = tokens.clone()
    if int(tokens[0, 0]) == bos:
        inputs[:, 0] = tokens[0, 0]
    return inputs

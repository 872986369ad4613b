"""Tokens of a tokenizer that the model's embedding has no row for, as the tokenizer's files tell."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import BpwiseWarning, CheckpointError
from ..files.schemas import read_json
from ..model.names import text_config
from .checkpoint import Checkpoint, embedding_rows

__all__ = ["tokens_beyond", "warn_of_tokens_beyond"]

_SHOWN_TOKENS = 5
_SHOWN_CHARACTERS = 40

_MOST_DIGITS = 18


def tokens_beyond(checkpoint: Checkpoint) -> dict[int, str]:
    """Return the tokens whose ids the embedding has no row for, by id, ascending.

    So it is with tokens that were added for a chat format to a model whose embedding was not resized.

    Args:
        checkpoint: The model. Of files that cannot be read nothing is said here: `load_tokenizer` reports them.
    """
    rows = _rows(checkpoint)
    if rows is None:
        return {}
    found = {id_: token for id_, token in _tokens(checkpoint) if type(id_) is int and id_ >= rows}
    return {id_: token for id_, token in sorted(found.items()) if isinstance(token, str)}


def warn_of_tokens_beyond(checkpoint: Checkpoint) -> None:
    """Warn of ``tokens_beyond``, if there are any."""
    beyond = tokens_beyond(checkpoint)
    if not beyond:
        return
    shown = [f"{token[:_SHOWN_CHARACTERS]!r} ({id_})" for id_, token in list(beyond.items())[:_SHOWN_TOKENS]]
    more = f" and {len(beyond) - _SHOWN_TOKENS} more" if len(beyond) > _SHOWN_TOKENS else ""
    rows = _rows(checkpoint)
    warnings.warn(
        f"{checkpoint.directory}: the tokenizer has tokens beyond the vocabulary. Got {', '.join(shown)}{more}. "
        f"Expected ids below the {rows} rows of the embedding. Text with these tokens cannot be run: keep them out of "
        "prompts, or resize the model's embedding.",
        BpwiseWarning,
        stacklevel=2,
    )


def _rows(checkpoint: Checkpoint) -> int | None:
    # Of an embedding by another name, those that the config states: others would not fit when they are loaded.
    stored = embedding_rows(checkpoint)
    stated = text_config(checkpoint.config).get("vocab_size") if stored is None else stored
    return stated if type(stated) is int else None


def _tokens(checkpoint: Checkpoint) -> Iterator[tuple[Any, Any]]:
    """Yield ids and tokens from all files that hold some, unchecked."""
    tokenizer = _read(checkpoint, "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    for ids in (vocabulary, _read(checkpoint, "vocab.json"), _read(checkpoint, "added_tokens.json")):
        if isinstance(ids, Mapping):
            yield from ((id_, token) for token, id_ in ids.items())
    if isinstance(vocabulary, list):  # tokens with their scores, in the order of their ids
        yield from ((id_, entry[0]) for id_, entry in enumerate(vocabulary) if isinstance(entry, list) and entry)
    if isinstance(added, list):
        yield from ((entry.get("id"), entry.get("content")) for entry in added if isinstance(entry, Mapping))
    decoder = _read(checkpoint, "tokenizer_config.json").get("added_tokens_decoder")
    for id_, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        if isinstance(entry, Mapping) and id_.isascii() and id_.isdecimal() and len(id_) <= _MOST_DIGITS:
            yield int(id_), entry.get("content")


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    try:
        return read_json(checkpoint.file(name), CheckpointError)
    except CheckpointError:
        return {}

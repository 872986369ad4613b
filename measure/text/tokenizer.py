"""What calibration and evaluation ask of a tokenizer, and how to load one from a model directory."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ...checkpoint.files.schemas import read_json
from ...checkpoint.model.config import parse_config
from ...checkpoint.model.families import is_known
from ...checkpoint.source.hub import require_own_files
from ...errors import CalibrationError, CheckpointError, reason
from .chat_template import ChatTemplate
from .sources import valid_unicode

__all__ = [
    "LoadedTokenizer",
    "Tokenizer",
    "chat_template",
    "end_ids",
    "leading_ids",
    "load_tokenizer",
    "ordinary_ids",
    "token_fingerprint",
]


class Tokenizer(Protocol):
    """The part of a Transformers tokenizer that is used here."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, if there is one."""

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""

    @property
    def all_special_ids(self) -> Sequence[int]:
        """Ids of the named special tokens."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Added tokens by id; their attribute ``special`` tells control tokens from text."""

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """The named special tokens by name, as ``bos_token``."""

    @property
    def chat_template(self) -> Any:
        """The chat template, templates by name, or None."""

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """Return ``input_ids``: a list of ids for a string, a list of such lists for a list."""

    def decode(self, token_ids: Any) -> str:
        """Return the text of token ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the tokens of a list of ids."""


class LoadedTokenizer:
    """A Transformers tokenizer whose failures name the directory that its files are in.

    Attributes:
        transformers: The tokenizer itself, for libraries that want it.
    """

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        """Wrap a tokenizer.

        Args:
            directory: Where its files are.
            tokenizer: What Transformers made of them.
        """
        self.transformers = tokenizer
        self._directory = directory

    @property
    def bos_token_id(self) -> int | None:
        """See ``Tokenizer``."""
        return self._id("bos_token_id")

    @property
    def eos_token_id(self) -> int | None:
        """See ``Tokenizer``."""
        return self._id("eos_token_id")

    @property
    def all_special_ids(self) -> Sequence[int]:
        """See ``Tokenizer``."""
        with self._explained():
            return list(self.transformers.all_special_ids)

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """See ``Tokenizer``."""
        with self._explained():
            return dict(self.transformers.added_tokens_decoder)

    @property
    def special_tokens_map(self) -> Mapping[str, Any]:
        """See ``Tokenizer``."""
        with self._explained():
            return dict(self.transformers.special_tokens_map)

    @property
    def chat_template(self) -> Any:
        """See ``Tokenizer``."""
        return getattr(self.transformers, "chat_template", None)

    def __len__(self) -> int:
        """See ``Tokenizer``."""
        with self._explained():
            return len(self.transformers)

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """See ``Tokenizer``."""
        with self._explained():
            encoded = self.transformers(text, add_special_tokens=add_special_tokens, verbose=verbose)
            return {"input_ids": encoded["input_ids"]}

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text without BOS; special tokens that are named in it are taken for text."""
        with self._explained():
            encoded = self.transformers(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
            return list(encoded["input_ids"])

    def decode(self, token_ids: Any) -> str:
        """See ``Tokenizer``."""
        with self._explained():
            return valid_unicode(str(self.transformers.decode(token_ids)))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """See ``Tokenizer``."""
        with self._explained():
            return self.transformers.convert_ids_to_tokens(ids)

    def _id(self, name: str) -> int | None:
        with self._explained():
            value = getattr(self.transformers, name)
            if value is None or type(value) is int:
                return value
            raise ValueError(f"{name} is {value!r}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not _is_failure(error):
                raise
            raise CalibrationError(
                f"{self._directory}: its tokenizer fails ({reason(error)}). The tokenizer's files are damaged, or "
                "do not belong together. Get them again."
            ) from error


def load_tokenizer(directory: Path) -> LoadedTokenizer:
    """Load the tokenizer of a model directory, without the network and without running code in it.

    Args:
        directory: Holds ``tokenizer.json`` or other tokenizer files that Transformers knows.

    Returns:
        The tokenizer. Whatever Transformers or the tokenizers library raise when it is used becomes a CalibrationError.

    Raises:
        CalibrationError: The directory or the files in it are missing, damaged, or need their own code; or the
            tokenizer fails on a letter.
        CheckpointError: A file leads outside the directory, or is only a pointer of Git LFS; or config.json is damaged.
    """
    if not directory.is_dir():
        raise CalibrationError(f"{directory}: no such directory. Name the directory of the model.")
    require_own_files(directory)
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds to import

    config = _model_config(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise CalibrationError(
            f"{directory}: its tokenizer cannot be loaded ({reason(error)}). Expected tokenizer.json or other "
            "files that Transformers reads without code of the model's own. Copy the model's tokenizer files there."
        ) from error
    loaded = LoadedTokenizer(directory, tokenizer)
    leading_ids(loaded)  # one that fails on any text does so here, not after long work
    return loaded


def _is_failure(error: BaseException) -> bool:
    """Return whether a library failed on the tokenizer's files, in contrast to Ctrl-C and the end of the process.

    The tokenizers library raises bare Exceptions. Its panics are no Exceptions, and their class cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def _model_config(directory: Path) -> Any:
    # As it is read for the model: Transformers itself does not take all that makers write, as Phi-3's rope type `su`.
    path = directory / "config.json"
    config = read_json(path, CheckpointError) if path.is_file() else {}
    return parse_config(config, path) if is_known(config) else None


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the BOS id in a list if the tokenizer itself puts it before a text, else an empty list.

    The configuration flag ``add_bos_token`` is often absent or ignored, so this looks at what happens.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def ordinary_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the ids below `vocab_size` that stand for text, ascending: no special tokens, no padding rows.

    Args:
        tokenizer: Names its special tokens.
        vocab_size: Rows of the model's embedding; may be more or fewer than the tokenizer's tokens.
    """
    special = set(tokenizer.all_special_ids)
    special.update(id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
    return [id_ for id_ in range(min(vocab_size, len(tokenizer))) if id_ not in special]


def end_ids(directory: Path, tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end what a model says: those of generation_config.json and config.json, and EOS.

    Args:
        directory: The model's directory.
        tokenizer: Its tokenizer.

    Raises:
        CalibrationError: A file is damaged.
    """
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            named = read_json(directory / name, CalibrationError).get("eos_token_id")
            found += named if isinstance(named, list) else [named]
    return {each for each in found if type(each) is int and each >= 0}


def token_fingerprint(tokenizer: Tokenizer, tokens: Tensor) -> str:
    """Return 32 hexadecimal digits that tell which tokens the ids in rows stand for.

    Tokenizers that agree on the ids in the rows give the same, whatever other tokens they have.

    Args:
        tokenizer: The tokenizer.
        tokens: Rows of ids, int64, of any shape.
    """
    ids = tokens.unique().tolist()
    named = list(zip(ids, map(str, tokenizer.convert_ids_to_tokens(ids)), strict=True))
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template that Transformers takes by default.

    Raises:
        CalibrationError: There is none.
    """
    source = tokenizer.chat_template
    if isinstance(source, Mapping):
        source = source.get("default")
    if not source or not isinstance(source, str):
        raise CalibrationError(
            "tokenizer: has no chat template. Turn the chat template off and name a text column, or use the "
            "tokenizer of a chat model."
        )
    return ChatTemplate(source, tokenizer.special_tokens_map)

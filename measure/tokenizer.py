"""What calibration and evaluation ask of a tokenizer, and how to load one from a model directory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..convert.hub import require_own_files
from ..errors import CalibrationError
from .text import ChatRenderer

__all__ = ["Tokenizer", "chat_renderer", "leading_ids", "load_tokenizer", "ordinary_ids"]


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

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """Return ``input_ids``: a list of ids for a string, a list of such lists for a list."""

    def decode(self, token_ids: Any) -> str:
        """Return the text of token ids."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Renders chat turns."""


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model directory, without the network and without running code in it.

    Args:
        directory: Holds ``tokenizer.json`` or other tokenizer files that Transformers knows.

    Returns:
        A Transformers tokenizer.

    Raises:
        CalibrationError: The directory or the files in it are missing, damaged, or need their own code.
        CheckpointError: A file leads outside the directory, or is only a pointer of Git LFS.
    """
    if not directory.is_dir():
        raise CalibrationError(f"{directory}: no such directory. Name the directory of the model.")
    require_own_files(directory)
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds to import

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged tokenizer.json
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"{directory}: its tokenizer cannot be loaded ({reason}), expected tokenizer.json or other files "
            "that Transformers reads without code of the model's own. Copy the model's tokenizer files there."
        ) from error
    return tokenizer


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


def chat_renderer(tokenizer: Tokenizer) -> ChatRenderer:
    """Return a function that renders chat turns as text with the tokenizer's chat template.

    Transformers runs the template in a sandbox.

    Raises:
        CalibrationError: There is no template; from the function, that the template rejects the turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "tokenizer: has no chat template. Turn the chat template off and name a text column, or use the "
            "tokenizer of a chat model."
        )
    from jinja2 import TemplateError  # noqa: PLC0415 - only needed here; Transformers renders with it

    def render(turns: list[Mapping[str, Any]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"chat template: cannot render the turns {str(turns)[:100]} ({error}), expected objects with "
                "'role' and 'content' as the model's template wants them. Repair or remove the row."
            ) from error

    return render

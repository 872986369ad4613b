"""Calibration and evaluation rows: token ids of equal length, and where each row came from."""

import hashlib
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.files.safetensors_file import load_metadata, load_tensors, save_tensors
from ...checkpoint.files.schemas import check_checksum, checksummed, metadata_begins
from ...errors import CalibrationError, ConfigError, ShapeError
from .builtin_text import TextUse, builtin_texts
from .chat_rows import render_turns
from .mixture import BUILT_IN, SELF, Share, TextOptions, is_plain, shares_of, sources_text
from .rows import RANDOM_ORIGIN, TokenPool, n_random_rows, random_ids, read_pool, spread_starts
from .sources import TextSource, read_texts
from .tokenizer import Tokenizer, chat_template, leading_ids, token_fingerprint

__all__ = [
    "DEFAULT_ROW_TOKENS",
    "CalibrationConfig",
    "CalibrationSet",
    "build_calibration",
    "is_calibration",
    "require_ids_below",
]

DEFAULT_ROW_TOKENS = 1024
"""Length of rows unless another is asked for, or the model's context is shorter."""

_FORMAT = "bpwise-calibration"
_FORMAT_VERSION = "1"

_SHOWN_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Which text to take, and how much.

    Attributes:
        source: Text file, directory of such files, or Hub data set ``name[:config][:split]``; ``self`` has the model
            write the rows; ``built-in`` or None for the text that ships with bpwise, which works offline; ``mix`` for
            data sets of the Hub of several kinds; or several of these, as ``shares_of`` takes them.
        column: Column of a data set that holds the text; None looks for ``text``, then ``content``.
        chat_template: Render chat turns with the tokenizer's chat template; without a column they are looked for in
            ``messages``, ``conversations`` and ``conversation``, then in columns of questions and answers.
        rows: Number of rows.
        row_tokens: Length of each row in tokens, BOS included; None for 1024, or the model's context if that is
            shorter (see ``context.fit_row_tokens``).
        seed: Chooses the places that rows are taken from, and random tokens.
    """

    source: str | None = None
    column: str | None = None
    chat_template: bool = False
    rows: int = 32
    row_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A number is out of range, or a column is named where there is none.
        """
        if self.rows < 1:
            raise ConfigError(f"rows: not usable. Got {self.rows}. Expected at least 1. Choose another.")
        if self.row_tokens is not None and self.row_tokens < 2:
            raise ConfigError(f"row_tokens: not usable. Got {self.row_tokens}. Expected at least 2. Choose another.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: not usable. Got {self.seed}. Expected from 0 to 2**63 - 1. Choose another.")
        named = {share.source for share in self.shares} - {BUILT_IN, SELF}
        if not named and (self.column is not None or self.chat_template):
            raise ConfigError("column, chat_template: need a text of your own, which has columns. Leave them out.")

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources, and what part of the rows each gives."""
        return shares_of(self.source)

    @property
    def options(self) -> TextOptions:
        """The same, to tell to others."""
        return TextOptions(**{**asdict(self), "source": sources_text(self.source)})

    @property
    def is_built_in(self) -> bool:
        """Whether the built-in text is the only source."""
        return self.source in {None, BUILT_IN}

    @property
    def tokens_each(self) -> int:
        """Length of each row in tokens, the default where none is asked for."""
        return DEFAULT_ROW_TOKENS if self.row_tokens is None else self.row_tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationSet:
    """Rows of token ids to run a model on.

    Attributes:
        tokens: Token ids, shape (rows, row_tokens), int64, on the CPU.
        origins: For each row where its text begins, ``<kind>: <document>``, or ``<kind>`` if that is one document.
        description: What the text is and how rows were taken from it, for reports.
        adds_bos: Whether each row begins with a BOS token.
        vocabulary: Which tokens the ids stand for, as ``token_fingerprint``; None if that is not known.
        made_from: Digest of all that decided about the rows, where they were made for a run; else None.
        unreached: Data sets that could not be reached, whose place the built-in text took.
        options: What they were made with; None if that is not known.
        later_origins: For each row where in it other documents begin, and their origins; empty where not known.
    """

    tokens: Tensor
    origins: tuple[str, ...]
    description: str
    adds_bos: bool
    vocabulary: str | None = None
    made_from: str | None = None
    unreached: tuple[str, ...] = ()
    options: TextOptions | None = None
    later_origins: tuple[tuple[tuple[int, str], ...], ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ShapeError: `tokens` is not a matrix with one row per origin.
            CalibrationError: `tokens` is empty, not int64, or holds negative ids.
        """
        if self.tokens.ndim != 2 or len(self.tokens) != len(self.origins):
            raise ShapeError(
                "calibration set", "tokens", got=tuple(self.tokens.shape), expected=(len(self.origins), -1)
            )
        if self.tokens.dtype != torch.int64 or self.tokens.numel() == 0 or int(self.tokens.min()) < 0:
            raise CalibrationError(
                f"calibration set: not usable. Got {self.tokens.numel()} tokens of {self.tokens.dtype}. Expected at "
                "least one, int64 and not negative. Build the set anew."
            )

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any token or origin."""
        digest = hashlib.sha256(json.dumps([list(self.tokens.shape), list(self.origins)]).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()[:32]

    def origin_of(self, row: int, position: int) -> str:
        """Return the origin of the document that a token of a row belongs to, as far as that is known."""
        later = self.later_origins[row] if self.later_origins else ()
        return next((origin for start, origin in reversed(later) if start <= position), self.origins[row])

    @property
    def rows_per_kind(self) -> dict[str, int]:
        """Number of rows whose text begins in each kind of origin, most frequent first."""
        return dict(Counter(origin.split(": ", 1)[0] for origin in self.origins).most_common())

    def save(self, path: str | Path) -> None:
        """Write the set as a safetensors file, atomically.

        Raises:
            WorkDirectoryError: The file cannot be written.
        """
        metadata = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "origins": json.dumps(self.origins),
            "description": self.description,
            "adds_bos": json.dumps(self.adds_bos),
            "fingerprint": self.fingerprint,
            **({} if self.vocabulary is None else {"vocabulary": self.vocabulary}),
            **({} if self.made_from is None else {"made_from": self.made_from}),
            **({} if self.options is None else {"options": json.dumps(asdict(self.options))}),
            **({"unreached": json.dumps(self.unreached)} if self.unreached else {}),
        }
        save_tensors(Path(path), {"tokens": self.tokens.contiguous()}, checksummed(metadata))

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationSet":
        """Read a set that `save` wrote: equal to it but for ``later_origins``.

        Raises:
            CalibrationError: The file is missing, damaged, of another kind or of another version.
        """
        path = Path(path)
        metadata = load_metadata(path, CalibrationError)
        check_checksum(metadata, CalibrationError, where=str(path), remedy="Build the set anew.")
        kind, version = metadata.get("format"), metadata.get("version")
        if (kind, version) != (_FORMAT, _FORMAT_VERSION):
            raise CalibrationError(
                f"{path}: not a calibration set of this version. Got format {str(kind)[:_SHOWN_CHARACTERS]} version "
                f"{str(version)[:_SHOWN_CHARACTERS]}. Expected {_FORMAT} version {_FORMAT_VERSION}. Build the set anew."
            )
        tensors = load_tensors(path, CalibrationError)
        try:
            loaded = cls(
                tokens=tensors["tokens"],
                origins=tuple(map(str, json.loads(metadata["origins"]))),
                description=metadata["description"],
                adds_bos=json.loads(metadata["adds_bos"]) is True,
                vocabulary=metadata.get("vocabulary"),
                made_from=metadata.get("made_from"),
                unreached=tuple(map(str, json.loads(metadata.get("unreached", "[]")))),
                options=TextOptions.read(metadata.get("options"), f"{path}: options"),
            )
            "".join((loaded.description, *loaded.origins)).encode()  # half a surrogate pair cannot be written
        except (KeyError, TypeError, ValueError, RecursionError, ShapeError) as error:
            raise CalibrationError(f"{path}: damaged calibration set ({error}). Build the set anew.") from error
        if loaded.fingerprint != metadata.get("fingerprint"):
            raise CalibrationError(
                f"{path}: the contents were changed. Got fingerprint {loaded.fingerprint}. Expected "
                f"{str(metadata.get('fingerprint'))[:_SHOWN_CHARACTERS]}. Build the set anew."
            )
        return loaded


def build_calibration(
    tokenizer: Tokenizer,
    config: CalibrationConfig,
    *,
    vocab_size: int,
    part: TextUse = "calibration",
) -> CalibrationSet:
    """Take rows of tokens from text.

    Documents are tokenized without special tokens and joined by the EOS token (by a newline if there is
    none). Rows are windows of them that do not overlap, spread evenly over all kinds of text at random
    places; documents may end within a row. Rows begin with BOS exactly if the tokenizer puts it before a text
    by itself. Of the built-in calibration text every 16th row is random ordinary tokens instead.

    For evaluation on the user's text rows are consecutive from its start (stride = window) and documents are
    joined by a blank line, as perplexity tools do. The user sees to it that it is not the calibration text;
    the two parts of the built-in text never overlap.

    Args:
        tokenizer: The model's tokenizer.
        config: Which text, how much of it, and the seed that alone decides everything random.
        vocab_size: Rows of the model's token embedding; ids are below it.
        part: What the rows are for.

    Returns:
        The rows, `config.rows` by `config.tokens_each`.

    Raises:
        CalibrationError: The text cannot be read, there is too little of it, the tokenizer has no chat
            template though one is asked for, or its ids do not fit the model.
        ConfigError: The source is the model itself, or several.
    """
    if not is_plain(config.source):
        raise ConfigError(f"text: not usable. Got {config.source!r}. Expected one text or data set. Name one.")
    bos = leading_ids(tokenizer)
    n_random = n_random_rows(config.rows) if part == "calibration" and config.is_built_in else 0
    n_text, body_tokens = config.rows - n_random, config.tokens_each - len(bos)
    generator = torch.Generator().manual_seed(config.seed)
    in_order = part == "evaluation" and not config.is_built_in
    source, pool = _read_text(tokenizer, config, part, n_text, body_tokens, in_order=in_order)
    starts = (
        [row * body_tokens for row in range(n_text)]
        if in_order
        else spread_starts(len(pool.tokens), n_text, body_tokens, generator)
    )
    rows = [bos + pool.tokens[start : start + body_tokens] for start in starts]
    origins = [pool.origin_at(start) for start in starts]
    later = [pool.later_origins(start, body_tokens, lead=len(bos)) for start in starts]
    if in_order:
        origins = [f"{origin}: window {number}" for number, origin in enumerate(origins)]
    if n_random:
        rows += [bos + ids for ids in random_ids(tokenizer, vocab_size, (n_random, body_tokens), generator)]
        origins += [RANDOM_ORIGIN] * n_random
        later += [()] * n_random
    tokens = torch.tensor(rows, dtype=torch.int64)
    require_ids_below(tokens, vocab_size, tokenizer)
    return CalibrationSet(
        tokens=tokens,
        origins=tuple(origins),
        description=_describe(source, config, n_random=n_random, in_order=in_order, has_bos=bool(bos)),
        adds_bos=bool(bos),
        vocabulary=token_fingerprint(tokenizer, tokens),
        options=config.options,
        later_origins=tuple(later),
    )


def require_ids_below(
    tokens: Tensor, vocab_size: int, tokenizer: Tokenizer | None = None, *, use: str = "calibration"
) -> None:
    """Refuse text with a token that a model's embedding has no row for.

    Args:
        tokens: Token ids, of any integer dtype and shape.
        vocab_size: Rows of the model's token embedding.
        tokenizer: What made the ids, to name the token; None if they are of a saved set.
        use: What the text is for, for the message.

    Raises:
        CalibrationError: An id is outside the vocabulary.
    """
    largest = int(tokens.max()) if tokens.numel() else 0
    if largest < vocab_size:
        return
    got = f"Got token id {largest}. Expected ids below the vocabulary size {vocab_size}"
    if tokenizer is None:
        raise CalibrationError(f"{use} text: not of this model. {got}. Build the rows with this model's tokenizer.")
    (token,) = tokenizer.convert_ids_to_tokens([largest])
    raise CalibrationError(
        f"tokenizer: its ids do not fit the model. {got}. The text has the token {token!r}. Use the tokenizer that "
        "belongs to the model, text without that token, or resize the model's embedding."
    )


def _read_text(
    tokenizer: Tokenizer, config: CalibrationConfig, part: TextUse, rows: int, body_tokens: int, *, in_order: bool
) -> tuple[TextSource, TokenPool]:
    with ExitStack() as opened:
        source = _open_source(tokenizer, config, part, opened)
        pool = read_pool(source, tokenizer, rows=rows, body_tokens=body_tokens, in_order=in_order)
    if len(pool.tokens) < rows * body_tokens:
        raise CalibrationError(
            f"{source.description}: too little text. Got {len(pool.tokens)} tokens. Expected at least "
            f"{rows * body_tokens} for {rows} rows of {config.tokens_each}. Lower rows or row_tokens, or add text."
        )
    return source, pool


def _open_source(tokenizer: Tokenizer, config: CalibrationConfig, part: TextUse, opened: ExitStack) -> TextSource:
    """Return the text; what it needs while it is read is closed with ``opened``."""
    if config.source is None or config.is_built_in:
        return builtin_texts(part, order=config.seed)
    render_chat = None
    if config.chat_template:
        render_chat = partial(render_turns, opened.enter_context(chat_template(tokenizer)))
    return read_texts(config.source, column=config.column, render_chat=render_chat)


def _describe(source: TextSource, config: CalibrationConfig, *, n_random: int, in_order: bool, has_bos: bool) -> str:
    how = "consecutive from its start" if in_order else f"at random places (seed {config.seed})"
    random = f", and {n_random} rows of random token ids" if n_random else ""
    begin = "beginning with BOS" if has_bos else "without BOS"
    rows = f"{config.rows - n_random} rows {how}{random}, each of {config.tokens_each} tokens {begin}"
    return f"{source.description}: {rows}"


def is_calibration(path: Path) -> bool:
    """Return whether a file is a calibration set, of this version or another; behind its head it may be damaged."""
    return metadata_begins(path, f'"format":"{_FORMAT}",')

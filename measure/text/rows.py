"""A pool of tokens to cut rows from: documents tokenized one after another, no more than needed; random tokens too."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ...errors import CalibrationError
from .sources import Document, TextPart, TextSource
from .tokenizer import Tokenizer, leading_ids, ordinary_ids

__all__ = ["RANDOM_ORIGIN", "TokenPool", "n_random_rows", "random_ids", "read_pool", "spread_starts"]

# Rows are drawn from this many times the tokens that they hold: random places, without reading everything.
_POOL_FACTOR = 4

# Text is tokenized in chunks of about as many characters as the wanted tokens fill; European languages and
# code have 3 to 5 characters per token, so one chunk mostly suffices.
_CHARACTERS_PER_TOKEN = 6
_MIN_CHUNK_CHARACTERS = 1 << 14
_MAX_CHUNK_CHARACTERS = 1 << 22

_BLANK_LINE = "\n\n"

RANDOM_ORIGIN = "random token ids"

# ExLlamaV2's standard calibration set has about this share of rows of random tokens. They reach embedding
# rows and channels that its text leaves unused; more of them would pull the statistics away from real text.
_ROWS_PER_RANDOM_ROW = 16
# With fewer rows than this every one is needed for text.
_MIN_ROWS_FOR_RANDOM = 8


@dataclass(frozen=True, slots=True)
class TokenPool:
    """Joined documents as token ids.

    Attributes:
        tokens: Token ids in order.
        starts: Where a document begins in `tokens`, ascending, from 0.
        origins: The origin of the document at each of `starts`.
    """

    tokens: list[int]
    starts: list[int]
    origins: list[str]

    def origin_at(self, position: int) -> str:
        """Return the origin of the document that the token at `position` belongs to."""
        return self.origins[bisect_right(self.starts, position) - 1]

    def later_origins(self, first: int, count: int, *, lead: int) -> tuple[tuple[int, str], ...]:
        """Return where in a window other documents begin, and their origins.

        Args:
            first: Position of the window's first token.
            count: Tokens in it.
            lead: Tokens that a row has before its window.

        Returns:
            Positions in the row, ascending.
        """
        begin, end = bisect_right(self.starts, first), bisect_left(self.starts, first + count)
        return tuple((lead + self.starts[n] - first, self.origins[n]) for n in range(begin, end))


@dataclass(frozen=True, slots=True)
class _Piece:
    origin: str
    text: str
    ends_document: bool


class _TokenReader:
    """Tokenizes documents without special tokens, in batches, and joins them."""

    def __init__(self, tokenizer: Tokenizer, *, joins_text: bool) -> None:
        self._tokenizer = tokenizer
        self._joins_text = joins_text
        self._leading = leading_ids(tokenizer)
        self._eos = tokenizer.eos_token_id
        self._separator: list[int] = (
            [self._eos] if self._eos is not None else list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        )

    def read(self, documents: Iterable[Document], chunk_characters: int) -> Iterator[tuple[str, list[int]]]:
        """Yield the origin and the token ids of one piece of text after another, separators included."""
        for batch in _batches(self._pieces(documents, chunk_characters), chunk_characters):
            texts = [piece.text for piece in batch]
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for piece, ids in zip(batch, encoded, strict=True):
                yield piece.origin, self._delimited(list(ids), piece)

    def _pieces(self, documents: Iterable[Document], chunk_characters: int) -> Iterator[_Piece]:
        if self._joins_text:
            for joined in _joined(documents, chunk_characters):
                for text in _slices(joined.text, chunk_characters):
                    yield _Piece(joined.origin, text, ends_document=False)
            return
        for document in documents:
            if document.text.strip():
                slices = _slices(document.text, chunk_characters)
                for number, text in enumerate(slices, start=1):
                    yield _Piece(document.origin, text, ends_document=number == len(slices))

    def _delimited(self, ids: list[int], piece: _Piece) -> list[int]:
        # A chat template may write the BOS that begins each row. Within a row it would be a second beginning.
        # Where the tokenizer does not add BOS, the same token may well begin every turn and must stay.
        if self._leading and ids[:1] == self._leading:
            ids = ids[1:]
        # A chat template may have ended the text already: with EOS, or EOS and a newline.
        ended = self._eos is not None and self._eos in ids[-2:]
        return ids + self._separator if piece.ends_document and not ended else ids


class _PartTokens:
    """The tokens of one part, read as far as asked."""

    def __init__(self, part: TextPart, reader: _TokenReader, chunk_characters: int) -> None:
        self.tokens: list[int] = []
        self.starts: list[int] = []
        self.origins: list[str] = []
        self._pieces = reader.read(part.documents(), chunk_characters)

    def fill(self, n_tokens: int) -> int:
        """Read until there are `n_tokens` tokens or no more text; return how many of them there are."""
        while len(self.tokens) < n_tokens:
            piece = next(self._pieces, None)
            if piece is None:
                break
            origin, ids = piece
            if not self.origins or self.origins[-1] != origin:
                self.starts.append(len(self.tokens))
                self.origins.append(origin)
            self.tokens += ids
        return min(len(self.tokens), n_tokens)


def read_pool(source: TextSource, tokenizer: Tokenizer, *, rows: int, body_tokens: int, in_order: bool) -> TokenPool:
    """Tokenize as much of a source as rows are to be drawn from, with equal shares for its parts.

    Args:
        source: The text. Parts with less text than their share are made up for by the others.
        tokenizer: Tokenizes it.
        rows: Number of rows to be drawn.
        body_tokens: Tokens of a row, without BOS.
        in_order: Read from the start, only as far as the rows need, instead of in shares, and join documents
            as text by a blank line, before they are tokenized. Otherwise each document is tokenized for
            itself and followed by EOS, or by a newline if the tokenizer has no EOS.

    Returns:
        At least ``rows * body_tokens`` tokens if the source has them, else all it has.

    Raises:
        CalibrationError: The text cannot be read.
    """
    needed = rows * body_tokens
    reader = _TokenReader(tokenizer, joins_text=in_order)
    source_parts = (TextPart("", source.documents),) if in_order else source.parts
    # With very many files, evenly chosen ones; the rest only if these hold too little.
    n_chosen = min(len(source_parts), _POOL_FACTOR * rows)
    chosen = {number * len(source_parts) // n_chosen for number in range(n_chosen)}
    share = needed if in_order else max(body_tokens, -(-_POOL_FACTOR * needed // n_chosen))
    chunk_characters = min(max(share * _CHARACTERS_PER_TOKEN, _MIN_CHUNK_CHARACTERS), _MAX_CHUNK_CHARACTERS)
    parts = [_PartTokens(part, reader, chunk_characters) for part in source_parts]
    used = [0] * len(parts)
    if not in_order:
        for number in sorted(chosen):
            used[number] = parts[number].fill(share)
        # A part with enough text for its share of the rows gets it, even if it has less to choose from.
        enough = [n_tokens for n_tokens in used if n_tokens * n_chosen >= needed]
        used = [min(n_tokens, min(enough, default=share)) for n_tokens in used]
    for number, part in enumerate(parts):
        missing = needed - sum(used)
        if missing <= 0:
            break
        used[number] = part.fill(used[number] + missing)
    return _concatenated(parts, used)


def spread_starts(n_tokens: int, rows: int, body_tokens: int, generator: torch.Generator) -> list[int]:
    """Return ascending starts of windows that do not overlap, one at random in each of `rows` shares.

    Args:
        n_tokens: Tokens of the pool, at least those of all rows.
        rows: Number of rows.
        body_tokens: Tokens of a row, without BOS.
        generator: Draws the places.
    """
    slots = n_tokens // body_tokens
    spare_tokens = n_tokens - slots * body_tokens
    phase = int(torch.randint(spare_tokens + 1, (), generator=generator))
    starts = []
    for row in range(rows):
        low, high = row * slots // rows, (row + 1) * slots // rows
        slot = low + int(torch.randint(high - low, (), generator=generator))
        starts.append(phase + slot * body_tokens)
    return starts


def n_random_rows(rows: int) -> int:
    """Return how many of some rows hold random tokens."""
    return 0 if rows < _MIN_ROWS_FOR_RANDOM else max(1, rows // _ROWS_PER_RANDOM_ROW)


def random_ids(
    tokenizer: Tokenizer, vocab_size: int, shape: tuple[int, int], generator: torch.Generator
) -> list[list[int]]:
    """Draw rows of ordinary tokens.

    Args:
        tokenizer: Names its special tokens.
        vocab_size: Rows of the model's token embedding.
        shape: Number of rows, and of tokens in each.
        generator: Draws them.

    Raises:
        CalibrationError: The tokenizer has no ordinary tokens that the model knows.
    """
    allowed = torch.tensor(ordinary_ids(tokenizer, vocab_size))
    if not len(allowed):
        raise CalibrationError(
            f"tokenizer: no ordinary token has an id below the vocabulary size {vocab_size}. Expected some. "
            "Use the tokenizer that belongs to the model."
        )
    ids: list[list[int]] = allowed[torch.randint(len(allowed), shape, generator=generator)].tolist()
    return ids


def _concatenated(parts: list[_PartTokens], used: list[int]) -> TokenPool:
    pool = TokenPool([], [], [])
    for part, n_tokens in zip(parts, used, strict=True):
        offset = len(pool.tokens)
        for start, origin in zip(part.starts, part.origins, strict=True):
            if start < n_tokens:
                pool.starts.append(offset + start)
                pool.origins.append(origin)
        pool.tokens.extend(part.tokens[:n_tokens])
    return pool


def _joined(documents: Iterable[Document], chunk_characters: int) -> Iterator[Document]:
    """Join documents of one kind, blank ones too; the origin is their kind."""
    kind, n_characters = "", 0
    texts: list[str] = []
    for number, document in enumerate(documents):
        if texts and (document.kind != kind or n_characters >= chunk_characters):
            yield Document(kind, "".join(texts))
            texts, n_characters = [], 0
        kind = document.kind
        texts.append(_BLANK_LINE + document.text if number else document.text)
        n_characters += len(texts[-1])
    if texts:
        yield Document(kind, "".join(texts))


def _slices(text: str, chunk_characters: int) -> list[str]:
    """Cut a text into pieces of at most `chunk_characters`, after a newline where there is one."""
    slices, start = [], 0
    while len(text) - start > chunk_characters:
        newline = text.rfind("\n", start, start + chunk_characters)
        end = newline + 1 if newline >= start else start + chunk_characters
        slices.append(text[start:end])
        start = end
    slices.append(text[start:])
    return slices


def _batches(pieces: Iterator[_Piece], chunk_characters: int) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    n_characters = 0
    for piece in pieces:
        batch.append(piece)
        n_characters += len(piece.text)
        if n_characters >= chunk_characters:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch

"""Where text comes from: files, directories and Hub data sets, as documents that are read on demand."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from ...errors import CalibrationError, UnreachableTextError, reason
from .chat_rows import CHAT_COLUMNS, chat_turns

__all__ = [
    "TEXT_COLUMNS",
    "TEXT_SUFFIXES",
    "ChatRenderer",
    "Document",
    "TextPart",
    "TextSource",
    "is_data_set",
    "read_texts",
    "text_files",
    "valid_unicode",
]

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
"""File types that `read_texts` can read."""

TEXT_COLUMNS = ("text", "content")
"""Columns that are looked for, in this order, when the user names none."""

ChatRenderer = Callable[[Sequence[Mapping[str, Any]], str], str]
"""Turns the chat turns of one row into the text that the model would see; the second argument says where they stand."""

_SHOWN_CHARACTERS = 200
_BATCH_ROWS = 1000
# Owner and name, or a name alone, as the Hub allows them; then [:config][:split].
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^:/\\]*){0,2}")

_Rows = Iterator[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text that belongs together.

    Attributes:
        origin: Where it comes from, for people: ``<part>: <place in it>`` or only ``<part>``.
        text: The text; may be empty, as rows of data sets are.
    """

    origin: str
    text: str

    @property
    def kind(self) -> str:
        """Name of the part that the document belongs to."""
        return self.origin.split(": ", 1)[0]


@dataclass(frozen=True, slots=True)
class TextPart:
    """Documents of one kind: a file, a data set, or one kind of the built-in text.

    Attributes:
        name: The kind; document origins begin with it.
        documents: Starts reading from the first document; nothing is read before. May raise CalibrationError
            on the way.
    """

    name: str
    documents: Callable[[], Iterator[Document]]


@dataclass(frozen=True, slots=True)
class TextSource:
    """Text to calibrate or evaluate on.

    Attributes:
        description: What the text is, for reports.
        parts: Its kinds, at least one; each should be represented in what is drawn from the source.
    """

    description: str
    parts: tuple[TextPart, ...]

    def documents(self) -> Iterator[Document]:
        """Yield all documents, part after part, in order."""
        for part in self.parts:
            yield from part.documents()


def read_texts(source: str | Path, *, column: str | None = None, render_chat: ChatRenderer | None = None) -> TextSource:
    """Open a text file, a directory of them, or a data set of the Hugging Face Hub.

    A ``.txt`` file is one document; in ``.jsonl``, ``.parquet`` and ``.arrow`` files each row is one. A
    directory is searched for such files recursively, in sorted order, hidden ones left out; each file is a
    part. A string that is no local path is a Hub data set ``name[:config][:split]`` (``name::split`` for the
    default config), streamed, split ``train`` by default. No code from the Hub is ever run.

    Args:
        source: Path or Hub data set. A `Path` is always local.
        column: The column that holds the text; None takes the first of `TEXT_COLUMNS` that exists, and before
            them chats if `render_chat` is given (see ``chat_turns``). Ignored for ``.txt``.
        render_chat: Renders rows that hold chat turns; without it a column of them is an error.

    Returns:
        The opened source. Contents are read, and errors in them raised, when its documents are iterated.

    Raises:
        CalibrationError: The path is missing, its suffix is unknown, the directory holds no text files, or
            the Hub data set cannot be opened. On iteration: unreadable or broken contents, a missing column,
            no text.
    """
    path = Path(source)
    rows_to_documents = partial(_row_documents, column=column, render_chat=render_chat)
    try:
        exists, is_directory = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise CalibrationError(
            f"{str(source)[:_SHOWN_CHARACTERS]!r}: not a path ({reason(error)}). Check the path."
        ) from error
    if is_directory:
        return _directory_source(path, rows_to_documents)
    if exists:
        if path.suffix not in TEXT_SUFFIXES:
            raise CalibrationError(
                f"{path}: unknown kind of text file. Got suffix {path.suffix!r}. Expected one of "
                f"{', '.join(TEXT_SUFFIXES)}. Convert the file, or rename it if only its name is wrong."
            )
        part = _file_part(path, path.name, rows_to_documents)
        return TextSource(part.name, (part,))
    if isinstance(source, Path) or not is_data_set(source):
        raise CalibrationError(f"{source}: no such file or directory. Check the path.")
    return _hub_source(source, rows_to_documents)


def is_data_set(source: str) -> bool:
    """Return whether a source that does not exist as a path is named as a data set of the Hub."""
    return Path(source).suffix not in TEXT_SUFFIXES and _HUB_ID.fullmatch(source) is not None


def text_files(source: str | Path) -> list[Path]:
    """Return the local files that a source is read from, in order; none for a data set of the Hub."""
    path = Path(source)
    try:
        if not path.is_dir():
            return [path] if path.exists() else []
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return []
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix in TEXT_SUFFIXES
        and file.is_file()
        and not any(name.startswith(".") for name in file.relative_to(path).parts)
    )


_RowReader = Callable[[str, Callable[[], _Rows]], Iterator[Document]]


def _directory_source(directory: Path, rows_to_documents: _RowReader) -> TextSource:
    files = text_files(directory)
    if not files:
        raise CalibrationError(
            f"{directory}: no text files in this directory. Expected at least one of type "
            f"{', '.join(TEXT_SUFFIXES)}. Put text there, or name another source."
        )
    parts = tuple(_file_part(path, path.relative_to(directory).as_posix(), rows_to_documents) for path in files)
    name = valid_unicode(directory.resolve().name)
    return TextSource(f"{name} ({len(files)} text file{'s' * (len(files) > 1)})", parts)


def _file_part(path: Path, name: str, rows_to_documents: _RowReader) -> TextPart:
    name = valid_unicode(name)  # Linux allows any bytes in a name
    if path.suffix == ".txt":
        return TextPart(name, partial(_text_file_document, path, name))
    rows = partial(_json_rows, path) if path.suffix == ".jsonl" else partial(_table_rows, path.suffix[1:], path)
    return TextPart(name, partial(rows_to_documents, name, rows))


def _text_file_document(path: Path, name: str) -> Iterator[Document]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error}). Convert the file to UTF-8.") from error
    if not text.strip():
        raise _empty(str(path))
    yield Document(name, text)


def _json_rows(path: Path) -> _Rows:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", _json_object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: cannot be read as UTF-8 text ({error}). Convert the file to UTF-8.") from error


def _json_object(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{where}: invalid JSON ({error}). Expected one object per line. Repair or remove the line."
        ) from error
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: not usable. Got a JSON {type(row).__name__}."
            f' Expected one object per line. Wrap it as {{"text": ...}}.'
        )
    return row


def _table_rows(builder: str, path: Path) -> _Rows:
    import datasets  # noqa: PLC0415 - takes seconds to import

    try:
        with _quiet_progress_bars():
            # Streaming reads the file where it lies, without a copy in the cache. The path is a glob pattern.
            # Left alone, it reads Parquet in batches of the first row group's size, which may be 0.
            batches = {"batch_size": _BATCH_ROWS} if builder == "parquet" else {}
            files = glob_escape(str(path))
            table = datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **batches)
        for number, row in enumerate(table):
            yield f"row {number}", row
    except Exception as error:  # whatever the datasets library and pyarrow raise
        raise CalibrationError(
            f"{path}: cannot be read as {builder} data ({reason(error)}). Write the file anew."
        ) from error


def _hub_source(source: str, rows_to_documents: _RowReader) -> TextSource:
    import datasets  # noqa: PLC0415 - takes seconds to import

    name, config, split = [*source.split(":"), "", ""][:3]
    split = split or "train"
    try:
        with _quiet_progress_bars():
            stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except Exception as error:  # whatever the datasets library, the Hub's and pyarrow raise
        raise _hub_error(source, error) from error
    label = ":".join(filter(None, (name, config, split)))

    def rows() -> _Rows:
        try:
            for number, row in enumerate(stream):
                yield f"row {number}", row
        except Exception as error:
            raise _hub_error(source, error) from error

    return TextSource(f"Hub data set {label}", (TextPart(label, partial(rows_to_documents, label, rows)),))


def _hub_error(source: str, error: Exception) -> UnreachableTextError:
    return UnreachableTextError(
        f"{source}: no such file or directory, and reading it as the Hub data set name[:config][:split] "
        f"failed ({reason(error)}). Check the name and the network, or use a local file or the "
        "built-in text."
    )


@contextmanager
def _quiet_progress_bars() -> Iterator[None]:
    import datasets  # noqa: PLC0415 - takes seconds to import

    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _row_documents(
    name: str, rows: Callable[[], _Rows], *, column: str | None, render_chat: ChatRenderer | None
) -> Iterator[Document]:
    has_text = False
    for place, row in rows():
        where = f"{name}: {place}"
        turns = None if render_chat is None else chat_turns(row, column)
        if render_chat is not None and turns is not None:
            try:
                text = render_chat(turns, where)
            except RecursionError as error:
                raise CalibrationError(
                    f"{where}: the turns are nested too deeply. Expected strings or lists of parts. Remove the row."
                ) from error
        else:
            if column is None:
                column = _default_column(row, where, chat=render_chat is not None)
            if column not in row:
                raise CalibrationError(
                    f"{where}: there is no column {column!r}, the columns are {_listed(row)}. "
                    "Name one of them as the column."
                )
            text = _cell_text(row[column], f"{where}, column {column!r}")
        has_text = has_text or bool(text.strip())
        yield Document(where, valid_unicode(text))
    if not has_text:
        raise _empty(name)


def _default_column(row: Mapping[str, Any], where: str, *, chat: bool) -> str:
    candidates: Sequence[str] = (*CHAT_COLUMNS, *TEXT_COLUMNS) if chat else TEXT_COLUMNS
    for name in candidates:
        if name in row:
            return name
    chats = [repr(name) for name in CHAT_COLUMNS if name in row and not chat]
    hint = f" For {chats[0]}, turn the chat template on." if chats else ""
    raise CalibrationError(
        f"{where}: there is no column {' or '.join(map(repr, candidates))}, the columns are {_listed(row)}. "
        f"Name the one that holds the text.{hint}"
    )


def _cell_text(value: object, where: str) -> str:
    if value is None or value == []:  # a missing value in a table, or a chat without turns
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        raise CalibrationError(
            f"{where}: holds chat turns. Expected text. Turn the chat template on, or name another column."
        )
    raise CalibrationError(
        f"{where}: not usable. Got {type(value).__name__}."
        " Expected text (or chat turns: a list of objects). Name another column."
    )


def valid_unicode(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 cannot, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _empty(where: str) -> CalibrationError:
    return CalibrationError(f"{where}: holds no text. Name another file or column.")


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(name)) for name in row) or "none"

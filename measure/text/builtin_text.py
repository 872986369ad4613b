"""Text that every machine has, offline: texts of our own, and the documentation and sources that come with Python."""

import ast
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from ...errors import ConfigError
from .sources import Document, TextPart, TextSource

__all__ = ["TextUse", "builtin_texts"]

TextUse = Literal["calibration", "evaluation"]
"""What text is for; the built-in texts of the two uses never overlap."""

# Packages with hand-written code and good documentation. Not: tests, idlelib, encodings (tables),
# site-packages.
_PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "http", "importlib", "json",
    "logging", "multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip

# Generated or nearly empty modules, and a poem in ROT13.
_SKIPPED = frozenset({"keyword.py", "opcode.py", "stringprep.py", "symbol.py", "this.py", "token.py"})

# Files and topics are taken in passages of about this many characters (2000 tokens): a row follows one
# subject, and no long file fills many rows.
_PASSAGE_CHARACTERS = 8000

# Files of our own writing, one for each kind of text; a line of this alone stands between documents.
_OWN = Path(__file__).with_name("own")
_BETWEEN_DOCUMENTS = "%%%%"

# Less (a lone docstring line, an empty __init__.py) is no text to read, in characters.
_MIN_CHARACTERS = 200

# A paragraph this long that stands in two help topics was copied, in characters.
_MIN_COPIED_CHARACTERS = 80


def builtin_texts(use: TextUse, *, order: int = 0, passage_characters: int = _PASSAGE_CHARACTERS) -> TextSource:
    """Return texts of many kinds, the same amount of each when drawn evenly.

    Seven kinds were written for this purpose and ship with bpwise; two are Python's help topics and docstrings, and the
    sources of its standard library. A document belongs to the calibration or to the evaluation text by a hash of its
    name or, of our own, its text, the same on every machine; a file's docstrings and its code go together. Paragraphs
    that several help topics repeat are kept in one of them only, so the two uses share no text beyond common phrases.
    The contents depend on the Python version; where it comes without its sources, these two kinds are missing.

    Args:
        use: Which of the two disjoint halves.
        order: Any integer; the pseudo-random order in which documents come depends on it alone.
        passage_characters: About how long a document from Python's own text is at most.

    Returns:
        Source with the parts ``python docs`` (help topics and docstrings), ``python code``, and our own by their names.

    Raises:
        ConfigError: `use` is neither "calibration" nor "evaluation".
    """
    if use not in get_args(TextUse):
        raise ConfigError(
            f"part of the built-in text: not usable. Got {use!r}. Expected one of {get_args(TextUse)}. Choose another."
        )
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = {name: path for name, path in _modules(root).items() if _use_of(name) == use}
    topics = {name: text for name, text in _topics().items() if _use_of(name) == use}
    code = {name: partial(_source, path) for name, path in modules.items()}
    docs: dict[str, Callable[[], str]] = {name: partial(_docstrings, path) for name, path in modules.items()}
    docs.update({name: partial(str, text) for name, text in topics.items()})
    parts = [
        TextPart(kind, partial(_documents, kind, texts, order, passage_characters))
        for kind, texts in (("python docs", docs), ("python code", code))
        if texts
    ]
    python = f", Python {sys.version_info.major}.{sys.version_info.minor} documentation and sources" if parts else ""
    own = [TextPart(path.stem, partial(_own_documents, path, use, order)) for path in sorted(_OWN.glob("*.txt"))]
    return TextSource(f"bpwise's own texts of {len(own)} kinds{python}, {use} part", (*own, *parts))


def _own_documents(path: Path, use: TextUse, order: int) -> Iterator[Document]:
    texts = path.read_text(encoding="utf-8").split(f"\n{_BETWEEN_DOCUMENTS}\n")
    numbered = [(number, text) for number, text in enumerate(texts, start=1) if _use_of(text) == use]
    for number, text in sorted(numbered, key=lambda each: _digest(f"{order}/{each[1]}")):
        yield Document(f"{path.stem}: {number}", text)


def _use_of(name: str) -> TextUse:
    return "evaluation" if _digest(name)[0] & 1 else "calibration"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _modules(root: Path) -> dict[str, Path]:
    """Map names such as ``asyncio/events.py`` to existing source files."""
    paths = list(root.glob("*.py"))
    for package in _PACKAGES:
        paths += (root / package).rglob("*.py")
    names = {path.relative_to(root).as_posix(): path for path in paths}
    return {
        name: path
        for name, path in sorted(names.items())
        if path.name not in _SKIPPED
        and not path.name.startswith("_sysconfigdata")
        and not {"test", "tests", "__pycache__"}.intersection(path.relative_to(root).parts)
    }


def _topics() -> dict[str, str]:
    """Return the help topics, each paragraph only in the shortest topic that has it."""
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - some distributions ship Python without it
    except ImportError:
        return {}
    seen: set[str] = set()
    result: dict[str, str] = {}
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        new, new_characters = [], 0
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < _MIN_COPIED_CHARACTERS or words not in seen:
                new.append(paragraph)
                new_characters += len(paragraph)
            seen.add(words)
        # "compound" and "specialnames" are made of other topics: what would remain is their fragments.
        if new_characters > len(text) / 2:
            result[f"topics/{name}"] = "\n\n".join(new)
    return result


def _documents(
    kind: str, texts: Mapping[str, Callable[[], str]], order: int, passage_characters: int
) -> Iterator[Document]:
    """Yield one passage of every text, then another of each, until all are used up."""
    passages: dict[str, list[str]] = {}
    names = sorted(texts, key=lambda name: _digest(f"{order}/{name}"))
    turn = 0
    while names:
        for name in names:
            if name not in passages:
                passages[name] = _passages(texts[name](), passage_characters)
            if turn < len(passages[name]):
                # Not always first the beginning: that is where licences and imports stand.
                first = int.from_bytes(_digest(f"{name}/{order}")[:4], "big")
                yield Document(f"{kind}: {name}", passages[name][(first + turn) % len(passages[name])])
        turn += 1
        names = [name for name in names if turn < len(passages[name])]


def _passages(text: str, passage_characters: int) -> list[str]:
    """Cut a text between paragraphs into passages of about equal length, and leave out the short ones."""
    passages: list[str] = []
    paragraphs: list[str] = []
    n_characters = 0
    for paragraph in text.split("\n\n"):
        paragraphs.append(paragraph)
        n_characters += len(paragraph)
        if n_characters >= passage_characters:
            passages.append("\n\n".join(paragraphs))
            paragraphs, n_characters = [], 0
    passages.append("\n\n".join(paragraphs))
    return [passage for passage in passages if len(passage) >= _MIN_CHARACTERS]


def _source(path: Path) -> str:
    # A file that cannot be read, or a module in another encoding, is only one document less.
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _docstrings(path: Path) -> str:
    """Return the docstrings of a module, its classes and functions, the outer ones first, as paragraphs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the standard library are not ours to report
            tree = ast.parse(_source(path))
    except (SyntaxError, ValueError):
        return ""
    found = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return "\n\n".join(text for text in found if text and len(text) >= _MIN_CHARACTERS)

"""Messages: one line, bounded, and nothing in them that a terminal acts on."""

import ast
import pickle
import re
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import bpwise
import bpwise.errors
import pytest
from bpwise.errors import BpwiseError, CheckpointError, ShapeError, printable, reason


def test_plain_text_stays() -> None:
    text = "model: 5 × 3 \u2212 ünï \u4f60\u597d \U0001f600 a\u200db | <b> \\x1b \xa0"
    assert printable(text) == text


@pytest.mark.parametrize("first", [0, 0x10000, 0xE0000])
def test_no_character_reaches_a_terminal_that_it_acts_on(first: int) -> None:
    # Unicode's own table says which: controls, surrogates, line and paragraph separators.
    for sign in map(chr, range(first, first + 0x10000)):
        acting = unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(sign) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF"),
            *("LRI", "RLI", "FSI", "PDI"),
        )
        assert (sign not in printable(f"a{sign}b")) == acting, hex(ord(sign))


def test_escapes_can_be_read() -> None:
    assert printable("\x1b[31m\ud83d\u202e\x9b") == r"\x1b[31m\ud83d\u202e\x9b"
    assert printable("one\ntwo\tthree\r\n") == r"one two three\r "
    printable("\ud83d").encode()


@pytest.mark.parametrize("size", [100, 101, 10_000])
def test_bounded(size: int) -> None:
    for text in ("x" * size, "\x1b" * size):
        shown = printable(f"start {text} end", 100)
        assert len(shown) <= 100
        assert shown.startswith("start ")
        assert shown.endswith(" end")
        assert "..." in shown
        assert printable(shown, 100) == shown


def test_at_once() -> None:
    started = time.process_time()
    for text in ("\n" * 10**7, " " * 10**7, "\x1b" * 10**7):
        printable(text)
    assert time.process_time() - started < 0.5


def test_every_error_is_one_line() -> None:
    name = "\x1b]0;title\x07\n" + "y" * 100_000
    for error in (CheckpointError(f"{name}: wrong."), ShapeError(name, "weight", got=(1,), expected=(2,))):
        assert isinstance(error, BpwiseError)
        assert str(error).isprintable()
        assert len(str(error)) <= 2000
    assert str(pickle.loads(pickle.dumps(CheckpointError("\x1b")))) == r"\x1b"


def test_what_libraries_say_becomes_one_short_line() -> None:
    assert reason(ValueError("  one\n\ttwo  ")) == "one two"
    assert reason(KeyError()) == "KeyError"
    assert reason(OSError(" \n")) == "OSError"
    assert reason(RuntimeError("x" * 1000)) == "x" * 200


ROOT = Path(bpwise.__file__).parent
RAISED = {
    kind.__name__ for kind in vars(bpwise.errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
} - {"ShapeError"}
"""All kinds of errors whose messages are written where they are raised."""


def written(node: ast.expr) -> str | None:
    """A message as it stands in the code, ``<>`` for what is put into it; None where it is made elsewhere."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def messages() -> Iterator[tuple[str, str]]:
    for room in ("checkpoint", "linalg", "measure", "convert", "eval", "quantize", "cli"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED:
                    text = written(node.args[0]) if node.args else None
                    if text is not None:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", text


MESSAGES = list(messages())


def through_helpers() -> Iterator[tuple[str, str]]:
    """What is handed to ``self._error(...)``, ``_damaged(...)`` or a parameter ``error``, which add to it."""
    for room in ("checkpoint", "linalg", "measure", "convert", "eval", "quantize", "cli"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                    continue
                function = node.exc.func
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                texts = [written(each) for each in node.exc.args]
                for text in texts if name not in RAISED else ():
                    if text is not None:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def test_what_helpers_are_handed_is_written_in_sentences_too() -> None:
    found = list(through_helpers())
    assert len(found) > 50
    assert [place for place, text in found if re.search("[,:] (got|expected) ", text)] == []


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 300


@pytest.mark.parametrize("text", [pytest.param(text, id=place) for place, text in MESSAGES])
def test_messages_have_one_shape(text: str) -> None:
    # WHERE: problem. Got X. Expected Y. Do Z. What was got and expected are sentences of their own, if they are said.
    assert re.match(r".{1,120}?: |<>", text), "begins with the place"
    assert not re.search("[,:] (got|expected) ", text)
    if not text.endswith("<>"):  # which holds the advice
        sentences = re.split(r"(?<=[.!?>)]) (?=[A-Z`<])", text)
        assert text.endswith(".")
        assert len(sentences) > 1, "says what to do"
        assert not sentences[-1].startswith(("Got ", "Expected ")), "ends in what to do"

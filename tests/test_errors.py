"""Messages: one line, bounded, and nothing in them that a terminal acts on."""

import pickle
import time
import unicodedata

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

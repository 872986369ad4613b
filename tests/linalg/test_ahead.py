"""What is made ahead, in which order, and that nothing is left of it. Only where a test fails does a wait take long."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
from bpwise.linalg.ahead import MadeAhead

LONG_SECONDS = 60.0


class Part:
    """Something that a weak reference can watch."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_parts_are_made_in_order_and_once() -> None:
    made: list[tuple[int, int, bool]] = []

    def make(number: int) -> Iterator[str]:
        for part in range(3):
            made.append((number, part, threading.current_thread() is threading.main_thread()))
            yield f"{number}.{part}"

    ahead = MadeAhead(make)
    assert list(ahead.take(4)) == ["4.0", "4.1", "4.2"]
    with ahead.making(2):
        pass
    assert list(ahead.take(2)) == ["2.0", "2.1", "2.2"]
    assert made == [(4, 0, True), (4, 1, True), (4, 2, True), (2, 0, False), (2, 1, False), (2, 2, False)]
    made.clear()
    assert list(ahead.take(2)) == ["2.0", "2.1", "2.2"]  # taken before: made anew
    assert [main for _, _, main in made] == [True, True, True]


def test_a_thing_is_made_while_the_body_runs() -> None:
    body_runs, first_made = threading.Event(), threading.Event()

    def make(_number: int) -> Iterator[int]:
        assert body_runs.wait(LONG_SECONDS)
        first_made.set()
        yield 1

    ahead = MadeAhead(make)
    with ahead.making(0):
        body_runs.set()
        assert first_made.wait(LONG_SECONDS)  # before the body has ended
    assert list(ahead.take(0)) == [1]


def test_nothing_is_made_where_nothing_comes() -> None:
    made: list[int] = []

    def make(number: int) -> list[str]:
        made.append(number)
        return ["part"]

    ahead = MadeAhead(make)
    with ahead.making(None):
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("bpwise ahead")]
    assert made == []


def test_another_number_is_made_anew() -> None:
    ahead = MadeAhead(lambda number: [number])
    with ahead.making(1):
        pass
    assert list(ahead.take(2)) == [2]
    assert list(ahead.take(1)) == [1]


def test_errors_are_raised_where_the_thing_is_asked_for() -> None:
    def make(number: int) -> Iterator[int]:
        yield number
        raise ValueError(f"{number} is damaged")

    ahead = MadeAhead(make)
    with ahead.making(1):
        pass  # nothing is raised: it may not be asked for
    with pytest.raises(ValueError, match=r"^1 is damaged$"):
        next(ahead.take(1))
    with ahead.making(1):
        pass
    assert next(ahead.take(2)) == 2  # nor is it


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_body_that_fails_ends_the_thread(error: type[BaseException]) -> None:
    body_runs, made = threading.Event(), []

    def make(_number: int) -> Iterator[int]:
        for part in range(1000):
            assert body_runs.wait(LONG_SECONDS)
            made.append(part)
            yield part

    ahead = MadeAhead(make)
    thread: threading.Thread | None = None

    def fail() -> None:
        nonlocal thread
        with ahead.making(0):
            (thread,) = (each for each in threading.enumerate() if each.name == "bpwise ahead 0")
            # The body fails first: the thread goes on only when the context waits for it.
            monkeypatch.setattr(thread, "join", lambda join=thread.join: (body_runs.set(), join()))
            raise error

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(error):
        fail()
    assert thread is not None
    assert not thread.is_alive()
    assert made == [0]  # and no further part
    assert next(ahead.take(0)) == 0
    assert made == [0, 0]  # what the thread made is gone


def test_one_thing_at_most_is_held() -> None:
    living: dict[int, weakref.ref[Part]] = {}

    def make(number: int) -> Iterator[Part]:
        gc.collect()
        assert all(reference() is None for reference in living.values())
        part = Part()
        living[number] = weakref.ref(part)
        yield part

    ahead = MadeAhead(make)
    for number in range(3):
        with ahead.making(number):
            pass
        assert living[number]() is not None
    taken = ahead.take(2)
    assert isinstance(next(taken), Part)
    gc.collect()
    assert living[2]() is None  # a part goes as it is taken

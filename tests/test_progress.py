"""The time left of a run, with a clock that is told the time."""

import pytest
from bpwise.progress import ExpectedPart, TimeLeft, placed


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def part(step: str, label: str, seconds: float, done: float = 0.0) -> ExpectedPart:
    return ExpectedPart(step=step, label=label, seconds=seconds, done=done)


PARTS = (
    part("measure", "measure: forward", 10.0),
    part("measure", "measure: head", 5.0),
    part("measure", "measure: backward, curves", 40.0),
    part("round", "quantize: round", 30.0),
    part("evaluate", "evaluate: logits", 1.0),
    part("evaluate", "evaluate: quantized model", 20.0),
    part("evaluate", "evaluate: logits", 8.0),
)


def test_a_run_that_takes_what_was_expected() -> None:
    clock = Clock()
    left = TimeLeft(PARTS, clock)
    assert left.seconds == 114
    left.begin("measure: forward")
    for share in (0.25, 0.5, 1.0):
        clock.now = 10 * share
        left.advance(share)
        assert left.seconds == pytest.approx(114 - 10 * share)
    clock.now += 5  # the head tells nothing of how far it is
    left.begin("measure: backward, curves")
    assert left.seconds == pytest.approx(114 - 15)


def test_what_a_step_took_scales_the_rest_of_it_alone() -> None:
    clock = Clock()
    left = TimeLeft(PARTS, clock)
    left.begin("measure: forward")
    clock.now = 20.0
    left.advance(1.0)
    # Twice as slow; of each part a tenth counts as expected.
    slower = {seconds: (20 + 0.1 * seconds) / (10 + 0.1 * seconds) for seconds in (5, 40)}
    assert left.seconds == pytest.approx(5 * slower[5] + 40 * slower[40] + 59)


def test_a_label_scales_its_own_kind() -> None:
    clock = Clock()
    left = TimeLeft(PARTS, clock)
    left.begin("evaluate: logits")
    clock.now = 2.0
    left.advance(1.0)
    left.begin("evaluate: quantized model")
    clock.now = 22.0
    left.advance(1.0)
    step = (22 + 0.8) / (21 + 0.8)
    assert left.seconds == pytest.approx(8 * (2 + 0.8 * step) / (1 + 0.8))


def test_a_first_item_that_takes_long_does_not_count_for_all() -> None:
    clock = Clock()
    left = TimeLeft([part("measure", "measure: forward", 100.0)], clock)
    left.begin("measure: forward")
    clock.now = 20.0
    left.advance(0.01)
    assert left.seconds < 500  # and not 2000


def test_finished_items_are_gone_through_in_no_time() -> None:
    clock = Clock()
    left = TimeLeft([part("round", "quantize: round", 40.0, done=0.6)], clock)
    left.begin("quantize: round")
    for share in (0.2, 0.4, 0.6):
        clock.now += 0.01
        left.advance(share)
        assert left.seconds == 40
    clock.now += 20
    left.advance(0.8)
    assert left.seconds == pytest.approx(20)


def test_what_was_not_expected_changes_nothing() -> None:
    left = TimeLeft(PARTS, Clock())
    left.begin("convert: rows")
    left.advance(0.5)
    assert left.seconds == 114


def test_parts_that_did_not_come_are_over() -> None:
    left = TimeLeft(PARTS, Clock())
    left.begin("quantize: round")
    assert left.seconds == 59
    left.begin("evaluate: quantized model")
    assert left.seconds == 28


def test_steps_are_counted_as_they_follow_each_other() -> None:
    # Two outputs of a series: each is rounded and written.
    steps = [("measure", "a"), ("measure", "b"), ("round", "c"), ("write", "d"), ("round", "c"), ("write", "d")]
    left = TimeLeft([part(step, label, 1.0) for step, label in steps])
    assert left.place == "1/5 measure"
    places = []
    for _, label in steps:
        left.begin(label)
        places.append(left.place)
    assert places == ["1/5 measure", "1/5 measure", "2/5 round", "3/5 write", "4/5 round", "5/5 write"]
    left.begin("not expected")
    assert left.place == "5/5 write"
    assert TimeLeft([]).place == ""


def test_labels_name_their_step() -> None:
    assert placed("measure: forward", "2/5 measure") == "[2/5 measure] forward"
    assert placed("evaluate: original model in float64", "5/5 evaluate") == "[5/5 evaluate] original model in float64"
    assert placed("measure: forward", "") == "measure: forward"

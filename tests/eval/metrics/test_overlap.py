import pytest
import torch
from bpwise.errors import CalibrationError, FormatError
from bpwise.eval.metrics.overlap import CalibrationSpans, refuse_calibration_text, shared_share, with_overlap_warning
from bpwise.measure.text.calibration import CalibrationSet


def rows_of(tokens: torch.Tensor, *, bos: bool = False) -> CalibrationSet:
    if bos:
        tokens = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.int64), tokens], dim=1)
    return CalibrationSet(tokens=tokens, origins=("t",) * len(tokens), description="t", adds_bos=bos)


def text(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 5000, (tokens,), generator=torch.Generator().manual_seed(seed))


def naive_share(evaluation: list[list[int]], calibration: list[list[int]], span: int) -> float:
    """Compare every window with every calibration span, number by number."""
    spans = [row[at : at + span] for row in calibration for at in range(0, len(row) - span + 1, span)]
    shared = total = 0
    for row in evaluation:
        marks = [False] * len(row)
        for at in range(len(row) - span + 1):
            if row[at : at + span] in spans:
                marks[at : at + span] = [True] * span
        shared, total = shared + sum(marks), total + len(row)
    return shared / total


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_the_same_text_cut_elsewhere(bos: bool) -> None:
    long = text(2000, 0)
    calibration, evaluation = long[:1500].view(5, 300), long[137 : 137 + 1600].view(4, 400)
    share = shared_share(rows_of(evaluation, bos=bos), CalibrationSpans.of(rows_of(calibration, bos=bos)))
    assert share == pytest.approx(naive_share(evaluation.tolist(), calibration.tolist(), 64))
    assert 0.4 < share < 0.9


def test_one_row_among_others_is_found_and_other_text_is_not() -> None:
    calibration = text(20 * 200, 1).view(20, 200)
    evaluation = text(16 * 200, 2).view(16, 200)
    spans = CalibrationSpans.of(rows_of(calibration))
    assert refuse_calibration_text(rows_of(evaluation), spans) == 0
    evaluation[7] = calibration[3]
    with pytest.raises(CalibrationError, match=r"at least [56]\.\d% of its tokens are in the calibration text"):
        refuse_calibration_text(rows_of(evaluation), spans)
    assert refuse_calibration_text(rows_of(evaluation), spans, allowed=True) == pytest.approx(192 / 3200)


def test_a_little_boilerplate_is_no_overlap() -> None:
    calibration, evaluation = text(4000, 3).view(4, 1000), text(16000, 4).view(16, 1000)
    evaluation[2, 100:200] = calibration[1, 60:160]  # holds the span from 64 to 128, and no other
    share = refuse_calibration_text(rows_of(evaluation), CalibrationSpans.of(rows_of(calibration)))
    assert share == 64 / 16000


def test_one_passage_in_a_small_text_is_no_overlap() -> None:
    calibration, evaluation = text(4000, 3).view(4, 1000), text(400, 4).view(2, 200)
    evaluation[1, 20:180] = calibration[1, 60:220]  # a licence: two whole spans
    spans = CalibrationSpans.of(rows_of(calibration))
    assert refuse_calibration_text(rows_of(evaluation), spans) == 128 / 400
    evaluation[0] = calibration[2, :200]
    with pytest.raises(CalibrationError):
        refuse_calibration_text(rows_of(evaluation), spans)


def test_short_rows() -> None:
    calibration, evaluation = text(800, 5).view(4, 200), text(90, 6).view(3, 30)
    evaluation[1] = calibration[0, 29:59]
    assert shared_share(rows_of(evaluation), CalibrationSpans.of(rows_of(calibration))) is None
    share = shared_share(rows_of(evaluation), CalibrationSpans.of(rows_of(calibration), row_tokens=30))
    assert share == pytest.approx(29 / 90)


def test_told_once_and_only_if_it_matters() -> None:
    rows = rows_of(text(90, 6).view(3, 30))
    assert with_overlap_warning(rows, None) is with_overlap_warning(rows, 0.005) is rows
    once = with_overlap_warning(rows, 0.25)
    assert once.description == "NOT HELD OUT, at least 25% of it was calibrated on: t"
    assert with_overlap_warning(once, 0.25) is once
    assert once.fingerprint == rows.fingerprint


def test_nothing_known_nothing_refused() -> None:
    assert refuse_calibration_text(rows_of(text(90, 6).view(3, 30)), None) is None


def test_text_form() -> None:
    spans = CalibrationSpans.of(rows_of(text(4000, 7).view(4, 1000)))
    assert len(spans.hashes) == 4 * 15
    assert CalibrationSpans.from_text(spans.to_text()) == spans


@pytest.mark.parametrize("damaged", [None, 7, "", "64", "0:", "64:zz", "64:0123", "64:" + "G" * 16, "99999999:"])
def test_damaged_text_form(damaged: object) -> None:
    with pytest.raises(FormatError, match="calibration_spans"):
        CalibrationSpans.from_text(damaged)

"""Every format rounds a linear no worse than to nearest, or says why not, whatever numbers it holds and is given."""

import math

import pytest
import torch
from bpwise.convert.registry import formats
from bpwise.errors import NumericalError
from bpwise.measure.statistics.heldout import DAMPINGS

from .cases import GOOD, REFUSED, WITHOUT_FEEDBACK, Case
from .rounding import FORMATS, Rounded, loss

WITHOUT_HELD_OUT = 0.2
"""Relative damping where no sequence can be held out."""


def rounded(case: Case, name: str) -> list[Rounded]:
    found = list(FORMATS[name](case))
    assert found
    for each in found:
        assert bool(each.weight.isfinite().all()), each.kind
        assert math.isfinite(each.damage) and each.damage >= 0, each.kind
    return found


def test_every_format_is_tried() -> None:
    assert set(FORMATS) == set(formats())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", GOOD.values(), ids=list(GOOD))
def test_no_worse_than_to_nearest(case: Case, name: str) -> None:
    for each in rounded(case, name):
        assert each.damping in (*map(pytest.approx, DAMPINGS), pytest.approx(WITHOUT_HELD_OUT))
        # Decoded weights are float16 in EXL2: 2^-11 of each.
        # Scales in bfloat16 have few bits left below float32's smallest normal numbers, whose squares these are.
        assert loss(case, each.weight) <= loss(case, each.nearest) * (1 + 2**-11) + 2**-240, each.kind


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", WITHOUT_FEEDBACK.values(), ids=list(WITHOUT_FEEDBACK))
def test_without_feedback_it_is_as_to_nearest(case: Case, name: str) -> None:
    for each in rounded(case, name):
        assert math.isinf(each.damping)
        assert each.damage == 0
        distances = [float((x - case.weight).square().sum()) for x in (each.weight, each.nearest)]
        # ggml searches scales where it is given importances, all alike here, and weighs them by the weights themselves.
        assert distances[0] <= 1.05 * distances[1], each.kind


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("case", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_refused_in_a_sentence(case: Case, sentence: str, name: str) -> None:
    with pytest.raises(NumericalError, match=sentence):
        rounded(case, name)


@pytest.mark.parametrize(("name", "kinds"), [("exl2", {"4 bits"}), ("gguf", {"Q4_0", "Q5_0"})])
def test_what_lies_on_a_grid_stays(name: str, kinds: set[str]) -> None:
    case = GOOD["weights on a grid"]
    found = {each.kind: each for each in rounded(case, name)}
    for kind in kinds:
        assert torch.equal(found[kind].weight, case.weight.double()), kind
        assert found[kind].damage == 0

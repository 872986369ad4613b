from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bpwise.convert.opening import open_any
from bpwise.eval.comparison import EvalConfig, compare_models
from bpwise.eval.metrics.drift import watched_positions
from bpwise.measure.text.calibration import CalibrationSet
from transformers import AutoModelForCausalLM

MakeModel = Callable[..., Path]


def rows_of(rows: int, row_tokens: int) -> CalibrationSet:
    tokens = torch.randint(250, (rows, row_tokens), generator=torch.Generator().manual_seed(5))
    return CalibrationSet(tokens=tokens, origins=("random",) * rows, description="random ids", adds_bos=False)


def states(directory: Path, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Transformers' own hidden states, after the embeddings and after each block, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: seen.append(output))
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(tokens)
    return seen


def test_agrees_with_transformers(make_model: MakeModel) -> None:
    original, quantized = make_model("original"), make_model("quantized", noise=0.02)
    rows = rows_of(3, 40)
    got = compare_models(open_any(original), open_any(quantized), rows, EvalConfig(device="cpu")).drift
    pairs = list(zip(states(original, rows.tokens), states(quantized, rows.tokens), strict=True))
    assert [each.block for each in got] == [None, 0, 1]
    for each, (before, after) in zip(got, pairs, strict=True):
        errors = (after - before).norm(dim=-1) / before.norm(dim=-1)
        means = errors[:, 1:].mean(dim=1)
        # All 39 tokens are watched; float32 through two layers against float64.
        assert each.error.value == pytest.approx(float(means.mean()), rel=1e-4)
        assert each.error.standard_error == pytest.approx(float(means.std()) / 3**0.5, rel=1e-3)
        assert each.first_token.value == pytest.approx(float(errors[:, 0].mean()), rel=1e-4)
        assert each.error.value > 0.01


def test_same_model_does_not_drift(make_model: MakeModel) -> None:
    source = open_any(make_model("original"))
    got = compare_models(source, source, rows_of(2, 20), EvalConfig(device="cpu")).drift
    assert [(each.error.value, each.first_token.value) for each in got] == [(0, 0)] * 3


def test_models_of_other_shapes_have_none(make_model: MakeModel) -> None:
    original, other = make_model("original"), make_model("other", num_hidden_layers=1)
    assert compare_models(open_any(original), open_any(other), rows_of(2, 20), EvalConfig(device="cpu")).drift == ()


@pytest.mark.parametrize(
    ("row_tokens", "rows", "expected"),
    [
        (2, 16, [0, 1]),
        (5, 3, [0, 1, 2, 3, 4]),
        (1024, 300, [0, 1023]),
        (1001, 64, [0, 1, 334, 667, 1000]),
    ],
    ids=["shortest", "all", "many-rows", "spread"],
)
def test_watched_positions(row_tokens: int, rows: int, expected: list[int]) -> None:
    got = watched_positions(row_tokens, rows).tolist()
    assert got == expected


def test_few_rows_are_watched_all_over() -> None:
    got = watched_positions(1024, 1).tolist()
    assert len(got) == len(set(got)) == 257
    assert (got[0], got[1], got[-1]) == (0, 1, 1023)

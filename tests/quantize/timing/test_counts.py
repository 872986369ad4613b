"""Counted operations against those that PyTorch counts while a model's blocks run, and against formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.checkpoint.source.language import language_model
from bpwise.convert.rounding import FormatWork
from bpwise.linalg.work import Factors, FreshElements, Products, Solves, Work
from bpwise.measure.model.stream import StreamedModel
from bpwise.measure.model.whole import whole_model
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.measure.text.generation import WrittenRow, sample_rows
from bpwise.quantize.timing.attention import Attention
from bpwise.quantize.timing.counts import evaluating, measuring, rounding, writing
from bpwise.quantize.timing.parts import writing_parts
from bpwise.quantize.timing.passes import Tokens, pass_backward, pass_forward
from bpwise.quantize.timing.shapes import BlockShape, GroupShape, ModelShape
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, Qwen3Config

CPU = torch.device("cpu")


def amount(work: Work, kind: type) -> float:
    return sum(each for of, each in work.amounts.items() if isinstance(of, kind))


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for name, count in counts.items() if str(name).split(".")[1] in ("mm", "addmm", "bmm", "baddbmm"))


@pytest.mark.parametrize("kind", [None, Qwen3Config], ids=["llama", "qwen3"])
def test_passes_as_torch_counts_them(kind: Any, save_model: Any, tmp_path: Path) -> None:
    source = language_model(Checkpoint.open(save_model(tmp_path / "m", **({} if kind is None else {"kind": kind}))))
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    tokens = torch.randint(0, 200, (2, 24))
    hidden = model.embed(tokens)
    shape, rows = ModelShape.of(source), Tokens(2, 24)
    (block,) = shape.blocks

    def backward() -> None:
        inputs = hidden.clone().requires_grad_()
        model.run_block(0, inputs).sum().backward()

    with model.block(0):
        with torch.no_grad():
            forward = counted(lambda: model.run_block(0, hidden))
        both = counted(backward)
    assert amount(pass_forward(block, shape.hidden, rows), Products) == forward
    assert amount(pass_backward(block, shape.hidden, rows), Products) == both


def test_experts_see_the_tokens_that_choose_them(save_model: Any, tmp_path: Path) -> None:
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    source = language_model(Checkpoint.open(save_model(tmp_path / "m", kind=MixtralConfig, **config)))
    shape, rows = ModelShape.of(source), Tokens(2, 24)
    (block,) = shape.blocks
    experts = sum(count * group.weights for group, count in block.groups if group.expert)
    work = pass_forward(block, shape.hidden, rows)
    assert amount(work, Products) == 2 * rows.all * (block.weights - experts + experts / 2)


def test_attention_counts_pairs() -> None:
    def pairs(reach: int | None) -> float:
        block = BlockShape(groups=(), heads=3, head_size=8, reach=reach)
        return amount(Attention.work(block, 2, 10), Attention)

    def naive(reach: int) -> int:
        return 2 * 3 * sum(0 <= query - key < reach for query in range(10) for key in range(10))

    assert pairs(None) == naive(10)
    assert pairs(4) == naive(4)
    assert pairs(99) == naive(10)
    assert Attention.work(BlockShape(groups=()), 2, 10).amounts == {}


GROUP = GroupShape(inputs=64, outputs=(32, 32))
JOINING = GroupShape(inputs=32, outputs=(64,), joins=True)
SHAPE = ModelShape(blocks={BlockShape(groups=((GROUP, 1), (JOINING, 1))): 3}, hidden=64, vocabulary=100, tied=False)


@pytest.mark.parametrize(("chosen", "trials"), [(True, 3 + 2), (False, 2)], ids=["chosen", "given"])
def test_factors_of_measuring(chosen: bool, trials: int) -> None:
    work = measuring(SHAPE, Tokens(4, 8), [], CPU, chosen=chosen)
    assert amount(work.backward, Factors) == pytest.approx(3 * trials * (64**3 + 32**3) / 3)
    assert amount(work.head, Factors) == pytest.approx(trials * 64**3 / 3)
    assert amount(work.forward, Factors) == 0


def test_factors_and_solutions_of_rounding() -> None:
    # Four ridges are tried on 128 columns; the shift has K columns, or as many as join the stream.
    work = rounding(SHAPE, Tokens(4, 8), FormatWork(), CPU, known=True)
    assert amount(work, Factors) == pytest.approx(5 * (3 * (64**3 + 32**3) + 64**3) / 3)
    of_group, of_joining = (2 * size**2 * (4 * 128 + columns) for size, columns in ((64, 64), (32, 64)))
    assert amount(work, Solves) == pytest.approx(3 * (of_group + of_joining) + of_group)


def test_tokens_count() -> None:
    def products(rows: int) -> float:
        work = measuring(SHAPE, Tokens(rows, 8), [], CPU, chosen=True)
        return sum(amount(each, Products) for each in (work.forward, work.head))

    assert products(3) - products(2) == pytest.approx(products(2) - products(1))


def test_evaluation_runs_both_models_and_the_floor_in_float64() -> None:
    work = evaluating(SHAPE, Tokens(4, 8), FormatWork(), torch.float32)
    forward = 3 * 2 * 32 * (64 * 64 + 32 * 64)
    assert amount(work.original, Products) == amount(work.quantized, Products) == forward
    assert amount(work.logits, Products) == 2 * 2 * 32 * 64 * 100
    exact = {kind.dtype for kind in work.exact.amounts if isinstance(kind, Products)}
    assert exact == {torch.float64, torch.float32}
    assert amount(work.logits, FreshElements) > 32 * 100


def test_rows_that_a_model_writes_as_torch_counts_them(save_model: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path / "m"))
    source = language_model(checkpoint)
    rows, row_tokens = 7, 5
    model = whole_model(checkpoint, device=CPU, dtype=torch.float32)
    begun = [WrittenRow([7]) for _ in range(rows)]

    def write() -> None:
        sample_rows(model, begun, row_tokens + 1, range(200), (), torch.Generator().manual_seed(0))

    work = writing(ModelShape.of(source), rows, row_tokens)
    assert amount(work, Products) == counted(write)


def test_rows_are_written_in_as_many_parts_as_there_are_bars(save_model: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_model(tmp_path / "m"))
    for source, rows, expected in (("self", 70, [32, 32, 6]), ("self,built-in", 70, [32, 3]), (None, 70, [])):
        config = MeasureConfig(calibration=CalibrationConfig(source=source, rows=rows), device="cpu")
        parts = writing_parts(checkpoint, config, (rows, 16), None)
        works = [writing(ModelShape.of(language_model(checkpoint)), count, 16) for count in expected]
        assert [part.work for part in parts] == works

"""Sizes that are refused once the model is converted: before anything is measured, and with nothing left."""

import math
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.convert.conversion import Target
from bpwise.convert.gguf.conversion import GgufConversion
from bpwise.errors import BudgetError
from bpwise.quantize.run import quantize_model
from bpwise.quantize.series import quantize_series

from .runs import arguments, gguf, series_arguments


@pytest.mark.parametrize("several", [False, True], ids=["one", "series"])
def test_a_size_that_is_too_small_once_the_vocabulary_is_known(
    several: bool, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the model is converted, a file of its smallest tensors alone looks possible.
    pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
    model = converted["mistral"].directory
    most = gguf(16).conversion(Checkpoint.open(model)).forecast(Target(max_bytes=1 << 40), None)
    least = Target(max_bytes=math.ceil(most.output_bytes * most.lowest_bpw / most.bpw))
    prepared = []
    prepare = GgufConversion.prepare
    monkeypatch.setattr(GgufConversion, "prepare", lambda *given: prepared.append(prepare(*given)) or prepared[-1])
    monkeypatch.setattr("bpwise.quantize.measuring.load_or_make_rows", lambda *_, **__: pytest.fail("went on"))
    config = gguf(target=least)
    with pytest.raises(BudgetError, match=r"cannot be reached|no room for tensors"):
        if several:
            quantize_series(model, tmp_path / "x", [least, Target(bpw=9)], **series_arguments(config))
        else:
            quantize_model(model, tmp_path / "x.gguf", **arguments(config))
    assert len(prepared) == 1
    assert list(tmp_path.iterdir()) == []

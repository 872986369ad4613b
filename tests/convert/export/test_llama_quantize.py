"""Rules as llama-quantize took them, and llama-quantize itself where it was built."""

import json
from pathlib import Path
from typing import Any

import pytest
from bpwise.convert.gguf.export.rules import tensor_rules

from .llama_quantize import plan_of, shapes_of, types_made

GOLDEN = json.loads(Path(__file__).with_name("llama_quantize.json").read_text(encoding="utf-8"))
PROGRAM = Path(__file__).parents[3] / "build" / "llama.cpp" / "bin" / "llama-quantize"


def test_rules_are_those_that_llama_quantize_was_given() -> None:
    # Made by llama-quantize of llama-cpp-python 0.3.36's source, as the Makefile builds it.
    plan = plan_of({name: tuple(shape) for name, shape in GOLDEN["shapes"].items()})
    assert tensor_rules(plan) == GOLDEN["rules"]
    assert {tensor.name: tensor.type for tensor in plan.tensors} == GOLDEN["types"]
    assert len(set(GOLDEN["types"].values())) == 8


@pytest.mark.slow
def test_llama_quantize_itself(converted: Any, tmp_path: Path) -> None:
    if not PROGRAM.exists():
        pytest.skip("llama-quantize was not built: make build/llama.cpp/bin/llama-quantize")
    base = converted["llama"].file
    assert shapes_of(base) == {name: tuple(shape) for name, shape in GOLDEN["shapes"].items()}
    assert types_made(PROGRAM, base, "\n".join(GOLDEN["rules"]), tmp_path) == GOLDEN["types"]

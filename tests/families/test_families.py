"""Every family from its checkpoint to a GGUF file that llama.cpp reads; a few of them in `make test`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from .families import FAMILIES
from .judge import Judged, judge_family
from .models import build_family, family_config, family_names
from .table import RESULTS

SAMPLE = ("llama",)

NAMES = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.families) for name in family_names()]

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")
pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install '.[engine]'")


def test_all_are_described() -> None:
    assert {name for name, family in FAMILIES.items() if family.tried} == set(family_names())


@pytest.mark.parametrize("name", NAMES)
def test_family(name: str, tmp_path: Path, llama_cpp: Path, llama_quantize: Path | None) -> None:
    family = FAMILIES[name]
    model = build_family(name, tmp_path / "model")
    judged = judge_family(name, model, tmp_path, llama_cpp, llama_quantize)
    # llama.cpp rounds activations to 8 bits, and tables that stand for GELU and exp to float16.
    assert judged.reader_nats < 0.03
    assert family.known_miss or judged.gate_nats < 1e-4
    assert (judged.projector is not None) == ("vision_config" in family_config(name))
    if llama_quantize is not None:
        check_against_llama_quantize(judged)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(asdict(judged), default=str))


def check_against_llama_quantize(judged: Judged) -> None:
    assert judged.tensor_bytes <= judged.their_bytes
    assert judged.nats < judged.their_nats
    # Feedback pays; where experts are chosen by a hair, random weights make the difference small.
    assert judged.nats < 1.1 * judged.plain_nats
    assert judged.feedback_share >= 0.95, judged.plain
    assert judged.plain.keys() <= set(judged.unmeasured)

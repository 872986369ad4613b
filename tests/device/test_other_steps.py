"""Steps beside the line of ``test_pipeline`` on the pretend device: rows that a model writes, evaluations, tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bpwise.checkpoint.source.checkpoint import Checkpoint
from bpwise.eval.comparison import compare_models
from bpwise.eval.config import EvalConfig
from bpwise.eval.tasks.benchmarks import TaskConfig, evaluate_tasks, load_tasks
from bpwise.eval.tasks.needle import NeedleConfig, evaluate_needle
from bpwise.measure.calibrated import calibration_rows
from bpwise.measure.model.whole import whole_model
from bpwise.measure.text.calibration import CalibrationConfig, build_calibration
from bpwise.measure.text.mixture import SELF
from bpwise.measure.text.tokenizer import load_tokenizer

from .pretend import NAME, counted, without_float64

MakeModel = Callable[..., Path]


def test_a_model_writes_its_calibration_rows(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, pretend: torch.device
) -> None:
    # The device has no generator of its own: the CPU's draws for it. In bfloat16, as on all devices but a CPU.
    checkpoint = Checkpoint.open(make_model("model"))
    config = CalibrationConfig(source=SELF, rows=4, row_tokens=12)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *_device: generator())
    with without_float64(), counted() as counts:
        found = calibration_rows(checkpoint, config, device=NAME)
    assert counts.launches.total() > 100
    monkeypatch.setattr(
        "bpwise.measure.text.generation.whole_model",
        lambda source, **_options: whole_model(source, device=torch.device("cpu"), dtype=torch.bfloat16),
    )
    assert torch.equal(found.tokens, calibration_rows(checkpoint, config, device="cpu").tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_comparing_two_models(dtype: str, make_model: MakeModel, tmp_path: Path) -> None:
    original, other = (Checkpoint.open(make_model(name, noise=noise)) for name, noise in (("a", 0.0), ("b", 0.02)))
    tokenizer = load_tokenizer(original.directory)
    rows = build_calibration(tokenizer, CalibrationConfig(rows=2, row_tokens=48), vocab_size=264, part="evaluation")
    config = EvalConfig(dtype=dtype, device="cpu")
    expected = compare_models(original, other, rows, config)
    (tmp_path / "states").mkdir()
    with without_float64(), counted() as counts:
        found = compare_models(original, other, rows, replace(config, device=NAME, offload_dir=tmp_path / "states"))
    assert counts.launches.total() > 100
    assert found.summary == expected.summary
    assert found.floor_nats == expected.floor_nats
    assert found.device == NAME


def test_needle(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 400)
    models = make_model("original"), [make_model("quantized", noise=0.02)]
    config = NeedleConfig(lengths=(120,), samples=1, text=str(text), device="cpu")
    expected = evaluate_needle(*models, config)
    with without_float64():
        found = evaluate_needle(*models, replace(config, device=NAME))
    assert found.models == expected.models


PICK = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def test_tasks(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="benchmarks are run by lm-eval: pip install '.[tasks]'")
    monkeypatch.setattr(lm_eval, "TaskManager", partial(lm_eval.TaskManager, include_defaults=False))
    file = tmp_path / "questions.jsonl"
    words = "abcdefgh"
    asked = [{"question": words[n:], "choices": ["aa", "bc", "ed", "f"], "answer": n % 4} for n in range(8)]
    file.write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "pick.yaml").write_text(PICK.format(file=file, cache=tmp_path / "cache"))
    models = make_model("original"), [make_model("quantized", noise=0.05)]
    config = TaskConfig(tasks=("pick",), include_path=tmp_path, device="cpu")
    expected = evaluate_tasks(*models, load_tasks(config))
    with without_float64(), counted() as counts:
        found = evaluate_tasks(*models, load_tasks(replace(config, device=NAME)))
    assert counts.launches.total() > 100
    assert found.scores == expected.scores

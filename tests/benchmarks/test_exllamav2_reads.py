"""What ExLlamaV2 makes of what is written: its own code, run on the CPU, over a tiny model of every family."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bpwise.measure.calibration import CalibrationConfig
from bpwise.measure.run import MeasureConfig
from bpwise.quantize.pipeline import QuantizeConfig, quantize_model
from transformers import PreTrainedTokenizerFast

from ..tiny_models import FAMILIES, VISION, save_family, save_with_vision

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "build" / "exl" / "exllamav2"


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


_SHORT = {"original_max_position_embeddings": 16}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "llama-base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-llama3": ("llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_SHORT)),
    "phi3-longrope": (
        "phi3",
        rope("longrope", long_factor=[2.0 + i for i in range(8)], short_factor=[1.0] * 8, **_SHORT) | _SHORT,
    ),
    "phi3-partial": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "granite-tied": ("granite", {"tie_word_embeddings": True}),
    "gemma2-capped": ("gemma2", {"num_hidden_layers": 4, "attn_logit_softcapping": 20.0}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}
OTHERWISE = {
    "qwen2_moe": ("qwen2_moe", {}),  # unknown to it
    "granite-bias": ("granite", {"attention_bias": True}),  # its multipliers do not reach biases
    "cohere2-deep": ("cohere2", {"num_hidden_layers": 4}),  # it rotates in blocks of full attention too
    # It takes the longest row for the one that frequencies were trained on.
    "llama-yarn": ("llama", rope("yarn", factor=8.0, **_SHORT)),
}
"""What ExLlamaV2 is known to compute otherwise, or to refuse. If one of these comes out the same, a note in
docs/families.md is out of date."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Every model, quantized and read; the line of each."""
    if not PACKAGE.is_dir():
        pytest.skip(f"ExLlamaV2 is not in {PACKAGE}: run `make check-readers`")
    folder = tmp_path_factory.mktemp("readers")
    models: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in (*FAMILIES, *VISION)}
    models |= VARIANTS | OTHERWISE
    for name, (kind, changes) in models.items():
        save = save_with_vision if kind in VISION else save_family
        original = save(folder / "model", kind, byte_tokenizer, **changes)
        measure = MeasureConfig(calibration=CalibrationConfig(rows=2, row_tokens=32), types=False, device="cpu")
        config = QuantizeConfig(bpw=5.5, head_bits=8, measure=measure, evaluate=None, force=name in OTHERWISE)
        quantize_model(original, folder / name, config)
        shutil.rmtree(original)
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "exllamav2_reads.py"), "--exllamav2", str(PACKAGE), *models],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    sys.stdout.write(run.stdout)
    assert run.returncode == 1, run.stderr  # some of OTHERWISE are off
    return {Path(line.split()[2]).name: line for line in run.stdout.splitlines()}


@pytest.mark.parametrize("name", [*VISION, *(name for name in FAMILIES if name not in OTHERWISE), *VARIANTS])
def test_it_computes_the_model_that_was_written(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name].startswith("same"), verdicts[name]


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_it_is_known_to_compute_otherwise(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name].startswith("OFF"), verdicts[name]

"""What ExLlamaV2 makes of what is written: its own code, run on the CPU, over a tiny model of every family."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bpwise.convert.conversion import Target
from bpwise.convert.exl2.options import Exl2Options
from bpwise.measure.run import MeasureConfig
from bpwise.measure.text.calibration import CalibrationConfig
from bpwise.quantize.config import QuantizeConfig
from bpwise.quantize.run import quantize_model
from transformers import PreTrainedTokenizerFast

from ..convert.exl2.test_readers import KINDS, PUBLISHED, original, published, taken, written
from ..quantize.runs import arguments
from ..tiny_models import FAMILIES, VISION, save_family, save_with_vision

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "build" / "exl" / "exllamav2"


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


_SHORT = {"original_max_position_embeddings": 16}
_LONGROPE = {"original_max_position_embeddings": 64}
_FACTORS = {"long_factor": [2.0 + i for i in range(8)], "short_factor": [1.0] * 8}
_FULL = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
_LOCAL = {"rope_type": "default", "rope_theta": 50.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "llama-base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-llama3": ("llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **_SHORT)),
    "phi3-longrope": (
        "phi3",
        rope("longrope", **_FACTORS, **_SHORT) | _SHORT,
    ),
    "phi3-partial": ("phi3", rope("default", partial_rotary_factor=0.5)),
    "granite-tied": ("granite", {"tie_word_embeddings": True}),
    "llama-dynamic": ("llama", rope("dynamic", factor=4.0)),  # no row is longer than the model's longest
    "starcoder2-exact": ("starcoder2", {"hidden_act": "gelu"}),
    "gemma3-shallow": ("gemma3_text", {"num_hidden_layers": 5}),  # no block has full attention
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
    "phi3-longrope-short": ("phi3", _LONGROPE | rope("longrope", **_FACTORS, original_max_position_embeddings=64)),
    # It has an activation of its own for every family.
    "llama-relu": ("llama", {"hidden_act": "relu"}),
    "granite-gelu": ("granite", {"hidden_act": "gelu"}),
    # It computes with keys that Transformers does not look at in this family.
    "llama-scaled": ("llama", {"logit_scale": 0.25}),
    "llama-partial": ("llama", {"partial_rotary_factor": 0.5}),
    "mistral-biased": ("mistral", {"attention_bias": True}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False}),
    "gemma3-local": ("gemma3_text", {"rope_parameters": {**_FULL, "sliding_attention": _LOCAL}}),
    "gemma3-irregular": ("gemma3_text", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3}),
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
        measure = MeasureConfig(calibration=CalibrationConfig(rows=2, row_tokens=32), device="cpu")
        options = Exl2Options(head_bits=8, force=name in OTHERWISE)
        config = QuantizeConfig(target=Target(bpw=5.5), options=options, measure=measure, evaluate=None)
        quantize_model(original, folder / name, **arguments(config))
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


READ = """
import contextlib, importlib, io, json, sys
from pathlib import Path

import exllamav2_standin

found = {}
with contextlib.redirect_stdout(io.StringIO()):
    exllamav2_standin.install(Path(sys.argv[1]).parent, seed=0)
    exllamav2 = importlib.import_module("exllamav2")
    for directory in map(Path, sys.argv[2:]):
        config = exllamav2.ExLlamaV2Config()
        config.model_dir = str(directory)
        config.prepare(no_tensors=True)
        lm, period, window = config.arch.lm, config.sliding_window_pattern, config.sliding_window
        full = [i % 2 if period <= 1 else (i + 1) % period == 0 for i in range(config.num_hidden_layers)]
        found[directory.name] = {
            "vocab_size": config.vocab_size,
            "blocks": config.num_hidden_layers,
            "hidden": config.hidden_size,
            "intermediate": config.intermediate_size,
            "eps": config.norm_eps,
            "heads": config.num_attention_heads,
            "head_dim": config.head_dim,
            "groups": config.num_key_value_heads,
            "head_norms": config.use_qk_norm,
            "attention": config.attention_multiplier or (config.query_pre_attn_scalar or config.head_dim) ** -0.5,
            "experts": config.num_experts if lm.is_moe else None,
            "experts of a token": config.num_experts_per_token if lm.is_moe else None,
            "logits": config.logit_scale,
            "embeddings": config.scale_emb,
            "residual": config.scale_depth,
            "attention cap": config.attn_logit_softcapping,
            "logit cap": config.final_logit_softcapping,
            "theta": config.rotary_embedding_base,
            "rotated": config.partial_rotary_factor,
            "positions": config.max_seq_len,
            "windows": [0 if every else window for every in full] if lm.alternating_swa else None,
            "biases": [bool(lm.attention_bias_qkv), bool(lm.attention_bias_o)],
            "mlp biases": bool(lm.mlp_bias),
        }
print(json.dumps(found))
"""


def test_it_takes_from_config_json_what_the_quick_tests_say(tmp_path: Path) -> None:
    if not PACKAGE.is_dir():
        pytest.skip(f"ExLlamaV2 is not in {PACKAGE}: run `make check-readers`")
    configs = {kind: written(original(kind)) for kind in KINDS}
    configs |= {f"{kind}-published": written(published(kind)) for kind in PUBLISHED}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", READ, str(PACKAGE), *(str(tmp_path / name) for name in configs)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), *sys.path])},
    )
    assert run.returncode == 0, run.stderr
    for name, found in json.loads(run.stdout).items():
        said = json.loads(json.dumps(taken(configs[name])))
        assert {key: said[key] for key in found} == found, name


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_it_is_known_to_compute_otherwise(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name].startswith("OFF"), verdicts[name]

"""What llama.cpp would compute otherwise; that it does was seen by running it beside Transformers on small models."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.model.config import complete_config
from bpwise.convert.gguf.llama_cpp.readers import require_llama_cpp
from bpwise.errors import UnsupportedModelError
from transformers import AutoConfig

ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, **ROPE}
FACTORS = {"long_factor": [2.0] * 64, "short_factor": [1.0] * 64, "original_max_position_embeddings": 512}


def config(kind: str, **changes: Any) -> dict[str, Any]:
    made = AutoConfig.for_model(kind, **{"max_position_embeddings": 4096, **changes}).to_dict() | changes
    return complete_config(made, Path("config.json"), embedding_rows=None)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_another_activation_is_refused(kind: str) -> None:
    assert require_llama_cpp(config(kind, hidden_act="swish", sliding_window=None)) == ()
    with pytest.raises(
        UnsupportedModelError,
        match=r"^config\.json: hidden_act is 'gelu', but llama\.cpp .* 'silu'\. .* Choose an EXL2 output\.$",
    ):
        require_llama_cpp(config(kind, hidden_act="gelu"))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3", {"attention_bias": True}, "attention_bias is True, but llama.cpp takes it for False"),
        ("qwen2", {"head_dim": 96, "hidden_size": 2048}, "head_dim is 96, but .* for 64"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        require_llama_cpp(config(kind, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": False}, "is_causal is False"),
        ({"num_local_experts": 4}, "num_local_experts is 4, but llama.cpp takes it for 0"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0, **ROPE}}, "rope_type 'proportional'"),
        ({"rope_parameters": {"rope_type": "longrope", **FACTORS, **ROPE}}, "rope_type 'longrope'"),
        ({"rope_parameters": {**YARN, "truncate": None}}, "truncate of rope_type 'yarn' is None, but .* for True"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "truncate of rope_type 'yarn' is False"),
        ({"rope_parameters": {**YARN, "beta_slow": 2.0}}, "beta_slow of rope_type 'yarn' is 2.0, but .* for 1"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.5}}, r"by 1\.5, but llama\.cpp by 1\.20794"),
        ({"rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0}}, r"by 0\.913926, but .* by 1\.20794"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        require_llama_cpp(config("llama", **changes))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (config("llama"), []),
        (config("llama", sliding_window=64), []),  # no field of Transformers' class
        (config("llama", sliding_window=64, layer_types=["sliding_attention"] * 32), []),
        (config("llama", sliding_window="x"), []),
        (config("granite", sliding_window="x"), []),
        (config("llama", rope_parameters=YARN), []),
        (config("llama", rope_parameters={**YARN, "beta_fast": None, "beta_slow": None}), []),  # the defaults
        (config("llama", rope_parameters={**YARN, "attention_factor": 0.1 * math.log(8) + 1, "beta_fast": 32}), []),
        (config("mistral", sliding_window=1024), ["sliding_window 1024: .*Rows of more than 1024 tokens"]),
        (config("mistral", sliding_window=4096), []),
        (config("qwen2", sliding_window=64), []),
        (config("qwen2", sliding_window=64, use_sliding_window=True), ["Rows of more than 64 tokens"]),
        (config("qwen3", sliding_window=64, use_sliding_window=True, max_window_layers=0), ["more than 64 tokens"]),
        (
            config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, **ROPE}),
            ["'dynamic'. Rows of more than 4096 tokens"],
        ),
        (config("gemma2", hidden_activation="relu"), []),  # its file is the converter's alone
        (
            config("granite", rope_parameters={"rope_type": "dynamic", "factor": 2.0, **ROPE}),
            ["'dynamic'. Rows of more than 4096 tokens"],
        ),
        (config("granite", rope_parameters={"rope_type": "longrope", **FACTORS, **ROPE}), []),
        (
            {"model_type": "unknown", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["'dynamic'. Rows of more than max_position_embeddings tokens"],
        ),
        ({"model_type": "unknown", "rope_scaling": "x"}, []),
    ],
)
def test_what_matters_for_some_rows_is_said_with_their_length(made: dict[str, Any], expected: list[str]) -> None:
    said = require_llama_cpp(made)
    assert len(said) == len(expected)
    assert all(re.search(pattern, sentence) for pattern, sentence in zip(expected, said, strict=True))

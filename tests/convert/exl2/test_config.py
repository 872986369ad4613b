"""Keys that EXL2 readers look for, made from those that Transformers 5 writes."""

from pathlib import Path
from typing import Any

import pytest
from bpwise.checkpoint.model.config import complete_config
from bpwise.checkpoint.model.names import config_features, model_order
from bpwise.convert.exl2.file.config import dense_config, exl2_config, stored_rates
from transformers import AutoConfig

BASE = {"architectures": ["SomeForCausalLM"]}


def complete(config: dict[str, Any]) -> dict[str, Any]:
    return complete_config(config, Path("config.json"), embedding_rows=None)


def written(**config: Any) -> dict[str, Any]:
    return exl2_config(complete({**config, **BASE}), {"version": "0"}, tied_embeddings=False)


def read_back(config: dict[str, Any]) -> Any:
    """What Transformers makes of the dense model's config."""
    dense = dense_config(complete(config), tied_embeddings=False)
    return type(AutoConfig.for_model(dense["model_type"])).from_dict(dense)


def test_rotation_of_a_part_of_each_head_is_read_at_the_top() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert written(model_type="phi3", rope_parameters=rope)["partial_rotary_factor"] == 0.75
    # Transformers takes the inner one.
    assert written(model_type="phi3", rope_parameters=rope, partial_rotary_factor=0.5)["partial_rotary_factor"] == 0.75


@pytest.mark.parametrize(
    ("model_type", "blocks", "pattern"),
    [("gemma2", 12, 2), ("gemma3_text", 12, 6), ("cohere2", 12, 4), ("cohere2", 3, 4), ("gemma3_text", 5, 6)],
)
def test_blocks_with_a_sliding_window_are_told_by_their_period(model_type: str, blocks: int, pattern: int) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=blocks).to_dict()
    config.pop("sliding_window_pattern", None)
    assert written(**config)["sliding_window_pattern"] == pattern


def test_sliding_windows_without_a_period_are_not_given_one() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert "sliding_window_pattern" not in written(model_type="gemma2", num_hidden_layers=3, layer_types=kinds)
    kinds = ["full_attention"] * 3
    assert "sliding_window_pattern" not in written(model_type="gemma2", num_hidden_layers=3, layer_types=kinds)


def test_epsilon_of_layer_norms_is_read_under_its_older_name() -> None:
    # Hub files of StarCoder2 have both; Transformers takes the newer one.
    assert written(model_type="starcoder2", norm_epsilon=3e-5, layer_norm_epsilon=1e-5)["layer_norm_epsilon"] == 3e-5


def test_biases_of_a_llama_inside_another_model_are_read_outside() -> None:
    text = {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "vocab_size": 320}
    made = written(model_type="llava", text_config=text, vision_config={"model_type": "pixtral"}, vocab_size=99)
    assert (made["attention_bias"], made["mlp_bias"]) == (True, True)
    # Readers take the outer vocabulary, Transformers the inner one.
    assert made["vocab_size"] == 320


def test_what_readers_want_of_a_tower_is_stated() -> None:
    made = written(
        model_type="mistral3", text_config={"model_type": "mistral"}, vision_config={"model_type": "pixtral"}
    )
    # ExLlamaV2 0.3.2, config.py, has no defaults for these, and expects a bias of the projector unless it is told.
    assert {"head_dim", "num_attention_heads", "hidden_act", "patch_size", "rope_theta"} <= made["vision_config"].keys()
    assert (made["vision_feature_layer"], made["multimodal_projector_bias"]) == (-1, False)


GEMMA3_NOW = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "with-vision"])
@pytest.mark.parametrize(
    "rope",
    [{"rope_parameters": GEMMA3_NOW}, {"rope_theta": 1e6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}],
    ids=["transformers-5", "hub"],
)
def test_both_ropes_of_gemma_3(rope: dict[str, Any], nested: bool) -> None:
    kind = "gemma3" if nested else "gemma3_text"
    config = {"model_type": kind, **({"text_config": {"model_type": "gemma3_text", **rope}} if nested else rope)}
    made = written(**config)
    place = made["text_config"] if nested else made
    # ExLlamaV2 0.3.2, config.py: of the blocks of full attention; it knows the others' base by itself.
    assert (place["rope_theta"], place["rope_scaling"]) == (1e6, {"type": "linear", "factor": 8.0})
    assert read_back(made).get_text_config().rope_parameters == GEMMA3_NOW


FACTORS = {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48}
LOW_HIGH = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "model_type", "settings", "key"),
    [
        ("linear", "llama", {"factor": 4.0}, "type"),
        ("yarn", "llama", {"factor": 4.0, "original_max_position_embeddings": 64}, "type"),
        ("llama3", "llama", {"factor": 4.0, "original_max_position_embeddings": 64, **LOW_HIGH}, "rope_type"),
        ("longrope", "phi3", FACTORS, "type"),
        ("su", "phi3", FACTORS, "type"),
        ("mrope", "qwen2_vl", {"mrope_section": [16, 24, 24]}, "type"),
    ],
    ids=["linear", "yarn", "llama3", "longrope", "su", "mrope"],
)
def test_rope_scaling_comes_back(kind: str, model_type: str, settings: dict[str, Any], key: str) -> None:
    longrope = {"original_max_position_embeddings": 2048} if model_type == "phi3" else {}
    config = {"model_type": model_type, "rope_theta": 12345.0, "rope_scaling": {"type": kind, **settings}, **longrope}
    made = written(**config)
    # The one key of the two by which ExLlamaV2 0.3.2 knows it; `su` is the older name of longrope.
    scaling = made["rope_scaling"]
    assert scaling.keys() & {"type", "rope_type"} == {key}
    assert scaling[key] == {"su": "longrope"}.get(kind, kind)
    assert settings.items() <= scaling.items()
    assert longrope.items() <= made.items()
    original = type(AutoConfig.for_model(model_type)).from_dict(
        {**config, "rope_scaling": {"type": {"su": "longrope"}.get(kind, kind), **settings}}
    )
    want = {name: value for name, value in original.get_text_config().rope_parameters.items() if name != "type"}
    assert read_back(made).get_text_config().rope_parameters == want


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"bits": 4, "head_bits": 6}, (4.0, 6)),
        ({"bits": 4.25, "head_bits": None}, (4.25, None)),
        ({"bits": 10**400, "head_bits": 10**400}, (None, None)),
        ({"bits": float("nan"), "head_bits": 6.0}, (None, None)),
        ({"bits": True, "head_bits": True}, (None, None)),
        ({"bits": "4", "head_bits": [6]}, (None, None)),
        ([], (None, None)),
        (None, (None, None)),
    ],
)
def test_rates_that_other_programs_state(stated: Any, expected: tuple[float | None, int | None]) -> None:
    assert stored_rates({"quantization_config": stated}) == expected


def test_names_that_only_look_like_numbers() -> None:
    names = ["model.layers.10.x", "model.layers.9.x", "model.layers.\u00b2.x", f"model.layers.{'9' * 5000}.x"]
    assert sorted(names, key=model_order)[:2] == ["model.layers.9.x", "model.layers.10.x"]


def test_a_config_without_heads() -> None:
    assert config_features("model.layers.0.self_attn.q_proj", {"hidden_size": 64, "num_attention_heads": 0}) == (
        64,
        None,
    )

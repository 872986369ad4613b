"""Keys that EXL2 readers look for, made from those that Transformers 5 writes."""

from typing import Any

import pytest
from bpwise.convert.exl2.config import dense_config, exl2_config, stored_rates
from bpwise.convert.exl2.names import config_features, model_order
from transformers import AutoConfig

BASE = {"architectures": ["SomeForCausalLM"]}


def written(**config: Any) -> dict[str, Any]:
    return exl2_config({**config, **BASE}, {"version": "0"}, tied_embeddings=False)


def test_rotation_of_a_part_of_each_head_is_read_at_the_top() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert written(rope_parameters=rope)["partial_rotary_factor"] == 0.75
    assert written(rope_parameters=rope, partial_rotary_factor=0.5)["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(("model_type", "pattern"), [("gemma2", 2), ("gemma3_text", 6), ("cohere2", 4)])
def test_blocks_with_a_sliding_window_are_told_by_their_period(model_type: str, pattern: int) -> None:
    config = AutoConfig.for_model(model_type, num_hidden_layers=12).to_dict()
    config.pop("sliding_window_pattern", None)
    assert written(**config)["sliding_window_pattern"] == pattern


def test_sliding_windows_without_a_period_are_not_given_one() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert "sliding_window_pattern" not in written(layer_types=kinds)
    assert "sliding_window_pattern" not in written(layer_types=["full_attention"] * 3)


def test_epsilon_of_layer_norms_is_read_under_its_older_name() -> None:
    assert written(norm_epsilon=1e-5)["layer_norm_epsilon"] == 1e-5


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
    read = type(AutoConfig.for_model(kind)).from_dict(dense_config(made, tied_embeddings=False))
    understood = (read.text_config if nested else read).rope_parameters
    assert understood["sliding_attention"]["rope_theta"] == 10000.0
    assert {key: understood["full_attention"][key] for key in ("rope_type", "factor", "rope_theta")} == {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 1e6,
    }


@pytest.mark.parametrize("kind", ["linear", "yarn", "longrope", "mrope", "llama3"])
def test_rope_scaling_comes_back(kind: str) -> None:
    key = "type" if kind == "mrope" else "rope_type"
    scaling = {key: kind, "factor": 4.0, "original_max_position_embeddings": 64}
    made = written(rope_theta=10000.0, rope_scaling=dict(scaling))
    assert dense_config(made, tied_embeddings=False)["rope_scaling"] == scaling


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

"""Keys that EXL2 readers look for, made from those that Transformers 5 writes."""

from typing import Any

import pytest
from bpwise.convert.exl2.config import exl2_config
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

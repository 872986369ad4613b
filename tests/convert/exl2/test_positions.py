"""Positions that config.json stretches, as ExLlamaV2's ``-rs`` and ``-ra`` run them (docs/originals.md)."""

from typing import Any

import pytest
import torch
from bpwise.convert.exl2.file.config import exl2_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SIZES = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 100}


def angles(config: dict[str, Any], position: int) -> torch.Tensor:
    """What Transformers turns the pairs of a head by at a position."""
    rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(config))
    return position * rotary.inv_freq


def exllama_angles(position: int, *, base: float, features: int, scale: float, alpha: float) -> torch.Tensor:
    """ExLlamaV2 0.3.2, rope.py get_rope_params_default and device.py: the base is raised, positions are divided."""
    base *= alpha ** (features / (features - 2))
    return position / scale / base ** (torch.arange(0, features, 2).float() / features)


def edited(layout: str, scale: float, alpha: float) -> dict[str, Any]:
    """A config with a base of 5000, edited as docs/originals.md says: for -rs the scaling, for -ra the base."""
    base = 5000.0 * alpha ** (16 / 14)
    scaling = {"rope_type": "linear", "factor": scale}
    if layout == "Transformers 5":
        return {**SIZES, "rope_parameters": {"rope_theta": base, **scaling}}
    return {**SIZES, "rope_theta": base, "rope_scaling": scaling}


@pytest.mark.parametrize("layout", ["Transformers 4", "Transformers 5"])
@pytest.mark.parametrize(("scale", "alpha"), [(4.0, 1.0), (1.0, 2.5), (2.0, 1.5)])
def test_an_edited_config_is_what_exllamav2_runs(layout: str, scale: float, alpha: float) -> None:
    config = edited(layout, scale, alpha)
    expected = exllama_angles(77, base=5000.0, features=16, scale=scale, alpha=alpha)
    torch.testing.assert_close(angles(config, 77), expected)
    # What is written is what readers of EXL2 look for: they know rope_theta and rope_scaling only.
    written = exl2_config({**config, "architectures": ["LlamaForCausalLM"]}, {}, tied_embeddings=False)
    assert written["rope_theta"] == pytest.approx(5000.0 * alpha ** (16 / 14))
    assert written.get("rope_scaling", {"factor": 1.0})["factor"] == scale


def test_a_base_and_a_length_of_a_million_are_kept() -> None:
    # Llama-3-8B-Instruct-Gradient-1048k.
    config = {**SIZES, "rope_theta": 3580165449.0, "max_position_embeddings": 1048576}
    written = exl2_config({**config, "architectures": ["LlamaForCausalLM"]}, {}, tied_embeddings=False)
    assert written["rope_theta"] == 3580165449.0
    assert written["max_position_embeddings"] == 1048576
    expected = exllama_angles(1048575, base=3580165449.0, features=16, scale=1.0, alpha=1.0)
    torch.testing.assert_close(angles(written, 1048575), expected)

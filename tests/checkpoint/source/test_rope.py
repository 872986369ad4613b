from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.checkpoint.source.original import open_model
from bpwise.checkpoint.source.rope import RopeChange, with_positions_of
from bpwise.convert.exl2.file.config import exl2_config
from bpwise.errors import ConfigError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 100}
OLD = {"model_type": "llama", **SIZES, "rope_theta": 5000.0}
NEW = {"model_type": "llama", **SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


def angles(config: dict[str, Any], position: int) -> torch.Tensor:
    """What Transformers turns the pairs of a head by at a position."""
    rotary = LlamaRotaryEmbedding(LlamaConfig.from_dict(config))
    return position * rotary.inv_freq


def exllama_angles(position: int, *, base: float, features: int, scale: float, alpha: float) -> torch.Tensor:
    """ExLlamaV2 0.3.2, rope.py get_rope_params_default and device.py: the base is raised, positions are divided."""
    base *= alpha ** (features / (features - 2))
    return position / scale / base ** (torch.arange(0, features, 2).float() / features)


@pytest.mark.parametrize("config", [OLD, NEW, {**OLD, "rope_scaling": {"type": "linear", "factor": 9.0}}])
@pytest.mark.parametrize(("scale", "alpha"), [(4.0, None), (None, 2.5), (2.0, 1.5)])
def test_as_exllamav2_runs_it(config: dict[str, Any], scale: float | None, alpha: float | None) -> None:
    changed = RopeChange(scale=scale, alpha=alpha).applied(config)
    own = 9.0 if "rope_scaling" in config else 1.0
    expected = exllama_angles(77, base=5000.0, features=16, scale=scale or own, alpha=alpha or 1.0)
    torch.testing.assert_close(angles(changed, 77), expected)
    assert changed["max_position_embeddings"] == 100 * (scale or 1) * (alpha or 1)
    # What is written is what readers of EXL2 look for: they know rope_theta and rope_scaling only.
    written = exl2_config({**changed, "architectures": ["LlamaForCausalLM"]}, {}, tied_embeddings=False)
    assert written["rope_theta"] == pytest.approx(5000.0 * (alpha or 1.0) ** (16 / 14))
    factor = written.get("rope_scaling", {"factor": 1.0})["factor"]
    assert factor == (scale or own)


def test_the_config_that_is_read_stays(make_model: Any) -> None:
    model = open_model(make_model("base"))
    before = repr(model.config)
    view = open_model(model, rope_scale=2.0)
    assert repr(model.config) == before
    assert view.fingerprint != model.fingerprint
    assert view.fingerprint != open_model(model, rope_scale=3.0).fingerprint
    assert view.changes == {"rope_scale": 2.0}


def test_a_base_and_a_length_of_a_million_are_kept(tmp_path: Path) -> None:
    # Llama-3-8B-Instruct-Gradient-1048k.
    config = {"model_type": "llama", **SIZES, "rope_theta": 3580165449.0, "max_position_embeddings": 1048576}
    written = exl2_config({**config, "architectures": ["LlamaForCausalLM"]}, {}, tied_embeddings=False)
    assert written["rope_theta"] == 3580165449.0
    assert written["max_position_embeddings"] == 1048576
    expected = exllama_angles(1048575, base=3580165449.0, features=16, scale=1.0, alpha=1.0)
    torch.testing.assert_close(angles(written, 1048575), expected)


def test_only_layers_with_full_attention_are_changed() -> None:
    local = {"rope_type": "default", "rope_theta": 10000.0}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    nested = {"text_config": {**SIZES, "rope_parameters": {"full_attention": full, "sliding_attention": local}}}
    changed = RopeChange(scale=4.0, alpha=2.0).applied(nested)["text_config"]["rope_parameters"]
    assert changed["sliding_attention"] == local
    assert changed["full_attention"]["factor"] == 4.0
    assert changed["full_attention"]["rope_theta"] == pytest.approx(1e6 * 2 ** (16 / 14))


def test_part_of_a_head() -> None:
    changed = RopeChange(alpha=2.0).applied({**OLD, "partial_rotary_factor": 0.5})
    assert changed["rope_theta"] == pytest.approx(5000.0 * 2 ** (8 / 6))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({**OLD, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"scale": 2.0}, "rope_type 'llama3'"),
        ({**OLD, "rope_scaling": {"type": "yarn", "factor": 8.0}}, {"scale": 2.0}, "rope_type 'yarn'"),
        (SIZES, {"alpha": 2.0}, "no rope_theta"),
        (OLD, {"alpha": 0.5}, "from 1 up, got 0.5"),
        (OLD, {"scale": float("nan")}, "from 1 up, got nan"),
    ],
)
def test_refused(config: dict[str, Any], change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeChange(**change).applied(config)


def test_what_is_compared_runs_at_the_same_positions(make_model: Any) -> None:
    base = make_model("base")
    stretched = open_model(base, rope_scale=4.0)
    other = with_positions_of(stretched, open_model(make_model("other", noise=0.1)))
    assert angles(other.config, 5).tolist() == angles(stretched.config, 5).tolist()
    assert other.config["max_position_embeddings"] == 4 * 128
    again = with_positions_of(stretched, other)  # whether it says so already or not
    assert again.config == other.config
    assert other.fingerprint != stretched.fingerprint
    plain = open_model(base)
    assert with_positions_of(plain, other) is other

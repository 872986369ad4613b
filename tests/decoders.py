"""Sizes of a tiny model of many families of decoders beyond the table, whatever the names and kinds of their blocks."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .tiny_models import EXPERTS, FAMILIES, GEMMA, SIZES

_MOE = {**EXPERTS, "shared_expert_intermediate_size": 32}
_ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_ROUTED |= {"n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_LATENT |= {"num_key_value_heads": 4}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_HYBRID = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING_AND_FULL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA4 = {**GEMMA, **_SLIDING_AND_FULL, "num_hidden_layers": 4, "global_head_dim": 32}
_GEMMA4 |= {"num_global_key_value_heads": 2}
_PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 264, "num_kv_shared_layers": 2}

DECODERS: dict[str, dict[str, Any]] = {
    "apertus": {},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT},
    "ernie4_5": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "falcon_h1": {
        **_MAMBA,
        "mamba_d_ssm": 128,
        "attention_in_multiplier": 0.5,
        "attention_out_multiplier": 0.25,
        "ssm_out_multiplier": 0.125,
    },
    "gemma3n_text": {
        **GEMMA,
        **_SLIDING_AND_FULL,
        **_PER_LAYER,
        "num_hidden_layers": 4,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5] * 4,
    },
    "gemma4": {**_GEMMA4, "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_per_layer": {**_GEMMA4, **_PER_LAYER, "model_type": "gemma4_text"},
    "gemma4_moe": {
        **_GEMMA4,
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "glm4_moe": {**_ROUTED, "head_dim": 16, "use_qk_norm": True},
    "glm4_moe_lite": {**_ROUTED, **_LATENT},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {},
    "gpt_oss": {**_LOCAL, "head_dim": 16, "sliding_window": 16},
    "granitemoe": {**_LOCAL, "residual_multiplier": 0.4},
    "granitemoehybrid": {
        **_LOCAL,
        **_MAMBA,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 32,
        "residual_multiplier": 0.4,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minimax_m2": {**_LOCAL, "head_dim": 16, "rotary_dim": 8},
    "ministral3": {"head_dim": 16},
    "nemotron": {},
    "nemotron_h": {**_HYBRID, "layers_block_type": ["mamba", "mlp", "attention"]},
    "nemotron_h_moe": {
        **_HYBRID,
        **_ROUTED,
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "moe", "attention"],
        "moe_shared_expert_intermediate_size": 32,
    },
    "nemotron_h_latent": {
        **_HYBRID,
        **_ROUTED,
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "moe", "attention"],
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 16,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "olmoe": _LOCAL,
    "qwen3_5_moe_text": {**_MOE, **_DELTA, "head_dim": 16},
    "qwen3_5_text": {**_DELTA, "head_dim": 16},
    "qwen3_next": {**_MOE, **_DELTA, "head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {},
}
"""Families and variants of them, and what differs from ``SIZES``; ``model_type`` where that is not the name."""


def empty_model(name: str, **changes: Any) -> Any:
    """A tiny model without weights, of the table or of those here, in evaluation mode."""
    settings = {**SIZES, **(FAMILIES | DECODERS)[name], **changes}
    return empty_model_of(settings.pop("model_type", name), **settings)


def empty_model_of(model_type: str, **settings: Any) -> Any:
    """A model without weights, of a config with these values, in evaluation mode."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **settings), dtype=torch.bfloat16
        ).eval()

"""Tiny random decoders of many families, most of them in no table of ours."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"]}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
TIED = {"tie_word_embeddings": True}
CHOSEN = {"num_local_experts": 4, "num_experts_per_tok": 2}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "bamba": ("bamba", {**STATE, "attn_layer_indices": [1], "mamba_chunk_size": 16}),
    "deepseek_v2": ("deepseek_v2", {**EXPERTS, **ROUTED, **LATENT, "n_group": 1}),
    "deepseek_v3": ("deepseek_v3", {**EXPERTS, **ROUTED, **LATENT}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "falcon_h1": ("falcon_h1", {**STATE, "mamba_d_ssm": 64, "mamba_chunk_size": 16}),
    "gemma3n": (
        "gemma3n_text",
        {
            **TIED,
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **TIED,
            **SLIDING,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
        },
    ),
    "gemma4_experts": (
        "gemma4_text",
        {
            **TIED,
            **SLIDING,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "glm": ("glm", {"partial_rotary_factor": 0.5}),
    "glm4_moe": ("glm4_moe", {**EXPERTS, **ROUTED, "n_group": 1, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", {**TIED, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", {**CHOSEN, "sliding_window": 16}),
    "granitemoe": ("granitemoe", CHOSEN),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**STATE, **CHOSEN, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
    ),
    "jamba": (
        "jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": ("lfm2", {**TIED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "lfm2_moe": ("lfm2_moe", {**EXPERTS, **TIED, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2}),
    "minimax_m2": ("minimax_m2", {**CHOSEN, "rotary_dim": 4}),
    "ministral3": ("ministral3", {}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": (
        "nemotron_h",
        {
            **EXPERTS,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phimoe": ("phimoe", CHOSEN),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_next": ("qwen3_next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
}
"""Model types, and what differs from ``SIZES``."""


TEXT = {**SIZES, "tie_word_embeddings": False}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 16, "image_size": 16, "patch_size": 8}
SIGLIP = {**PIXTRAL, "model_type": "siglip_vision_model"}

COMPOSITES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {**TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **MROPE, **EXPERTS, "moe_intermediate_size": 24},
        "vision_config": {**TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_5": {"text_config": {**TEXT, **DELTA}, "vision_config": {**TOWER, "num_position_embeddings": 16}},
    "qwen3_5_moe": {
        "text_config": {**TEXT, **DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
        "vision_config": {**TOWER, "num_position_embeddings": 16},
    },
    "gemma4": {
        "text_config": {**SIZES, **DECODERS["gemma4_experts"][1], "model_type": "gemma4_text"},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
            "position_embedding_size": 16,
        },
        "audio_config": None,
    },
    "mistral3": {"text_config": {**TEXT, "model_type": "ministral3"}, "vision_config": PIXTRAL},
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [8, 8],
        },
    },
}
"""Models with vision, by model type: settings of their configs."""


def decoder_config(name: str, **changes: Any) -> Any:
    """Transformers' config object of one of ``DECODERS``."""
    model_type, settings = DECODERS[name]
    return AutoConfig.for_model(model_type, **{**SIZES, **settings, **changes})


def save_decoder(directory: Path, name: str, **changes: Any) -> Any:
    """Save one of ``DECODERS`` in bfloat16 with random weights everywhere, as Transformers writes it; return it."""
    return save_random(directory, decoder_config(name, **changes))


def save_random(directory: Path, config: Any) -> Any:
    """Save the decoder of a config in bfloat16 with random weights everywhere, as Transformers writes it; return it."""
    model = fill(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    model.save_pretrained(directory)
    return model


def fill(model: Any) -> Any:
    """Add random numbers to all weights of a model, also those that begin as zeros or ones; return it."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=rng))
    return model.eval()

"""Tiny random decoders on disk, of many families that no table of ours holds, and models with vision around them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .decoders import DECODERS
from .tiny_models import EXPERTS, FAMILIES, SIZES

ALL = FAMILIES | DECODERS
"""What differs from ``SIZES``; ``model_type`` where that is not the name."""

TEXT = {**SIZES, "head_dim": 16}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 8, "out_hidden_size": 64}
PIXTRAL = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
PIXTRAL |= {"num_attention_heads": 2, "head_dim": 16, "image_size": 16, "patch_size": 8}

COMPOSITES: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**TEXT, **MROPE},
        "vision_config": {**TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **MROPE, **EXPERTS, "moe_intermediate_size": 24},
        "vision_config": {**TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_5": {
        "text_config": {**TEXT, **DECODERS["qwen3_5_text"]},
        "vision_config": {**TOWER, "num_position_embeddings": 16},
    },
    "qwen3_5_moe": {
        "text_config": {**TEXT, **DECODERS["qwen3_5_moe_text"]},
        "vision_config": {**TOWER, "num_position_embeddings": 16},
    },
    "gemma4": {
        "text_config": {**SIZES, **DECODERS["gemma4_moe"]},
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
    """Transformers' config object of one of ``ALL``."""
    settings = {**SIZES, **ALL[name], **changes}
    return AutoConfig.for_model(settings.pop("model_type", name), **settings)


def save_decoder(directory: Path, name: str, **changes: Any) -> Any:
    """Save one of ``ALL`` in bfloat16 with random weights everywhere, as Transformers writes it; return it."""
    model = fill(AutoModelForCausalLM.from_config(decoder_config(name, **changes), dtype=torch.bfloat16))
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

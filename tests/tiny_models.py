"""A tiny random model of every family, and what tests of them share."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from bpwise.measure.model.stream import StreamedModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

Rename = Callable[[str], str]

SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "mlp_only_layers": [0], "shared_expert_intermediate_size": 96},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "norm_topk_prob": True},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 16, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
    },
    "glm4": {"head_dim": 16, "attention_bias": True},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.25, "tie_word_embeddings": True, "sliding_window": 16},
    "starcoder2": {"use_bias": True, "tie_word_embeddings": True},
}
"""Model types, and what differs from ``SIZES``."""

TEXT = {**SIZES, "head_dim": 16}
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "tie_word_embeddings": True}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
PIXTRAL = {**TOWER, "model_type": "pixtral", "head_dim": 16}
QWEN = {"depth": 3, "num_heads": 2, "patch_size": 14}

VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, **GEMMA, "model_type": "gemma3_text"},
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": True,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": PIXTRAL,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": 10,
        "tie_word_embeddings": False,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": PIXTRAL,
        "image_token_index": 10,
        "tie_word_embeddings": False,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, **MROPE, "model_type": "qwen2_vl_text"},
        "vision_config": {**QWEN, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, **MROPE, "model_type": "qwen2_5_vl_text"},
        "vision_config": {
            **QWEN,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "fullatt_block_indexes": [0],
        },
    },
}

_ROPE = ("rope_parameters", "layer_types", "head_dim", "attention_bias", "mlp_bias", "use_bidirectional_attention")
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "llama": _ROPE,  # meta-llama/Llama-2-7b-hf
    "mistral": _ROPE,  # mistralai/Mistral-7B-v0.1
    "mixtral": (*_ROPE, "router_jitter_noise"),  # mistralai/Mixtral-8x7B-v0.1
    "qwen2": _ROPE,  # Qwen/Qwen2.5-7B
    "qwen3": _ROPE,  # Qwen/Qwen3-8B
    "qwen3_moe": _ROPE,  # Qwen/Qwen3-30B-A3B
    "gemma2": (*_ROPE, "tie_word_embeddings"),  # google/gemma-2-2b
    "gemma3_text": (*_ROPE, "tie_word_embeddings"),  # google/gemma-3-1b-it
    "phi3": _ROPE,  # microsoft/Phi-3-mini-4k-instruct
    "cohere": (*_ROPE, "use_qk_norm"),  # CohereForAI/c4ai-command-r-v01
    "starcoder2": (*_ROPE, "tie_word_embeddings"),  # bigcode/starcoder2-7b
    # google/gemma-3-4b-it, as far as these values are the class's own
    "gemma3": (*_ROPE, "hidden_activation", "rms_norm_eps", "tie_word_embeddings", "final_logit_softcapping"),
    "llava": (*_ROPE, "rms_norm_eps", "hidden_act", "tie_word_embeddings"),  # mistral-community/pixtral-12b
    "qwen2_5_vl": _ROPE,  # Qwen/Qwen2.5-VL-7B-Instruct
}
"""What makers leave out of their models' files; rotary embeddings stand under older keys there."""

_IMAGES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
_PIXTRAL = {**_IMAGES, "image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 14, "width": 14}}
_PIXTRAL |= {"size": {"longest_edge": 28}}
_QWEN = {**_IMAGES, "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
_QWEN |= {"temporal_patch_size": 2, "size": {"longest_edge": 784, "shortest_edge": 196}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "gemma3": {**_IMAGES, "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}},
    "llava": _PIXTRAL,
    "mistral3": _PIXTRAL,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}
"""What Transformers 5 writes into processor_config.json."""


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Draw all parameters; norms that multiply by their weight get weights around 1."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            around = 0.0 if "gemma" in type(model).__name__.lower() else 1.0
            parameter.copy_(around + 0.1 * noise if "norm" in name and parameter.ndim == 1 else 0.1 * noise)


def leave_out(directory: Path, model_type: str) -> None:
    """Rewrite a model's config.json as its makers write theirs, where that says the same to Transformers."""
    path = directory / "config.json"
    config = json.loads(path.read_text())

    def meaning(made: dict[str, Any]) -> dict[str, Any]:
        parsed = AutoConfig.for_model(**deepcopy(made))
        rope = {key: value for key, value in parsed.get_text_config().rope_parameters.items() if key != "type"}
        text = {**parsed.get_text_config().to_dict(), "rope_parameters": rope}
        outer = {key: value for key, value in parsed.to_dict().items() if key not in ("text_config", *text)}
        return {key: value for key, value in (outer | text).items() if not key.startswith("_")}

    meant = meaning(config)
    for key in LEFT_OUT.get(model_type, ()):
        shorter = deepcopy(config)
        text = shorter.get("text_config", shorter)
        value = text.pop(key, None)
        if key == "rope_parameters" and value is not None:
            text |= older_rope(value)
        if meaning(shorter) == meant:
            config = shorter
    path.write_text(json.dumps(config))


def older_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of Transformers 4 for ``rope_parameters``."""
    rope = parameters.get("full_attention", parameters)
    older = {"rope_theta": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", 1.0) != 1:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope is not parameters:
        older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    settings = {key: value for key, value in rope.items() if key not in (*older, "rope_type", "partial_rotary_factor")}
    kind = "mrope" if "mrope_section" in rope else rope["rope_type"]
    return older if kind == "default" else {**older, "rope_scaling": {"type": kind, **settings}}


def save_family(directory: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """Save a tiny model of a family, with a tokenizer beside it."""
    settings = {**SIZES, **FAMILIES[model_type], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    randomize(model, 0)
    model.half().save_pretrained(directory)
    leave_out(directory, model_type)
    tokenizer.save_pretrained(directory)
    return directory


def save_with_vision(
    directory: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, rename: Rename | None = None
) -> Path:
    """Save a tiny model with vision, its tensors renamed if asked, with tokenizer and image processor beside it."""
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **VISION[model_type]))
    randomize(model, 0)
    model.half().save_pretrained(directory)
    if rename is not None:
        file = directory / "model.safetensors"
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    leave_out(directory, model_type)
    tokenizer.save_pretrained(directory)
    processor = json.dumps({"image_processor": PROCESSORS[model_type], "processor_class": "Any"})
    (directory / "processor_config.json").write_text(processor)
    return directory


def streamed_logits(source: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Run a model one block at a time."""
    model = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)
    hidden = model.embed(tokens)
    with torch.no_grad():
        for index in range(model.block_count):
            with model.block(index):
                hidden = model.run_block(index, hidden)
        with model.tail():
            return model.logits(hidden)

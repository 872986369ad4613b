"""Forms that files come in beside the usual one: adapters, configs, folders, GGUF files, tokenizers of other kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bpwise.convert.gguf.file.emit import Planned, entry, header_bytes, padding
from bpwise.convert.gguf.file.metadata import DIGEST_KEY, MAP_KEY
from bpwise.convert.gguf.ggml.types import ggml_type
from bpwise.convert.gguf.rows.rowmap import RowMap, TensorRows
from bpwise.convert.gguf.rows.text import map_to_text
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ..tiny_models import save_family, save_with_vision

__all__ = ["save_adapters", "save_configs", "save_listing", "save_tokenizers", "write_ggufs"]

_ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "rank_pattern": {"mlp.up_proj": 2},
    "alpha_pattern": {"mlp.up_proj": 4},
    "target_modules": ["q_proj", "up_proj"],
    "use_dora": False,
    "use_rslora": False,
    "layer_replication": None,
    "trainable_token_indices": None,
}


def save_adapters(folder: Path) -> None:
    """Save adapters of a model with 32 channels, 64 neurons and 264 tokens.

    ``lora`` is of two linears, ``dora`` weight-decomposed, ``whole`` of an embedding, with norm and head of its own.
    """
    layer = "base_model.model.model.layers.0"
    q_proj, up_proj = f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"
    table = "base_model.model.model.embed_tokens"
    low = {
        **{f"{q_proj}.lora_A.weight": (4, 32), f"{q_proj}.lora_B.weight": (32, 4)},
        **{f"{up_proj}.lora_A.weight": (2, 32), f"{up_proj}.lora_B.weight": (64, 2)},
    }
    magnitudes = {f"{q_proj}.lora_magnitude_vector": (32,), f"{up_proj}.lora_magnitude_vector.weight": (64,)}
    whole = {
        **{f"{table}.lora_embedding_A": (4, 264), f"{table}.lora_embedding_B": (32, 4)},
        **{f"{layer}.input_layernorm.modules_to_save.weight": (32,), "base_model.model.lm_head.weight": (264, 32)},
    }
    rng = torch.Generator().manual_seed(0)
    for name, shapes, changes in (
        ("lora", low, {}),
        ("dora", {**low, **magnitudes}, {"use_dora": True, "use_rslora": True}),
        ("whole", whole, {"modules_to_save": ["lm_head"]}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps({**_ADAPTER, **changes}))
        tensors = {each: torch.randn(shape, generator=rng) for each, shape in shapes.items()}
        save_file(tensors, folder / name / "adapter_model.safetensors", {"format": "pt"})


def save_configs(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save models whose configs have parts, experts, other names for sizes, or an older rope type."""
    save_with_vision(folder / "gemma3", "gemma3", tokenizer)
    save_family(folder / "mixtral", "mixtral", tokenizer)
    save_family(folder / "phi3", "phi3", tokenizer)
    path = folder / "phi3" / "config.json"
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = json.loads(path.read_text()) | {"original_max_position_embeddings": 64}
    config.pop("rope_parameters", None)
    path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": {"type": "su", **factors}}))
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 264}
    GPT2LMHeadModel(GPT2Config(**sizes)).half().save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")


def save_tokenizers(folder: Path, base: Path) -> None:
    """Give a model tokenizers of other kinds: one with scores, one of words in files of its own."""
    config = (base / "config.json").read_bytes()
    for name in ("scores", "words"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(config)
        (folder / name / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    tokens = ["<unk>", *map(chr, range(32, 127)), "<eos>"]
    scores = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 0, byte_fallback=False))
    words = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, "<unk>"))
    for name, backend in (("scores", scores), ("words", words)):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
        tokenizer.save_pretrained(folder / name)
    (folder / "words" / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    path = folder / "words" / "tokenizer_config.json"
    added = {"96": {"content": "<eos>", "special": True}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": added}))


def save_listing(folder: Path, model: Path) -> None:
    """Save the files of a model and of an adapter, and a list of names under which a folder is to hold them."""
    (folder / "content").mkdir()
    for path in model.iterdir():
        (folder / "content" / path.name).write_bytes(path.read_bytes())
    save_adapters(folder / "adapters")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "content" / name).write_bytes((folder / "adapters" / "lora" / name).read_bytes())
    names = sorted(path.name for path in model.iterdir())
    (folder / "listing.json").write_text(json.dumps({name: name for name in names}))


_METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "general.file_type": 1,
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
    "bpwise.version": "0.1.0",
    "bpwise.calibration": "text",
    "bpwise.calibration_spans": "2:",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"t{number}" for number in range(264)],
    "tokenizer.ggml.bos_token_id": 1,
}

_SHAPES: dict[str, tuple[int, ...]] = {
    **{f"blk.0.attn_{name}.weight": (rows, 32) for name, rows in (("q", 32), ("k", 16), ("v", 16), ("output", 32))},
    **{"blk.0.ffn_gate.weight": (64, 32), "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64)},
    **{"blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,), "output_norm.weight": (32,)},
    **{"token_embd.weight": (264, 32), "output.weight": (264, 32)},
}


def write_ggufs(folder: Path) -> None:
    """Write a model in one file, and others: in two parts, with rope factors and a digest, with a map of its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.gguf", _METADATA, _SHAPES)
    template = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}", DIGEST_KEY: "0" * 64}
    _write(folder / "roped.gguf", {**_METADATA, **template}, {**_SHAPES, "rope_freqs.weight": (4,)})
    names = list(_SHAPES)
    for number, part in enumerate((names[:6], names[6:])):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        file = folder / f"split-0000{number + 1}-of-00002.gguf"
        _write(file, {**(_METADATA if number == 0 else {}), **split}, {name: _SHAPES[name] for name in part})
    rows = TensorRows(("x",), np.zeros(16, np.int64), np.arange(16), None, None)
    known = {"general.architecture": "other", MAP_KEY: map_to_text(RowMap({"a": rows}, {"b": "unlike all"}))}
    _write(folder / "mapped.gguf", known, {"a": (16, 32), "b": (8, 32)})


def _write(path: Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    planned = [Planned(name, ggml_type("F16" if len(shape) > 1 else "F32"), shape) for name, shape in shapes.items()]
    rng = np.random.RandomState(0)
    with path.open("wb") as file:
        file.write(header_bytes({key: entry(value) for key, value in metadata.items()}, planned, 32))
        for tensor in planned:
            dtype = np.float16 if tensor.type.name == "F16" else np.float32
            data = (rng.standard_normal(tensor.shape) * 0.2).astype(dtype).tobytes()
            file.write(data + bytes(padding(len(data), 32)))

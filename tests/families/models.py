"""Tiny random models as the Hub has them: one for every ``configs/NAME.json``, which has the keys of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from .hub import AS_ON_THE_HUB
from .vocabulary import SENTENCEPIECE, byte_tokenizer, gemma4_tokenizer, sentencepiece_model
from .weights import randomize

CONFIGS = Path(__file__).parent / "configs"

_IMAGES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255}
_QWEN = _IMAGES | {"merge_size": 2, "temporal_patch_size": 2, "size": {"longest_edge": 12544, "shortest_edge": 3136}}
_QWEN3 = _QWEN | {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16}
_PATCH = {"patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 56}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "gemma3": _IMAGES | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}},
    "gemma4": _IMAGES | {"image_processor_type": "Gemma4ImageProcessor", "patch_size": 16, "pooling_kernel_size": 3},
    "mistral3": _IMAGES | {"image_processor_type": "PixtralImageProcessorFast", **_PATCH},
    "qwen2_5_vl": _QWEN | {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14},
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "qwen3_vl": _QWEN3,
}
"""``preprocessor_config.json`` by model type."""


def family_names() -> list[str]:
    """Return the names of all families."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def family_config(name: str) -> dict[str, Any]:
    """Return a family's config.json."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


def build_family(name: str, directory: Path) -> Path:
    """Write the tiny model of a family: config.json, weights, tokenizer, image processor."""
    directory.mkdir(parents=True)
    raw = family_config(name)
    config_file = directory / "config.json"
    config_file.write_text(json.dumps(raw, indent=2))
    config = transformers.AutoConfig.from_pretrained(directory)
    model = model_class(raw)._from_config(config, dtype=torch.float32)
    randomize(model, seed=sum(map(ord, name)))
    # Qwen3.5's experts are stacked on the Hub as they are in memory.
    model.to(config.dtype or torch.bfloat16).save_pretrained(directory, save_original_format=name != "qwen3_5_moe")
    config_file.write_text(json.dumps(raw, indent=2))
    if name in AS_ON_THE_HUB:
        file = directory / "model.safetensors"
        save_file(AS_ON_THE_HUB[name](load_file(file)), file, {"format": "pt"})
    tokenizer = gemma4_tokenizer() if raw["model_type"] == "gemma4" else byte_tokenizer()
    tokenizer.save_pretrained(directory)
    if name in SENTENCEPIECE:
        (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    if raw["model_type"] in PROCESSORS:
        (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[raw["model_type"]]))
    return directory


def model_class(config: dict[str, Any]) -> Any:
    """Return Transformers' class for the architecture that a config.json names; some spell it differently."""

    def plain(name: str) -> str:
        return name.lower().replace("_", "")

    architecture = plain(config["architectures"][0])
    return getattr(transformers, next(name for name in dir(transformers) if plain(name) == architecture))

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

SaveModel = Callable[..., Path]


@pytest.fixture(scope="session")
def save_model(byte_tokenizer: PreTrainedTokenizerFast) -> SaveModel:
    """Saves a random two-layer model with a byte-level tokenizer beside it."""

    def save(
        directory: Path,
        *,
        kind: type[PreTrainedConfig] = LlamaConfig,
        seed: int = 0,
        change: Callable[[Any], None] | None = None,
        **settings: Any,
    ) -> Path:
        sizes = {
            "vocab_size": 264,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        model = AutoModelForCausalLM.from_config(kind(**{**sizes, **settings}))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
            if change is not None:
                change(model)
        model.save_pretrained(directory)
        byte_tokenizer.save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def tiny_model(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test may change."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")

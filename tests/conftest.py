from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """Saves a random two-layer Llama with a byte-level tokenizer beside it."""

    def build(
        name: str,
        *,
        noise: float = 0.0,
        change: Callable[[dict[str, torch.Tensor]], None] | None = None,
        vocab_size: int = 264,
        **config: object,
    ) -> Path:
        settings = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **config}))
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                scale = 0.2 if parameter.ndim == 2 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale + (1.0 if "norm" in key else 0.0))
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=rng))
            if change is not None:
                change(dict(model.named_parameters()))
        model.save_pretrained(tmp_path / name)
        byte_tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after a BOS token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")

"""Tiny models, and a text of our own to run them on.

The logits of two are the same float32 in every engine. Embeddings are +1 or -1, so that their norm is exactly 1;
attention and MLP add 0; the head's weights are small multiples of a power of two, so that sums are exact in whatever
order. Logits depend on the last token alone. They reach further than the 16 nats that a base file stores, and the
vocabulary's size is odd. Two others are as models are: they attend, and engines round them differently.
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ...conftest import byte_level_tokenizer

WINDOW_TOKENS = 64

TEXT = """
 = The lamp at the end of the pier =

The keeper wrote one line a day. On most days it said that the lamp was lit, that the wind came from the west, and that
nobody had passed. He did not mind. "A light is for those who are not here," he told the boy who brought him bread,
"and for them it must burn all the same."

In March the boy counted 127 ships, 3 of them with red sails; he drew each of them: <bos> was written on one, which
he took for a name. Größer als alle war die letzte.
"""
"""Ends in a newline, which is not run; a token's name in it is text."""

_VOCABULARY, _WIDTH = 265, 32
_LIKELY = torch.tensor([3.0 if 65 <= token <= 90 or token in (220, 188) else 0.0 for token in range(_VOCABULARY)])
_UNLIKELY = torch.tensor([-24.0 if 120 <= token < 180 else 0.0 for token in range(_VOCABULARY)])


def save_exact_model(directory: Path, *, quantized: bool = False) -> Path:
    """Save the original, or what stands for a quantized model: its head's weights moved a little."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rms_norm_eps=0.0,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config)
    rng = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, (_VOCABULARY, _WIDTH), generator=rng) - 1
    head = torch.randint(-12, 13, (_VOCABULARY, _WIDTH), generator=rng) / 32
    moved = torch.randint(-3, 4, (_VOCABULARY, _WIDTH), generator=rng) / 64
    signs[:, 0], head[:, 0] = 1, _LIKELY + _UNLIKELY
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.get_input_embeddings().weight.copy_(signs)
        model.get_output_embeddings().weight.copy_(head + moved if quantized else head)
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory


def save_attending_model(directory: Path, *, quantized: bool = False) -> Path:
    """Save a random Llama of two layers, or one whose weights are a little off."""
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = LlamaForCausalLM(config)
    rng, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)
            if quantized and "norm" not in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=other))
    model.save_pretrained(directory)
    byte_level_tokenizer().save_pretrained(directory)
    return directory

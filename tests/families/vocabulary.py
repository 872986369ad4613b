"""Small vocabularies that llama.cpp's converter reads: it wants one of three kinds, by family."""

from __future__ import annotations

import io
import pydoc
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SENTENCEPIECE = {"mistral", "mixtral", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "nemotron", "phi3"}
SENTENCEPIECE |= {"ernie4_5", "ernie4_5_moe", "jamba"}
"""Families whose vocabulary is read from ``tokenizer.model``."""

_LOOKED_UP = ["<|endoftext|>", "<|user|>", "<|observation|>", "[gMASK]", "[IMG_BREAK]"]
"""Tokens that the converter takes for granted in one family or another."""


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"\u0120t": 256}
    backend = Tokenizer(models.BPE(vocabulary, [("\u0120", "t")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", *_LOOKED_UP])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@cache
def gemma4_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, which falls back to bytes as Gemma 4's does."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "t", "\u2581t"]
    tokens += [f"<unused{number}>" for number in range(512 - len(tokens))]  # the converter takes as many as there are
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("\u2581", "t")], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(tokens[:4])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@cache
def sentencepiece_model() -> bytes:
    """Return a small ``tokenizer.model``."""
    import sentencepiece

    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pydoc.__doc__.splitlines()),
        model_writer=target,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        minloglevel=2,
    )
    return target.getvalue()

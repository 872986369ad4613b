"""config.json of the model that a GGUF file holds, rebuilt from its metadata alone.

Nothing is taken from the original: what the file says of its rotary embeddings is part of what is evaluated. A file
that lost its rope scaling must show the damage, as it does in llama.cpp. Where metadata can be read in two ways,
llama.cpp's reading counts. Transformers' own reader of GGUF files is not used: it drops rope scaling in silence.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import FormatError, UnsupportedModelError
from ..file.header import GgufHeader
from .names import ROPE_FREQS, Architecture, architecture_of

__all__ = ["config_from_metadata"]

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""low_freq_factor, high_freq_factor and original_max_position_embeddings of all Llama 3.1, 3.2 and 3.3 models."""

_SAME_FACTOR = 1e-6
"""Largest relative difference of rotary factors that counts as rounding: float32 in another order."""

_MAX_SIZE = 1 << 31
"""No number of a model is larger; products of two stay exact."""


def config_from_metadata(header: GgufHeader, rope_freqs: NDArray[np.float32] | None) -> dict[str, Any]:
    """Return config.json of the model in a file.

    Args:
        header: What stands before the file's data.
        rope_freqs: Values of ``rope_freqs.weight``, float32, shape (half of the head size,); None if it is not there.

    Returns:
        A config that Transformers understands, with the older ``rope_theta`` and ``rope_scaling``, which all versions
        do. It always has ``head_dim`` and ``tie_word_embeddings``.

    Raises:
        FormatError: Something is missing or makes no sense, or the file is one of several parts of a model.
        UnsupportedModelError: The architecture is unknown, or a variant that has no counterpart in Transformers.
    """
    return _Builder(header).config(rope_freqs)


class _Builder:
    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._name = str(header.metadata.get("general.architecture"))
        self._architecture: Architecture = architecture_of(self._name)

    def config(self, rope_freqs: NDArray[np.float32] | None) -> dict[str, Any]:
        self._refuse_variants()
        architecture, tensors = self._architecture, self._header.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self._error("token_embd.weight is missing or no matrix")
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = self._size("attention.key_length", hidden // heads)
        blocks = self._size("block_count")
        if blocks > len(tensors):
            raise self._error(f"block_count is {blocks}, but the file has {len(tensors)} tensors")
        context = self._size("context_length")
        theta = self._float("rope.freq_base", 10000.0, least=1.001)
        # Transformers' Llama wants a width that its heads divide; its Mistral computes the same and does not ask.
        odd = architecture.model_type == "llama" and hidden % heads != 0
        config: dict[str, Any] = {
            "architectures": ["MistralForCausalLM" if odd else architecture.model_class],
            "model_type": "mistral" if odd else architecture.model_type,
            "vocab_size": embedding.shape[0],
            "hidden_size": hidden,
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": blocks,
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            "rms_norm_eps": self._float("attention.layer_norm_rms_epsilon", least=0),
            "rope_theta": theta,
            "rope_scaling": self._scaling(rope_freqs, theta, head_dim, context),
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        if self._size("attention.value_length", head_dim) != head_dim or head_dim % 2:
            raise self._unsupported("heads of values that differ in size from those of keys, or of odd size")
        if self._size("rope.dimension_count", head_dim) != head_dim:
            raise self._unsupported("rotary embeddings of a part of each head only")
        if odd:
            config["sliding_window"] = None  # absent would mean 4096
        self._add_biases(config)
        for key, name in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id")):
            value = self._header.metadata.get(f"tokenizer.ggml.{name}")
            if isinstance(value, int) and 0 <= value < config["vocab_size"]:
                config[key] = value
        return config

    def _refuse_variants(self) -> None:
        if self._get("expert_count", 0):
            raise self._unsupported("a mixture of experts")
        if self._get("attention.sliding_window", 0):
            raise self._unsupported("sliding-window attention")
        if self._get("attention.causal", True) is not True:
            raise self._unsupported("attention that is not causal")

    def _add_biases(self, config: dict[str, Any]) -> None:
        attention, mlp = (("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down"))
        for key, stems, known in (
            ("attention_bias", attention, self._architecture.optional_biases),
            ("mlp_bias", mlp, self._architecture.optional_mlp_biases),
        ):
            if known:
                config[key] = any(f"blk.0.{stem}.bias" in self._header.tensors for stem in stems)

    def _scaling(
        self, rope_freqs: NDArray[np.float32] | None, theta: float, head_dim: int, context: int
    ) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type", "linear")  # what llama.cpp assumes
        # llama.cpp takes a factor of 0 for 1, and knows an older key.
        factor = self._float("rope.scaling.factor", self._float("rope.scale_linear", 0.0, least=0), least=0) or 1.0
        if kind == "none" or (kind == "linear" and factor == 1):
            return None if rope_freqs is None else self._explicit(rope_freqs, theta, head_dim, context)
        if rope_freqs is not None:
            raise self._unsupported(f"{ROPE_FREQS} together with rope scaling {kind!r}")
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            return self._yarn(factor, context)
        raise self._unsupported(f"rope scaling {kind!r}")

    def _yarn(self, factor: float, context: int) -> dict[str, Any]:
        # llama.cpp multiplies its own default by the file's factor; Transformers' key replaces the default. In these
        # architectures it reads none of yarn_attn_factor, _ext_factor, _beta_fast, _beta_slow and _log_multiplier.
        default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": self._size("rope.scaling.original_context_length", context),
            "attention_factor": default * self._float("rope.scaling.attn_factor", 1.0, least=0),
        }

    def _explicit(
        self, factors: NDArray[np.float32], theta: float, head_dim: int, context: int
    ) -> dict[str, Any] | None:
        if factors.shape != (head_dim // 2,):
            raise self._error(f"{ROPE_FREQS} has shape {factors.shape}. Expected ({head_dim // 2},)")
        if not np.isfinite(factors).all() or factors.min() <= 0:
            raise self._error(f"{ROPE_FREQS} holds factors that are not positive")
        if np.all(factors == 1):
            return None
        largest = _plain_float(factors.max())
        guess = _llama3_factors(theta, head_dim, largest)
        if np.abs(factors / guess - 1).max() <= _SAME_FACTOR:
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": _LLAMA3_CONTEXT,
            }
        # Other parameters, which the factors alone do not tell: this form of Transformers takes them as they stand.
        values = [float(factor) for factor in factors]
        return {
            "rope_type": "longrope",
            "short_factor": values,
            "long_factor": values,
            "attention_factor": 1.0,
            "original_max_position_embeddings": context,
        }

    def _get(self, key: str, default: Any = None) -> Any:
        value = self._header.metadata.get(f"{self._name}.{key}", default)
        if isinstance(value, (list, np.ndarray)):
            raise self._unsupported(f"a list for {self._name}.{key}, one value a block")
        return value

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _MAX_SIZE:
            raise self._error(f"metadata {self._name}.{key} is {_shown(value)}. Expected a positive whole number")
        return value

    def _float(self, key: str, default: float | None = None, *, least: float = -math.inf) -> float:
        value = self._get(key, default)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < least:
            raise self._error(f"metadata {self._name}.{key} is {_shown(value)}. Expected a number from {least:g} on")
        # Without the digits that float32 does not have: 1e-05 and not 9.999999747378752e-06.
        return _plain_float(value)

    def _error(self, what: str) -> FormatError:
        return FormatError(f"{self._header.path}: {what}. The file is damaged or incomplete: convert the model again.")

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._header.path}: not readable without the original. Got {what}, of GGUF architecture {self._name!r}. "
            "Name the original beside the file."
        )


def _llama3_factors(theta: float, head_dim: int, factor: float) -> NDArray[np.float64]:
    # What divides each frequency: 1 for short wavelengths, ``factor`` for long ones, between them a blend of 1 and
    # 1 / factor by position between the two wavelengths.
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    smooth = np.clip(smooth, 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _plain_float(value: float) -> float:
    return float(str(np.float32(value)))


def _shown(value: object) -> str:
    return repr(value)[:80]

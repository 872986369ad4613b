"""Checks a converted, unquantized GGUF file against its checkpoint: what a converter can lose in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.files.schemas import read_json
from ....checkpoint.model.positions import stated_rope
from ....checkpoint.source.checkpoint import Checkpoint
from ....errors import CheckpointError, VerificationError
from ..file.header import GgufHeader
from ..file.split import read_model_header
from .staging import vision_tensors

__all__ = ["check_base"]

_SAME = 1e-5
"""Relative difference of float32 numbers that counts as rounding."""

_TABLE = "token_embd.weight"
_ROPE_FREQS = "rope_freqs.weight"
_NO_SCALING = (None, "default", "none", "proportional", "mrope")


def check_base(path: Path, checkpoint: Checkpoint, *, name: Path | None = None) -> list[str]:
    """Check rotary embeddings, vocabulary, context length, special tokens, chat template and size of a converted model.

    Args:
        path: The GGUF file, unquantized.
        checkpoint: The model that it was made from.
        name: What to call the file; None for ``path``.

    Returns:
        Sentences to show: what llama.cpp does otherwise than Transformers, though the file is what it should be.

    Raises:
        FormatError: The file is no GGUF file.
        VerificationError: The file says something else than the model's config.
    """
    return _Check(read_model_header(Path(path)), checkpoint, name or path).warnings()


class _Check:
    def __init__(self, header: GgufHeader, checkpoint: Checkpoint, name: Path) -> None:
        self._header = header
        self._name = name
        self._checkpoint = checkpoint
        # A model of text and images keeps what concerns the text apart.
        config = checkpoint.config
        self._config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
        self._architecture = header.metadata.get("general.architecture")

    def warnings(self) -> list[str]:
        self._check_rope()
        self._check_vocabulary()
        found = [self._context(), self._token("bos"), self._token("eos"), self._template(), self._size()]
        return [sentence for sentence in found if sentence]

    def _context(self) -> str | None:
        want, got = self._config.get("max_position_embeddings"), self._get("context_length")
        if not isinstance(want, int) or got == want:
            return None
        # llama.cpp takes it for advice, and the converter has reasons of its own: recurrent models have no limit.
        return f"The file's context length is {got}, config.json has {want}: the converter decided."

    def _check_rope(self) -> None:
        rope = stated_rope(self._config)
        theta = rope.get("rope_theta")
        # llama.cpp takes 10000 where the file says nothing. Hunyuan's alpha is a part of the file's base.
        if (
            isinstance(theta, int | float)
            and not rope.get("alpha")
            and not _near(self._get("rope.freq_base", 10000.0), theta)
        ):
            raise self._error("rope.freq_base", self._get("rope.freq_base"), theta)
        kind = rope.get("rope_type")
        if kind == "llama3":
            self._llama3(rope)
            return
        if kind == "linear":
            self._scaling("linear", rope, "factor", "factor")
            return
        if kind == "yarn":
            self._scaling("yarn", rope, "factor", "factor")
            self._scaling("yarn", rope, "original_context_length", "original_max_position_embeddings")
            return
        stored = self._get("rope.scaling.type")
        if kind in ("longrope", "su"):
            # In some architectures the factors alone say it.
            if stored not in ("longrope", None) or not any("rope_factors" in name for name in self._header.tensors):
                raise self._error("rope scaling", stored, f"{kind} with tensors of factors")
        elif kind in _NO_SCALING and stored not in (None, "none"):
            raise self._error("rope.scaling.type", stored, "none")

    def _llama3(self, rope: Mapping[str, Any]) -> None:
        tensor = self._header.tensors.get(_ROPE_FREQS)
        if tensor is None or tensor.type.name != "F32":
            raise self._error(_ROPE_FREQS, "no such tensor", "the factors of rope_type llama3, as F32")
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset_bytes)
            got = torch.frombuffer(bytearray(file.read(tensor.size_bytes)), dtype=torch.float32)
        want = _llama3_factors(rope, 2 * got.numel())
        if not torch.allclose(got, want, rtol=_SAME, atol=0):
            worst = int(((got - want) / want).abs().argmax())
            raise self._error(f"{_ROPE_FREQS}[{worst}]", float(got[worst]), float(want[worst]))

    def _scaling(self, kind: str, rope: Mapping[str, Any], key: str, config_key: str) -> None:
        if self._get("rope.scaling.type") != kind:
            raise self._error("rope.scaling.type", self._get("rope.scaling.type"), kind)
        want = rope.get(config_key)
        got = self._get(f"rope.scaling.{key}")
        if isinstance(want, int | float) and not _near(got, want):
            raise self._error(f"rope.scaling.{key}", got, want)

    def _check_vocabulary(self) -> None:
        # llama.cpp does not load a file in which the two differ.
        tokens, table = self._header.metadata.get("tokenizer.ggml.tokens"), self._header.tensors.get(_TABLE)
        if tokens is not None and table is not None and len(tokens) != table.shape[0]:
            raise self._error("number of tokens", len(tokens), table.shape[0], by=_TABLE)

    def _token(self, which: str) -> str | None:
        want = self._config.get(f"{which}_token_id")
        known = want if isinstance(want, list) else [want]
        got = self._header.metadata.get(f"tokenizer.ggml.{which}_token_id")
        # Not an error: the tokenizer's files may rightly say something else than config.json.
        if want is not None and got not in known:
            return (
                f"The file's {which.upper()} token is {got}, config.json has {want}: the tokenizer's own files decided."
            )
        return None

    def _template(self) -> str | None:
        directory = self._checkpoint.directory
        has = (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file()
        if not has and (directory / "tokenizer_config.json").is_file():
            settings = read_json(self._checkpoint.file("tokenizer_config.json"), CheckpointError)
            has = bool(settings.get("chat_template"))
        if has and "tokenizer.chat_template" not in self._header.metadata:
            return "The model has a chat template, the GGUF file has none: chat programs will use another one."
        return None

    def _size(self) -> str | None:
        made = [name for name in self._header.tensors if name == _ROPE_FREQS or "rope_factors" in name]
        got = sum(math.prod(tensor.shape) for tensor in self._header.tensors.values())
        got -= sum(math.prod(self._header.tensors[name].shape) for name in made)
        want = self._checkpoint.parameter_count
        head = "lm_head.weight"
        tied = head in self._checkpoint.names and "output.weight" not in self._header.tensors
        if tied:
            want -= math.prod(self._checkpoint.shape(head))
        # What sees images goes into a file of its own.
        want -= sum(math.prod(self._checkpoint.shape(name)) for name in vision_tensors(self._checkpoint).values())
        if got == want:
            return None
        return f"The GGUF file has {got} weights, the model has {want}: the converter left parts out, or added some."

    def _get(self, key: str, default: Any = None) -> Any:
        return self._header.metadata.get(f"{self._architecture}.{key}", default)

    def _error(self, what: str, got: Any, expected: Any, *, by: str = "config.json") -> VerificationError:
        return VerificationError(
            f"{self._name}: wrong {what}. Got {got}. Expected {expected} from {by}. Try another version "
            "of llama.cpp's converter."
        )


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Return what each rotary frequency is divided by, float32, shape (head_dim / 2,); the formula of Llama 3.1."""
    theta, factor = float(rope.get("rope_theta") or 10000.0), float(rope.get("factor", 8.0))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    context = float(rope.get("original_max_position_embeddings", 8192))
    factors = []
    for index in range(0, head_dim, 2):
        turns = context / (2 * math.pi * theta ** (index / head_dim))
        smooth = float(turns > high) if high <= low else min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _near(got: Any, want: float) -> bool:
    return isinstance(got, int | float) and math.isclose(got, want, rel_tol=_SAME)

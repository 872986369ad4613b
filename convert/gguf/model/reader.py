"""A GGUF file read back as the model that it decodes to, with Transformers' names and order of rows."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....checkpoint.equalized.view import equalized_as
from ....checkpoint.source.checkpoint import TensorSource
from ....errors import CheckpointError, FormatError, UnsupportedModelError
from ....measure.text.chat_template import ChatTemplate
from ...model import Description, QuantizedModel
from ..file.describe import describe_gguf
from ..file.header import GgufHeader, GgufTensor
from ..file.metadata import EQUALIZED_KEY, MAP_KEY, SPANS_KEY
from ..file.roles import Role, layer_of, role_of, trimmed
from ..file.split import model_digest, read_model_header
from ..file.values import FLOATS, read_values
from ..rows.rowmap import RowMap
from ..rows.text import map_from_text
from .config import config_from_metadata
from .names import ROPE_FREQS, architecture_of, hf_name, row_order, tensor_shapes

__all__ = ["GgufModel"]


class GgufModel(QuantizedModel):
    """A model in one GGUF file, read lazily; nothing stays open, so it may be pickled.

    Of a few architectures the file itself tells the config and what its tensors are called; of the others it is a model
    only beside its original: ``beside``.
    """

    format: ClassVar[str] = "gguf"
    engines: ClassVar[tuple[str, ...]] = ("llama.cpp",)

    def __init__(self, header: GgufHeader, config: dict[str, Any] | None, reason: str = "") -> None:
        """Hold checked parts; use ``GgufModel.open`` to make them from a file.

        Args:
            header: What stands before the file's data.
            config: config.json of the model; None where the file does not tell it.
            reason: Why not, as a message.
        """
        self._header = header
        self._config = config
        self._reason = reason

    @classmethod
    def open(cls, path: Path) -> GgufModel:
        """Read what stands before the data; check that it is a whole model, as far as the file tells.

        Args:
            path: A GGUF file, or the first of several.

        Raises:
            FormatError: The file is damaged, or tensors are missing, unknown or of wrong shapes.
        """
        header = read_model_header(Path(path))
        rope = header.tensors.get(ROPE_FREQS)
        if rope is not None and rope.type.name != "F32":
            raise FormatError(f"{path}: {ROPE_FREQS} is of type {rope.type.name}. Expected F32. Convert it again.")
        try:
            config = config_from_metadata(header, read_values(rope).numpy() if rope else None)
        except UnsupportedModelError as cause:
            return cls(header, None, str(cause))
        _check_tensors(header, tensor_shapes(architecture_of(header.metadata["general.architecture"]), config))
        return cls(header, config)

    def beside(self, original: TensorSource) -> QuantizedModel:
        """See ``QuantizedModel``: itself where the file tells all; else with the original's config and norms."""
        from .mapped import MappedGguf  # noqa: PLC0415 - a kind of this class

        version = self._header.metadata.get(EQUALIZED_KEY)
        return MappedGguf(self._header, equalized_as(original, version, self.path)) if self._config is None else self

    @property
    def stands_alone(self) -> bool:
        """Whether it is a model without its original."""
        return self._config is not None

    @cached_property
    def own_map(self) -> RowMap | None:
        """The map of rows that it says its matrices have; None if it does not.

        Raises:
            FormatError: It is damaged, or of other tensors.
        """
        text = self._header.metadata.get(MAP_KEY)
        if text is None:
            return None
        rows = map_from_text(text, f"{self.path}: {MAP_KEY}")
        if not rows.fits({name: each.shape for name, each in self._header.tensors.items()}):
            raise FormatError(f"{self.path}: the map of rows is of other tensors than the file's. Make the file again.")
        return rows

    @cached_property
    def _places(self) -> dict[str, GgufTensor]:
        # By name in Transformers.
        self._require_alone()
        return {hf_name(name) or name: info for name, info in self._header.tensors.items() if name != ROPE_FREQS}

    def _require_alone(self) -> dict[str, Any]:
        if self._config is None:
            raise UnsupportedModelError(self._reason)
        return self._config

    @property
    def path(self) -> Path:
        """The file, or the first of several."""
        return self._header.path

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or all parts."""
        return tuple(each.path for each in self._header.files)

    @property
    def header(self) -> GgufHeader:
        """Metadata, and the tensors as they stand in the file."""
        return self._header

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the model, rebuilt from the metadata; not to be modified.

        Raises:
            UnsupportedModelError: The file does not tell it.
        """
        return self._require_alone()

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors, as Transformers has them."""
        return frozenset(self._places)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding: only if no head is stored."""
        return bool(self.config["tie_word_embeddings"])

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self._header.file_bytes

    @property
    def parameter_count(self) -> int:
        """Number of weights; a tied head does not count again."""
        return sum(math.prod(info.shape) for name, info in self._header.tensors.items() if name != ROPE_FREQS)

    @property
    def matrix_dtype(self) -> str | None:
        """Dtype that most of its matrices are stored in; None if a tensor is quantized."""
        tensors = self._header.tensors.values()
        if any(info.type.quantized for info in tensors):
            return None
        # Vectors are float32 in any file: it is the matrices that tell files apart.
        (name, _), *_ = Counter(info.type.name for info in tensors if len(info.shape) > 1).most_common(1)
        return str(FLOATS[name]).removeprefix("torch.")

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text; None if it does not say."""
        return None if (spans := self._header.metadata.get(SPANS_KEY)) is None else str(spans)

    def chat_template(self) -> ChatTemplate | None:
        """Return the chat template that the file holds; None if it holds none."""
        return _template(self._header)

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the model, made of the whole file as :attr:`Checkpoint.fingerprint` is.

        Raises:
            FormatError: The file cannot be read, or changes meanwhile.
        """
        return model_digest(self._header)[:32]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions without loading it.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        return self.stored(name).shape

    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every matrix by its name in the file, in model order."""
        tensors = {name: each for name, each in self._header.tensors.items() if len(trimmed(each.shape)) > 1}
        return {n.removesuffix(".weight"): tensors[n].type.bits_per_weight for n in sorted(tensors, key=_model_order)}

    def describe(self) -> Description:
        """Return what is in it."""
        return describe_gguf(self._header)

    def stored(self, name: str) -> GgufTensor:
        """Return what is known of a tensor without loading it.

        Args:
            name: Its name in Transformers.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        if name not in self._places:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing. Got {len(self._places)} others. Get the model again."
            )
        return self._places[name]

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor, put its rows into Transformers' order, and check its values.

        Args:
            name: Its name in Transformers.

        Returns:
            float32, float16 or bfloat16 if it is stored so, and float32 if it is quantized; on the CPU, in memory of
            its own.

        Raises:
            CheckpointError: There is no tensor of that name.
            FormatError: The file is shorter than it was, the type cannot be decoded, or a value is NaN or infinite.
        """
        values = read_values(self.stored(name))
        order = row_order(name, architecture_of(self._header.metadata["general.architecture"]), self.config)
        if order is None:
            return values
        return torch.empty_like(values).index_copy_(0, order, values)


def _check_tensors(header: GgufHeader, shapes: dict[str, tuple[int, ...]]) -> None:
    seen: dict[str, str] = {}
    for name, info in header.tensors.items():
        if name == ROPE_FREQS:
            continue
        ours = hf_name(name)
        if ours is None or ours not in shapes:
            raise FormatError(
                f"{header.path}: tensor {name!r} does not belong to architecture "
                f"{header.metadata['general.architecture']!r} with this metadata. Convert the model again."
            )
        if info.type.name not in FLOATS and not info.type.quantized:
            raise FormatError(
                f"{header.path}: tensor {name!r} is of type {info.type.name}. Expected floating point."
                " The file is damaged: make it again."
            )
        if info.shape != shapes[ours]:
            raise FormatError(
                f"{header.path}: tensor {name!r} has shape {info.shape}. Expected {shapes[ours]} from the metadata. "
                "Convert the model again."
            )
        seen[ours] = name
    missing = sorted(shapes.keys() - seen.keys())
    if missing:
        raise FormatError(
            f"{header.path}: {len(missing)} tensors are missing, the first {missing[0]!r}. The file is incomplete: "
            "convert the model again."
        )


def _model_order(name: str) -> tuple[int, int, str]:
    # The embeddings, the blocks, what follows them.
    layer = layer_of(name)
    rank = 1 if layer >= 0 else 0 if role_of(name) is Role.EMBEDDING else 2
    return rank, layer, name


def _template(header: GgufHeader) -> ChatTemplate | None:
    metadata = header.metadata
    source, tokens = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(source, str):
        return None
    ids = {kind: metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    known = dict(enumerate(tokens)) if isinstance(tokens, list) else {}
    named = {f"{kind}_token": known[at] for kind, at in ids.items() if isinstance(at, int) and at in known}
    return ChatTemplate(source, named)

"""A GGUF file as llama.cpp sees it, of whatever architecture: what its header says, no more is needed to run it."""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ....checkpoint.model.names import model_order
from ....errors import CheckpointError
from ...model import Description, QuantizedModel
from ..file.describe import describe_gguf
from ..file.header import GgufHeader, GgufTensor, is_gguf
from ..file.metadata import SPANS_KEY
from ..file.split import model_digest, read_model_header
from ..file.values import read_values

__all__ = ["GgufFile", "stored_model"]

_BLOCK = re.compile(r"blk\.(?=\d)")
_TABLE = "token_embd.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GgufFile(QuantizedModel):
    """A model in one GGUF file, with the tensors that stand in it.

    Blocks are called ``model.layers.N``, as in most models; what is in them, and beside them, as llama.cpp calls it.
    """

    format: ClassVar[str] = "gguf"
    engines: ClassVar[tuple[str, ...]] = ("llama.cpp",)

    def __init__(self, header: GgufHeader) -> None:
        """Hold a header; use ``GgufFile.open`` to read it.

        Args:
            header: What stands before the file's data.
        """
        self._header = header
        self._places = {_BLOCK.sub("model.layers.", name): tensor for name, tensor in header.tensors.items()}

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read what stands before the data.

        Args:
            path: A GGUF file, or the first of several.

        Raises:
            FormatError: A file is damaged, or a part is missing.
        """
        return cls(read_model_header(Path(path)))

    @property
    def path(self) -> Path:
        """The file."""
        return self._header.path

    @property
    def config(self) -> dict[str, Any]:
        """Of config.json what is called the same everywhere: sizes of vocabulary and context."""
        table = self._header.tensors.get(_TABLE)
        context = self._header.metadata.get(f"{self._header.metadata.get('general.architecture')}.context_length")
        return {"vocab_size": None if table is None else table.shape[0], "max_position_embeddings": context}

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the model, made of the whole file.

        Raises:
            FormatError: The file cannot be read, or changes meanwhile.
        """
        return model_digest(self._header)[:32]

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._places)

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self._header.file_bytes

    @property
    def matrix_dtype(self) -> str | None:
        """Dtype that most of its matrices are stored in; None if a tensor is quantized."""
        tensors = self._places.values()
        if any(tensor.type.quantized for tensor in tensors):
            return None
        # Vectors are float32 in any file: it is the matrices that tell files apart.
        (name, _), *_ = Counter(tensor.type.name for tensor in tensors if len(tensor.shape) > 1).most_common(1)
        return _DTYPES.get(name)

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text; None if it does not say."""
        spans = self._header.metadata.get(SPANS_KEY)
        return None if spans is None else str(spans)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes of a tensor's dimensions.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        return self._stored(name).shape

    def tensor(self, name: str) -> Tensor:
        """Decode one tensor, rows and columns as they stand; see ``read_values``."""
        return read_values(self._stored(name))

    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every matrix, in model order."""
        names = sorted((x for x in self.names if x.endswith(".weight") and len(self.shape(x)) > 1), key=model_order)
        return {name.removesuffix(".weight"): self._places[name].type.bits_per_weight for name in names}

    def describe(self) -> Description:
        """Return what is in it."""
        return describe_gguf(self._header)

    def _stored(self, name: str) -> GgufTensor:
        if name not in self._places:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing. Got {len(self._places)} others. Get the model again."
            )
        return self._places[name]


def stored_model(path: Path) -> GgufFile | None:
    """Return what the header of a file says of a model that nothing here decodes; None if it is no GGUF file.

    Raises:
        FormatError: The file is damaged.
    """
    return GgufFile.open(path) if is_gguf(path) else None

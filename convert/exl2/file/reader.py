"""An EXL2 directory read back: as integers, or as the dense float16 model that it decodes to."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ....checkpoint.files.safetensors_file import HeaderEntry
from ....checkpoint.files.schemas import read_json
from ....checkpoint.model.config import complete_config
from ....checkpoint.model.families import is_known
from ....checkpoint.model.names import config_features, head_names, is_linear, model_order
from ....checkpoint.source.checkpoint import Checkpoint, TensorSource, embedding_rows
from ....checkpoint.source.hub import confined_file
from ....errors import CheckpointError, ShapeError
from ...model import Description, QuantizedModel
from ..readers.names import HfNames
from .config import dense_config
from .describe import describe_exl2, stored_sizes
from .linear import QuantizedLinear
from .manifest import Manifest, read_manifest
from .store import QUANTIZED_SUFFIXES, check_stored, linear_from_tensors
from .tensors import MARK, StoredTensors

__all__ = ["Exl2Model"]

# `q_perm` and `q_group_map` may be stored too; readers compute them anew.
_HIDDEN_SUFFIXES = (*QUANTIZED_SUFFIXES, "q_perm", "q_group_map")


class Exl2Model(QuantizedModel):
    """A quantized model on disk, read lazily; nothing stays open, so it may be pickled.

    Every quantized linear is seen as its decoded float16 ``<name>.weight``.

    Attributes:
        stored: The tensors as they are stored.
    """

    format: ClassVar[str] = "exl2"

    def __init__(self, stored: StoredTensors, config: dict[str, Any]) -> None:
        """Hold checked parts; use ``Exl2Model.open`` to make them from a directory.

        Args:
            stored: The directory's tensors.
            config: Parsed ``config.json``.
        """
        self._stored_config = config
        self.stored = stored
        self._linears = stored.linears
        hidden = {f"{linear}.{suffix}" for linear in self._linears for suffix in _HIDDEN_SUFFIXES}
        # If both forms of a linear are stored, readers take the quantized one.
        self._names = frozenset(stored.entries.keys() - hidden | {f"{linear}.weight" for linear in self._linears})

    @classmethod
    def open(cls, directory: Path) -> Exl2Model:
        """Read config.json and the headers of all safetensors files.

        Args:
            directory: A local EXL2 directory.

        Raises:
            FormatError: No tensor is quantized, one is stored twice or not as the format demands, or a file is damaged.
            ShapeError: A tensor of a quantized linear does not have the shape that the config or the others demand.
            CheckpointError: config.json is missing or damaged, or a file leads outside the directory.
        """
        directory = Path(directory)
        config = read_json(confined_file(directory, "config.json"), CheckpointError)
        model = cls(StoredTensors(directory), config)
        _check_linears(model)
        return model

    @property
    def path(self) -> Path:
        """The model directory."""
        return self.stored.directory

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the dense model that this one decodes to; not to be modified.

        It has no ``quantization_config``, and ``tie_word_embeddings`` says what :attr:`tied_embeddings` says.
        """
        return dense_config(self._complete_config, tied_embeddings=self.tied_embeddings)

    @cached_property
    def _complete_config(self) -> dict[str, Any]:
        if not is_known(self._stored_config):
            return self._stored_config
        path = self.path / "config.json"
        return complete_config(self._stored_config, path, embedding_rows=embedding_rows(self))

    @property
    def stored_config(self) -> dict[str, Any]:
        """config.json as it stands in the directory; not to be modified."""
        return self._stored_config

    @cached_property
    def fingerprint(self) -> str:
        """Identifies config and weights, made as :attr:`Checkpoint.fingerprint` is."""
        return Checkpoint(self.path, self._stored_config, self.stored.files).fingerprint

    @cached_property
    def manifest(self) -> Manifest | None:
        """What the model says of itself; None if it is not bpwise's.

        Raises:
            FormatError: It is damaged, or of another version.
        """
        return read_manifest(self.path)

    @property
    def predicted_damage_nats(self) -> float | None:
        """Damage that its plan predicted, nats per token; None if it does not say."""
        return None if self.manifest is None else self.manifest.provenance.predicted_damage_nats

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text; None if it does not say."""
        return None if self.manifest is None else self.manifest.provenance.calibration_spans

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors of the dense model."""
        return self._names

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the quantized linears, without ``.weight``, sorted."""
        return self._linears

    @property
    def float16_linears(self) -> tuple[str, ...]:
        """Names of the decoder's linears that are stored unquantized, without ``.weight``, in model order."""
        blocks = {f"{head}.layers." for head, found, _ in (x.partition(".layers.") for x in self._linears) if found}
        weights = {name.removesuffix(".weight") for name in self._names if name.endswith(".weight")}
        found = (name for name in weights - set(self._linears) if is_linear(name) and name.startswith(tuple(blocks)))
        return tuple(sorted(found, key=model_order))

    @property
    def file_bytes(self) -> int:
        """Size of all safetensors files, headers included, in bytes."""
        return sum(header.file_bytes for header in self.stored.files.values())

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding: only if no head is stored, quantized or not."""
        if head_names(self._names):
            return False
        return self._stored_config.get("tie_word_embeddings") is not False

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the dense model without decoding it.

        Raises:
            CheckpointError: There is no tensor of that name.
            FormatError: A part of the quantized linear is missing.
        """
        linear, _, part = name.rpartition(".")
        if linear in self._linears and part in ("weight", "bias"):
            self._require(name)
            if part == "bias":
                return (self.out_features(linear),)
            return (self.out_features(linear), *self.stored.entry(f"{linear}.q_invperm").shape)
        return self._require(name).shape

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the dense model, on the CPU, in memory of its own.

        Args:
            name: Full name, such as ``model.layers.0.mlp.up_proj.weight``.

        Returns:
            The decoded weight, float16, shape (out, K), or the bias without padding, float16, shape (out,),
            of a quantized linear; any other tensor as stored.

        Raises:
            CheckpointError: There is no tensor of that name.
            FormatError: What is stored breaks the rules of the format.
        """
        linear, _, part = name.rpartition(".")
        if linear in self._linears and part == "weight":
            return self.linear(linear).dequantize()
        self._require(name)
        stored = self.stored.read(name)
        if linear in self._linears and part == "bias":
            return stored[: self.out_features(linear)].clone()
        return stored

    def linear(self, name: str) -> QuantizedLinear:
        """Return one quantized linear as integers, without padding.

        Raises:
            CheckpointError: There is no quantized linear of that name.
            FormatError: What is stored breaks the rules of the format.
            ShapeError: A tensor does not have the shape that the config or the other tensors demand.
        """
        if name not in self._linears:
            raise CheckpointError(
                f"{self.path}: no quantized linear {name!r}. Got {len(self._linears)} others. Get the model again."
            )
        parts = [f"{name}.{suffix}" for suffix in (*QUANTIZED_SUFFIXES, "bias")]
        tensors = {part: self.stored.read(part) for part in parts if part in self.stored.entries}
        return linear_from_tensors(name, tensors, self.out_features(name))

    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every linear, padding and overheads included, in model order."""
        return {name: bits / weights for name, (bits, weights) in stored_sizes(self).items()}

    def as_transformers(self) -> TensorSource:
        """Return the dense model with the names and the config that Transformers loads."""
        return HfNames(self)

    def describe(self) -> Description:
        """Return what is in it."""
        return describe_exl2(self)

    def out_features(self, linear: str) -> int:
        """Return the number of output channels of a quantized linear, without padding."""
        # A name that the table does not know is taken to have no padding.
        known = config_features(linear, self._complete_config)[1]
        shape = self.stored.entry(f"{linear}{MARK}").shape
        return known if known is not None else int(shape[-1]) if shape else 0

    def _require(self, name: str) -> HeaderEntry:
        if name not in self._names:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing. Got {len(self._names)} others. Get the model again."
            )
        linear, _, part = name.rpartition(".")
        if part == "weight" and linear in self._linears:
            return self.stored.entry(f"{linear}{MARK}")
        return self.stored.entry(name)


def _check_linears(model: Exl2Model) -> None:
    # What the headers tell already: evaluation would find it out in its middle only.
    stored = {name: (entry.dtype, entry.shape) for name, entry in model.stored.entries.items()}
    for linear in model.linears:
        check_stored(linear, stored, model.out_features(linear))
        (rows,), expected = stored[f"{linear}.q_invperm"][1], config_features(linear, model.stored_config)[0]
        if expected is not None and rows != expected:
            raise ShapeError(linear, "q_invperm", got=(rows,), expected=(expected,))

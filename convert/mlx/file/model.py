"""An MLX directory read back: as the dense model that it decodes to."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....checkpoint.equalized.view import EQUALIZED, equalized_as
from ....checkpoint.files.safetensors_file import SafetensorsHeader
from ....checkpoint.files.schemas import read_json
from ....checkpoint.model.names import model_order
from ....checkpoint.source.checkpoint import Checkpoint, TensorSource
from ....checkpoint.source.hub import confined_file
from ....checkpoint.source.index import weight_headers
from ....errors import CheckpointError, FormatError
from ...model import QuantizedModel
from ...overlaid import Overlaid
from ..grid.packing import PARTS, decode_packed
from ..grid.schemes import BITS, GROUPS, Scheme
from .layout import Layout, StoredTensor
from .manifest import Manifest, read_manifest

__all__ = ["CONFIG_KEYS", "MlxModel"]

CONFIG_KEYS = ("quantization", "quantization_config")
"""Of config.json: what mlx-lm reads of quantization, and the same again for the Hub."""

_GET_AGAIN = "Get or make the model again."


class MlxModel(QuantizedModel):
    """A quantized model on disk, read lazily; nothing stays open.

    Linears have the names of Transformers, as the manifest of bpwise's own models tells them. Models of others are
    taken to have the same names as their originals.
    """

    format: ClassVar[str] = "mlx"

    def __init__(self, stored: Checkpoint, manifest: Manifest | None) -> None:
        """Hold checked parts; use ``MlxModel.open`` to make them from a directory.

        Args:
            stored: The directory's config and tensors.
            manifest: What it says of itself; None if it is not bpwise's.

        Raises:
            FormatError: config.json or a tensor is not as mlx-lm reads it.
        """
        self.stored = stored
        self.manifest = manifest
        self.schemes = _schemes(stored)
        self.layout = _own_layout(stored, self.schemes) if manifest is None else manifest.layout
        if manifest is not None:
            _check_layout(stored, self.schemes, self.layout)
        self._places = {
            linear: (name, first, count)
            for name, tensor in self.layout.tensors.items()
            for linear, first, count in _spans(tensor)
        }
        self._sources = {x.source: name for name, x in self.layout.tensors.items() if x.source is not None}
        self._last: tuple[str, Tensor] | None = None

    @classmethod
    def open(cls, directory: Path) -> MlxModel:
        """Read config.json and the headers of all safetensors files.

        Args:
            directory: A local MLX directory.

        Raises:
            FormatError: What is stored is not what mlx-lm reads.
            CheckpointError: config.json is missing or damaged, or a file leads outside the directory.
        """
        directory = Path(directory)
        config = read_json(confined_file(directory, "config.json"), CheckpointError)
        headers: dict[str, SafetensorsHeader] = weight_headers(directory)
        return cls(Checkpoint(directory, config, headers), read_manifest(directory))

    @property
    def path(self) -> Path:
        """The model directory."""
        return self.stored.directory

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the dense model; not to be modified."""
        return {key: value for key, value in self.stored.config.items() if key not in CONFIG_KEYS}

    @property
    def fingerprint(self) -> str:
        """Identifies config and weights."""
        return self.stored.fingerprint

    @property
    def run(self) -> str | None:  # type: ignore[override]  # told by a file
        """The run that made it; None if that was not bpwise's."""
        return None if self.manifest is None else self.manifest.provenance.run

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all tensors of the dense model that it holds."""
        return frozenset((*(f"{linear}.weight" for linear in self._places), *self._sources))

    @property
    def file_bytes(self) -> int:
        """Size of all safetensors files, headers included, in bytes."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def predicted_damage_nats(self) -> float | None:
        """Damage that its plan predicted, nats per token; None if it does not say."""
        return None if self.manifest is None else self.manifest.provenance.predicted_damage_nats

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text; None if it does not say."""
        return None if self.manifest is None else self.manifest.provenance.calibration_spans

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the dense model without decoding it."""
        place = self._place(name)
        if place is None:
            return self.stored.shape(self._stored_name(name))
        at, _, count = place
        return (count, self.layout.tensors[at].shape[-1])

    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the dense model, on the CPU, in memory of its own: a decoded weight in float32.

        Raises:
            CheckpointError: There is no tensor of that name.
        """
        place = self._place(name)
        if place is None:
            return self.stored.tensor(self._stored_name(name))
        at, first, count = place
        return self.decoded(at).flatten(0, -2)[first : first + count].clone()

    def decoded(self, name: str) -> Tensor:
        """Return a tensor by its name in mlx-lm, decoded if it is quantized; that of the last call is kept."""
        scheme = self.schemes.get(name)
        if scheme is None:
            return self.stored.tensor(name)
        if self._last is None or self._last[0] != name:
            module = name.removesuffix(".weight")
            words = self.stored.stored(name)
            scales, biases = (self.stored.tensor(f"{module}.{part}") for part in PARTS[1:])
            values = decode_packed(words.flatten(0, -2), scales.flatten(0, -2), biases.flatten(0, -2), scheme.bits)
            self._last = name, values.view(*words.shape[:-1], values.shape[1])
        return self._last[1]

    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every linear, overheads included, in model order."""
        found = {}
        for linear, (name, _, _) in sorted(self._places.items(), key=lambda item: model_order(item[0])):
            scheme, item_bytes = self.schemes.get(name), self.layout.tensors[name].item_bytes
            found[linear] = 8.0 * item_bytes if scheme is None else scheme.bits_per_weight(item_bytes)
        return found

    def beside(self, original: TensorSource) -> QuantizedModel:
        """Return the model with its original's names, and what mlx-lm changes before it is quantized from there."""
        version = None if self.manifest is None else self.manifest.provenance.changes.get(EQUALIZED)
        return _Beside(self, equalized_as(original, version, self.path))

    def reader(self, linear: str) -> Callable[[], Tensor]:
        """Return what reads a linear's weight."""
        return partial(self.tensor, f"{linear}.weight")

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears that it holds, and of the token embeddings."""
        return tuple(self._places)

    def _place(self, name: str) -> tuple[str, int, int] | None:
        return self._places.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _stored_name(self, name: str) -> str:
        if name not in self._sources:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is not in the file as it was. Got {len(self.names)} others. Give the "
                "original model as well."
            )
        return self._sources[name]


class _Beside(Overlaid, MlxModel):
    """An MLX model as it is compared with its original."""

    def __init__(self, model: MlxModel, original: TensorSource) -> None:
        MlxModel.__init__(self, model.stored, model.manifest)
        Overlaid.__init__(self, original, {linear: model.reader(linear) for linear in model.linears})


def _spans(tensor: StoredTensor) -> list[tuple[str, int, int]]:
    # Name, first row and number of rows of every linear in a tensor.
    found, first = [], 0
    for linear, count in zip(tensor.linears, tensor.outputs, strict=True):
        found.append((linear, first, count))
        first += count
    return found


def _schemes(stored: Checkpoint) -> dict[str, Scheme]:
    # Of every quantized weight, by its name.
    where = stored.directory / "config.json"
    settings = stored.config.get(CONFIG_KEYS[0])
    if not isinstance(settings, dict):
        raise FormatError(f"{where}: quantization is {reprlib.repr(settings)}. Expected an object. {_GET_AGAIN}")
    found = {}
    for scales in sorted(name for name in stored.names if name.endswith(".scales")):
        module = scales.removesuffix(".scales")
        own = settings.get(module, settings)
        name = f"{module}.weight"
        scheme = _scheme(own, f"{where}: quantization of {module}")
        if not {name, f"{module}.biases"} <= stored.names:
            raise FormatError(f"{stored.directory}: {module} lacks its codes or biases. {_GET_AGAIN}")
        _check_shapes(stored, module, scheme)
        found[name] = scheme
    return found


def _scheme(own: Any, where: str) -> Scheme:
    mode = own.get("mode", "affine") if isinstance(own, dict) else None
    bits, group = (own.get(key) for key in ("bits", "group_size")) if isinstance(own, dict) else (None, None)
    if mode != "affine" or type(bits) is not int or bits not in BITS or type(group) is not int or group not in GROUPS:
        raise FormatError(
            f"{where}: not read. Got {reprlib.repr(own)}. Expected affine groups of {', '.join(map(str, GROUPS))} with "
            f"{', '.join(map(str, BITS))} bits: no other mode of MLX. Quantize the original again."
        )
    return Scheme(bits, group)


def _check_shapes(stored: Checkpoint, module: str, scheme: Scheme) -> None:
    words, scales, biases = (stored.info(f"{module}.{part}") for part in PARTS)
    channels = words.shape[-1] * 32 // scheme.bits if words.shape else 0
    fits = (
        words.dtype == torch.uint32
        and scales.dtype.is_floating_point
        and scales.shape == biases.shape
        and len(words.shape) >= 2
        and words.shape[-1] * 32 == channels * scheme.bits
        and scheme.fits(channels)
        and scales.shape == (*words.shape[:-1], channels // scheme.group_size)
    )
    if not fits:
        raise FormatError(
            f"{stored.directory}: {module} is not stored as its scheme {scheme.name} says. Got codes of shape "
            f"{words.shape} and scales of {scales.shape}. {_GET_AGAIN}"
        )


def _dense_shape(stored: Checkpoint, name: str, scheme: Scheme | None) -> tuple[int, ...]:
    shape = stored.shape(name)
    return shape if scheme is None else (*shape[:-1], shape[-1] * 32 // scheme.bits)


def _parts(schemes: Mapping[str, Scheme]) -> set[str]:
    # Scales and biases of all quantized weights.
    return {f"{name.removesuffix('.weight')}.{part}" for name in schemes for part in PARTS[1:]}


def _own_layout(stored: Checkpoint, schemes: Mapping[str, Scheme]) -> Layout:
    # Of a model that does not say what its tensors are made of: each is the original's of the same name.
    tensors = {}
    for name in sorted(stored.names - _parts(schemes), key=model_order):
        scheme = schemes.get(name)
        shape = _dense_shape(stored, name, scheme)
        dtype = str(stored.info(f"{name.removesuffix('.weight')}.scales" if scheme else name).dtype)
        linear = name.removesuffix(".weight") if scheme is not None and len(shape) == 2 else None
        tensors[name] = StoredTensor(
            shape=shape,
            dtype=dtype.removeprefix("torch."),
            linears=() if linear is None else (linear,),
            outputs=() if linear is None else (shape[0],),
            source=name if scheme is None else None,
        )
    return Layout(tensors=tensors)


def _check_layout(stored: Checkpoint, schemes: Mapping[str, Scheme], layout: Layout) -> None:
    unknown = sorted(stored.names - _parts(schemes) - layout.tensors.keys())
    if unknown:
        raise FormatError(f"{stored.directory}: {unknown[0]} is not in bpwise.json. {_GET_AGAIN}")
    for name, tensor in layout.tensors.items():
        shape = _dense_shape(stored, name, schemes.get(name)) if name in stored.names else None
        if shape is None or (shape or (1,)) != tensor.shape:
            raise FormatError(
                f"{stored.directory}: {name} is not as bpwise.json says. Got shape {shape}. Expected {tensor.shape}. "
                f"{_GET_AGAIN}"
            )

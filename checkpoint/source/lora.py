"""A checkpoint merged with a PEFT adapter while it is read: W + s B A.

A and B are an adapter's two thin matrices of a linear, s is alpha / r, or alpha / sqrt(r) of a rank-stabilized one. A
weight-decomposed adapter (DoRA) then gives every output feature the norm that it has stored.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import torch
from torch import Tensor

from ...errors import CheckpointError
from ..files.digests import file_digests
from ..files.safetensors_file import SafetensorsHeader, read_entry, read_header
from ..files.schemas import read_schema
from ..loading.listed import plain_name
from ..model.dtypes import require_finite
from ..model.families import HEAD, composite_of, is_known
from ..model.names import embedding_name, head_name
from .checkpoint import Checkpoint, TensorInfo
from .hub import confined_file
from .language import LanguageModel
from .views import CheckpointView

__all__ = ["LoraView"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "embedding_down",
    "lora_embedding_B": "embedding_up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
"""What the tensors of one module are, by the ends of their names; anything else replaces a tensor of the base."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they are; PiSSA, OLoRA, CorDA and LoftQ replace them."""

_HEAD_WEIGHT = f"{HEAD}.weight"

_Number = TypeVar("_Number", int, float)
_Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Alpha = Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]


class _Refused(msgspec.Struct):
    # Entries of adapter_config.json that change what is computed in a way that is not merged here.
    lora_bias: Any = None
    layer_replication: Any = None
    trainable_token_indices: Any = None
    target_parameters: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: Any = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    monteclora_config: Any = None


class _Settings(_Refused):
    # All that is read of it.
    peft_type: str | None = None
    r: _Rank | None = None
    lora_alpha: _Alpha | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None


@dataclass(frozen=True, slots=True)
class _Low:
    # Names of one module's tensors in the adapter's file, and its scale.
    down: str
    up: str
    magnitude: str | None
    scale: float
    transposed: bool


class LoraView(CheckpointView):
    """A checkpoint with a PEFT adapter merged into its weights.

    Weights are merged in float32 and rounded to the dtype that the base stores them in. An adapter of the output head
    of a tied model gives it a head of its own.
    """

    def __init__(self, base: Checkpoint, adapter: Path) -> None:
        """Read an adapter's config and the header of its weights, and find the place of each of its tensors.

        Args:
            base: The model that the adapter was trained on.
            adapter: Directory with ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT saves them.

        Raises:
            CheckpointError: Files are missing, damaged or pickled, the adapter is of a kind that cannot be merged, or
                it does not fit the base.
        """
        super().__init__(base)
        self._adapter = Path(adapter)
        if not os.path.lexists(self._adapter / _CONFIG):
            got = f"a directory without {_CONFIG}" if self._adapter.is_dir() else "no directory"
            raise CheckpointError(f"{adapter}: no adapter. Got {got}. Check the path.")
        self._settings = read_schema(confined_file(self._adapter, _CONFIG), _Settings, CheckpointError)
        _check_settings(self._settings, self._adapter / _CONFIG)
        if not (self._adapter / _WEIGHTS).exists() and (self._adapter / _PICKLE).exists():
            raise CheckpointError(
                f"{adapter}: pickled weights can run code. Got {_PICKLE}. Expected {_WEIGHTS}. Save the adapter "
                "again with PEFT's save_pretrained, which writes safetensors."
            )
        self._header: SafetensorsHeader = read_header(confined_file(self._adapter, _WEIGHTS), CheckpointError)
        tied = base.tied_embeddings
        self._composite = composite_of(base.config) is not None
        self._base_names = {self._plain(name): name for name in base.names}
        self._head = head_name(base.names) or _HEAD_WEIGHT
        self._own_head = embedding_name(base.names) if tied else None
        self._merged: dict[str, _Low] = {}
        self._replaced: dict[str, str] = {}
        self._find_places()
        if not self._merged and not self._replaced:
            raise CheckpointError(f"{self._where}: no tensors, so there is nothing to merge. Get the adapter again.")
        names = base.names - {self._head} if tied else base.names
        self._names = names | self._changed

    @property
    def directories(self) -> tuple[Path, ...]:
        """The base's directories, and the adapter's."""
        return (*self._base.directories, self._adapter)

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors: the base's, and a head of its own if the adapter has one for a tied model."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits, of the base's fingerprint and all bytes of the adapter."""
        return hashlib.sha256(f"{self._base.fingerprint} {self._digest}".encode()).hexdigest()[:32]

    @property
    def changes(self) -> dict[str, Any]:
        """The base's changes, and the adapter's name and digest."""
        adapter = {"name": self._adapter.resolve().name, "sha256": self._digest}
        return {**self._base.changes, "adapters": [*self._base.changes.get("adapters", []), adapter]}

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it is read, and the base's file that holds it."""
        return self._base.info(self._base_name(name))

    def tensor(self, name: str) -> Tensor:
        """Load one tensor, merged.

        Raises:
            CheckpointError: As ``Checkpoint.tensor``, of the base's tensor or the adapter's.
        """
        where = f"{self._where}: merged tensor {name!r}"
        if name in self._replaced:
            result = self._own(self._replaced[name])
        else:
            result = self._base.tensor(self._base_name(name))
            if name not in self._merged:
                return result
            result = self._merge(result.float(), self._merged[name])
        result = result.to(self.info(name).dtype)
        require_finite(result, where)
        return result

    def entry(self, name: str, index: int) -> Tensor:
        """Load one entry of a tensor's first dimension; see ``Checkpoint.entry``."""
        return super().entry(name, index) if name in self._changed else self._base.entry(self._base_name(name), index)

    @property
    def _changed(self) -> AbstractSet[str]:
        return self._merged.keys() | self._replaced.keys()

    @property
    def _where(self) -> Path:
        return self._adapter / _WEIGHTS

    @cached_property
    def _digest(self) -> str:
        files = [confined_file(self._adapter, name) for name in (_CONFIG, _WEIGHTS)]
        return hashlib.sha256("".join(file_digests(files, CheckpointError)).encode()).hexdigest()

    def _base_name(self, name: str) -> str:
        # The head that a tied model gets of its own begins as the table of embeddings.
        return self._own_head if self._own_head is not None and name == self._head else name

    def _own(self, name: str) -> Tensor:
        return read_entry(confined_file(self._adapter, _WEIGHTS), self._header.entries[name], CheckpointError).float()

    def _merge(self, weight: Tensor, low: _Low) -> Tensor:
        change = self._own(low.up) @ self._own(low.down)
        weight.add_(change.T if low.transposed else change, alpha=low.scale)
        if low.magnitude is not None:
            weight *= (self._own(low.magnitude) / torch.linalg.vector_norm(weight, dim=1))[:, None]
        return weight

    def _plain(self, name: str) -> str:
        return plain_name(name, composite=self._composite) or name

    def _name_in_base(self, name: str) -> str:
        # What the base calls a tensor of the adapter: models with vision have other names in memory than on the Hub.
        plain = self._plain(name)
        if plain in self._base_names or plain == _HEAD_WEIGHT:
            return self._base_names.get(plain, self._head)
        return name if is_known(self._base.config) else LanguageModel(self._base).stored_name(name) or name

    def _find_places(self) -> None:
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for stored in self._header.entries:
            name = stored.removeprefix(_PREFIX)
            role = next((end for end in _ROLES if name.endswith(f".{end}")), None)
            if role is None:
                plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
                self._replace(stored, self._name_in_base(plain))
            else:
                modules[name.removesuffix(f".{role}")][_ROLES[role]] = stored
        for module, parts in modules.items():
            self._merge_at(module, parts)

    def _replace(self, stored: str, name: str) -> None:
        self._require(name, stored)
        self._require_shape(stored, self._header.entries[stored].shape, self._base.shape(self._base_name(name)), name)
        self._replaced[name] = stored

    def _merge_at(self, module: str, parts: Mapping[str, str]) -> None:
        name = self._name_in_base(f"{module}.weight")
        first = next(iter(parts.values()))
        self._require(name, first)
        embedding = "embedding_" if "embedding_down" in parts or "embedding_up" in parts else ""
        expected = {f"{embedding}down", f"{embedding}up"}
        if self._settings.use_dora:
            expected.add("magnitude")
        if parts.keys() != expected:
            raise CheckpointError(
                f"{self._where}: module {module!r} has tensors for {sorted(parts)}. Expected {sorted(expected)}. "
                "The adapter is damaged, or of a kind that cannot be merged."
            )
        # An embedding's matrices make what its table is transposed.
        transposed = bool(embedding) or bool(self._settings.fan_in_fan_out)
        if transposed and "magnitude" in parts:
            raise CheckpointError(
                f"{self._where}: module {module!r} is weight-decomposed (DoRA) and stored transposed, which cannot be "
                "merged here. Merge it with PEFT's merge_and_unload."
            )
        down, up = parts[f"{embedding}down"], parts[f"{embedding}up"]
        config = self._adapter / _CONFIG
        rank = _by_pattern(self._settings.rank_pattern, module, self._settings.r, config)
        alpha = _by_pattern(self._settings.alpha_pattern, module, self._settings.lora_alpha, config)
        if rank is None or alpha is None:
            raise CheckpointError(
                f"{config}: r is {rank!r} and lora_alpha {alpha!r} for {module!r}. Expected a "
                "positive whole number and a number. Get the adapter again."
            )
        shape = self._base.shape(self._base_name(name))
        rows, columns = shape[::-1] if transposed else shape
        self._require_shape(down, self._header.entries[down].shape, (rank, columns), name)
        self._require_shape(up, self._header.entries[up].shape, (rows, rank), name)
        magnitude = parts.get("magnitude")
        if magnitude is not None:
            self._require_shape(magnitude, self._header.entries[magnitude].shape, (rows,), name)
        scale = alpha / (math.sqrt(rank) if self._settings.use_rslora else rank)
        self._merged[name] = _Low(down, up, magnitude, scale, transposed)

    def _require(self, name: str, stored: str) -> None:
        known = name in self._base.names or (name == self._head and self._own_head is not None)
        if not known or not self._base.info(self._base_name(name)).dtype.is_floating_point:
            raise CheckpointError(
                f"{self._where}: tensor {stored!r} belongs to {name!r}, which {self._base.directory} does not have as "
                "weights. The adapter was made for another model: name the one it was trained on."
            )
        if len(self._base.shape(self._base_name(name))) != 2 and "lora_" in stored:
            raise CheckpointError(
                f"{self._where}: tensor {stored!r} is of {name!r}, which is not a matrix. Get the model again."
            )

    def _require_shape(self, stored: str, got: tuple[int, ...], expected: tuple[int, ...], name: str) -> None:
        if got != expected:
            raise CheckpointError(
                f"{self._where}: tensor {stored!r} has a wrong shape. Got {got}. Expected {expected} beside {name!r} "
                f"of {self._base.directory}. The adapter does not belong to this model."
            )


def _check_settings(settings: _Settings, path: Path) -> None:
    if settings.peft_type != "LORA":
        raise CheckpointError(
            f"{path}: the adapter's peft_type is {settings.peft_type!r:.200}. Expected 'LORA': no other kind can be "
            "merged here. Merge it with PEFT's merge_and_unload."
        )
    if settings.bias != "none":
        raise CheckpointError(
            f"{path}: the adapter has biases of its own, bias is {settings.bias!r:.200}. Expected 'none'. Merge it "
            "with PEFT's merge_and_unload."
        )
    start = settings.init_lora_weights
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: the adapter began as {start!r:.200}, which changes the base's weights too. Expected a plain "
            "start. Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )
    for key in _Refused.__struct_fields__:
        if getattr(settings, key):
            raise CheckpointError(
                f"{path}: the adapter has {key} set to {getattr(settings, key)!r:.200}, which cannot be merged here. "
                "Merge it with PEFT's merge_and_unload."
            )


def _by_pattern(
    patterns: Mapping[str, _Number] | None, module: str, default: _Number | None, path: Path
) -> _Number | None:
    # As PEFT's get_pattern_key: the first pattern that the end of a module's name matches.
    for pattern, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, OverflowError, RecursionError) as cause:
            raise CheckpointError(
                f"{path}: {pattern!r:.200} is not a valid pattern ({cause}). Get the adapter again."
            ) from cause
        if found:
            return value
    return default

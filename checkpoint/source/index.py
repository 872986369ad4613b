"""Weight files of a model directory: which they are, and that each tensor lies in one of them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from ...errors import CheckpointError
from ..files.safetensors_file import SafetensorsHeader, read_header
from ..files.schemas import read_json, read_schema
from .hub import confined_file, list_directory

__all__ = ["refuse_adapter", "weight_headers"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def weight_headers(directory: Path) -> dict[str, SafetensorsHeader]:
    """Return the header of every weight file of a model, by its name.

    ``model.safetensors`` is taken first, as in Transformers, then the shards of its index, then a single safetensors
    file of any name. Tensors that a shard holds beyond its index are kept.

    Raises:
        CheckpointError: Files are missing, damaged, contradictory, pickled or outside the directory.
    """
    weight_map: dict[str, str] = {}
    if os.path.lexists(directory / _WEIGHTS):
        shards = [_WEIGHTS]
    elif os.path.lexists(directory / _INDEX):
        weight_map = _read_index(directory)
        shards = sorted(set(weight_map.values()))
    else:
        shards = [_single_weight_file(directory)]
    headers = {shard: read_header(confined_file(directory, shard), CheckpointError) for shard in shards}
    _check_shards(directory, headers, weight_map)
    return headers


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory that holds an adapter and no model.

    Raises:
        CheckpointError: It does; the message names its base model.
    """
    # Some trainers keep a copy of the base's config.json beside an adapter.
    there = {name for name in (_ADAPTER, _ADAPTER_WEIGHTS, _WEIGHTS, _INDEX) if os.path.lexists(directory / name)}
    if _ADAPTER not in there or there & {_WEIGHTS, _INDEX}:
        return
    if os.path.lexists(directory / "config.json") and _ADAPTER_WEIGHTS not in there:
        return
    base = read_json(confined_file(directory, _ADAPTER), CheckpointError).get("base_model_name_or_path")
    raise CheckpointError(
        f"{directory}: a LoRA adapter, not a model. Got {_ADAPTER} without weights of a model. Give the base model"
        f"{f' ({base!r:.200})' if isinstance(base, str) and base else ''} as MODEL, and this directory with --lora."
    )


def _single_weight_file(directory: Path) -> str:
    files = [path.name for path in list_directory(directory)]
    found = [name for name in files if name.endswith(".safetensors") and not name.startswith(".")]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{directory}: unclear weights. Got {len(found)} safetensors files. Expected {_WEIGHTS}, "
            f"{_INDEX} or a single file. Get the index file too."
        )
    pickles = [name for name in files if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{directory}: pickled weights can run code. Got {pickles[0]!r}. Expected safetensors. Convert "
            "the model with Transformers' save_pretrained(safe_serialization=True)."
        )
    raise CheckpointError(
        f"{directory}: no weights. Got no safetensors file. Expected {_WEIGHTS} or {_INDEX}. Get the model again."
    )


def _read_index(directory: Path) -> dict[str, str]:
    path = confined_file(directory, _INDEX)
    weight_map = read_schema(path, _Index, CheckpointError).weight_map
    if not weight_map:
        raise CheckpointError(f"{path}: empty weight_map. Expected names of tensors and files. Get it again.")
    for name, shard in weight_map.items():
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: wrong file for tensor {name!r:.200}. Got {shard!r:.200}. Expected a .safetensors file. "
                "Get it again."
            )
    return weight_map


def _check_shards(directory: Path, headers: dict[str, SafetensorsHeader], weight_map: dict[str, str]) -> None:
    holder: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.entries:
            if name in holder:
                raise CheckpointError(
                    f"{directory}: tensor {name!r} is stored twice. Got {holder[name]} and {shard}. "
                    "Expected one file. Get the model again."
                )
            holder[name] = shard
    for name, shard in weight_map.items():
        if name not in holder:
            raise CheckpointError(
                f"{directory / _INDEX}: the index is stale, or a file is incomplete: tensor {name!r:.200} is missing "
                f"from {shard!r}. Delete its entry from the index if the model needs no such tensor (as an output head "
                "that is tied to the embedding), else get the model again."
            )
        if holder[name] != shard:
            raise CheckpointError(
                f"{directory / _INDEX}: wrong file for tensor {name!r}. Got {shard}. Expected "
                f"{holder[name]}, which holds it. Get the model again."
            )
    if not holder:
        raise CheckpointError(f"{directory}: no weights. Got files without tensors. Get the model again.")

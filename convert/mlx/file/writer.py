"""Writes a quantized model as a directory that mlx-lm loads, one tensor at a time, and proves that it reads back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.carry.carried import copy_side_files
from ....checkpoint.files.atomic import atomic_directory, write_json
from ....checkpoint.files.digests import file_digests
from ....checkpoint.files.schemas import checksummed
from ....checkpoint.files.shards import ShardWriter, tensor_sha256
from ....checkpoint.source.language import LanguageModel
from ....errors import FormatError, VerificationError
from ....progress import Progress
from ...model import Verification
from ..grid.packing import PARTS, decode_packed
from ..grid.schemes import Scheme
from .layout import Layout
from .manifest import MANIFEST_FILE, MANIFEST_VERSION
from .model import CONFIG_KEYS, MlxModel

__all__ = ["mlx_config", "verify_mlx", "write_mlx"]

_DROPPED = ("_name_or_path", "auto_map", "vision_config")
"""Of config.json: paths and code, and what mlx-lm does not run, as mlx-lm leaves it out itself."""

Artifact = Callable[[], Mapping[str, Tensor]]
"""Returns the codes, scales and biases of a linear, as ``MlxRounder`` keeps them."""


def mlx_config(config: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Return the config.json of a quantized model.

    Args:
        config: The original's.
        schemes: Scheme of every quantized weight, by its name in mlx-lm; at least one.
    """
    settings = {
        name.removesuffix(".weight"): {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
        for name, scheme in schemes.items()
    }
    # Every module has an entry of its own; what stands beside them is for programs that look for one number.
    commonest = max(set(schemes.values()), key=lambda scheme: (list(schemes.values()).count(scheme), scheme))
    usual = {"group_size": commonest.group_size, "bits": commonest.bits, "mode": "affine"}
    kept = {key: value for key, value in config.items() if key not in (*CONFIG_KEYS, *_DROPPED)}
    return {**kept, **{key: {**usual, **settings} for key in CONFIG_KEYS}}


def write_mlx(
    source: LanguageModel,
    layout: Layout,
    kept: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    artifacts: Mapping[str, Artifact],
    out: Path,
    *,
    config: Mapping[str, Any],
    directory: Path,
    provenance: Mapping[str, Any],
    shard_bytes: int,
    progress: Progress,
) -> Verification:
    """Write an MLX model; ``out`` appears only once everything in it has been read back and found right.

    Args:
        source: The original.
        layout: The model as mlx-lm has it.
        kept: Tensors of it that equal nothing of the original, by name.
        schemes: Scheme of every weight that is quantized, by name.
        artifacts: What every linear in these was rounded to, by the linear's name.
        out: Directory to make; it must not exist, or be empty.
        config: The original's config.json.
        directory: Directory of the original, to copy side files from.
        provenance: As ``Provenance`` of the manifest.
        shard_bytes: Largest file in bytes; only a single larger module may exceed it.
        progress: Wraps the tensors.

    Returns:
        What was read back from the finished files.

    Raises:
        CheckpointError: A side file leads outside the model.
        VerificationError: Something on the disk does not decode to what was meant.
        WorkDirectoryError: ``out`` is in the way or cannot be written, or the disk is full.
    """
    digests: dict[str, str] = {}
    names = {f"{name.removesuffix('.weight')}.{part}" for name in schemes for part in PARTS} | layout.tensors.keys()
    with atomic_directory(Path(out)) as target:
        with ShardWriter(target, "model", names=names, shard_bytes=shard_bytes) as shards:
            for name in progress(list(layout.tensors), "write"):
                scheme = schemes.get(name)
                if scheme is None:
                    tensor = _untouched(source, layout, kept, name)
                    digests[name] = tensor_sha256(tensor)
                    shards.add({name: tensor})
                    continue
                words, scales, biases = _joined(layout, artifacts, name)
                digests[name] = tensor_sha256(decode_packed(words, scales, biases, scheme.bits))
                shape = layout.tensors[name].shape[:-1]
                module = name.removesuffix(".weight")
                shaped = (x.view(*shape, x.shape[1]) for x in (words.view(torch.uint32), scales, biases))
                shards.add({f"{module}.{part}": each for part, each in zip(PARTS, shaped, strict=True)})
            places = shards.finish()
        files = sorted(set(places.values()))
        if len(files) > 1:
            index = {"metadata": {"total_size": shards.total_bytes}, "weight_map": dict(sorted(places.items()))}
            write_json(target / "model.safetensors.index.json", index)
        write_json(target / "config.json", mlx_config(config, schemes))
        record = {
            "manifest_version": MANIFEST_VERSION,
            "provenance": dict(provenance),
            "layout": layout.to_json(),
            "digests": digests,
            "files": dict(zip(files, file_digests([target / name for name in files], FormatError), strict=True)),
        }
        write_json(target / MANIFEST_FILE, checksummed(record))
        copy_side_files(directory, target)
        return verify_mlx(target)


def verify_mlx(directory: Path) -> Verification:
    """Read every tensor of an MLX model back, and compare it with the model's manifest.

    Args:
        directory: An MLX directory, by whatever program; only bpwise's own have a manifest.

    Raises:
        FormatError: What is stored is not what mlx-lm reads.
        VerificationError: A tensor does not decode to what was meant, or is not finite.
    """
    model = MlxModel.open(directory)
    found = {}
    for name in model.layout.tensors:
        tensor = model.decoded(name)
        if not bool(tensor.isfinite().all()):
            raise VerificationError(f"{directory}: {name} holds NaN or infinite values. Expected none. Write it again.")
        found[name] = tensor_sha256(tensor)
    manifest = model.manifest
    if manifest is not None:
        wrong = sorted(name for name in found if manifest.digests.get(name) != found[name])
        files = sorted(path.name for path in model.files)
        digests = file_digests([directory / name for name in files], FormatError)
        changed = [name for name, own in zip(files, digests, strict=True) if manifest.files.get(name) != own]
        if wrong or changed or manifest.files.keys() != set(files):
            first = (wrong or changed or files)[0]
            raise VerificationError(
                f"{directory}: not what was written, {len(wrong)} tensors and {len(changed)} files differ, the first "
                f"is {first}. Get or make the model again."
            )
    weights = max(1, sum(tensor.weights for tensor in model.layout.tensors.values()))
    quantized = sum(model.layout.tensors[name].weights for name in model.schemes)
    stored = sum(model.stored.info(name).size_bytes for name in model.stored.names)
    return Verification(
        quantized=len(model.schemes),
        others=len(model.layout.tensors) - len(model.schemes),
        rates={"all tensors": 8 * stored / weights},
        file_bytes=model.file_bytes,
        compared=manifest is not None,
        facts=(f"{quantized / weights:.1%} of the weights are quantized",),
    )


def _untouched(source: LanguageModel, layout: Layout, kept: Mapping[str, Tensor], name: str) -> Tensor:
    if name in kept:
        return kept[name]
    tensor = layout.tensors[name]
    if tensor.source is not None:
        return source.tensor(tensor.source)
    return torch.cat([source.tensor(f"{linear}.weight") for linear in tensor.linears]).view(tensor.shape)


def _joined(layout: Layout, artifacts: Mapping[str, Artifact], name: str) -> Iterator[Tensor]:
    # Codes, scales and biases of all rows of a tensor.
    parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for linear in layout.tensors[name].linears:
        artifact = artifacts[linear]()
        for part, own in parts.items():
            own.append(artifact[part])
    return (torch.cat(own) for own in parts.values())

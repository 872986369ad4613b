"""Writes a quantized model as an EXL2 directory, one linear at a time, and proves that it reads back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.carry.carried import copy_side_files, require_float16_range
from ....checkpoint.files.atomic import atomic_directory, write_json
from ....checkpoint.files.digests import file_digests
from ....checkpoint.files.schemas import checksummed
from ....checkpoint.files.shards import DEFAULT_SHARD_BYTES, ShardWriter, tensor_sha256
from ....checkpoint.model.names import HEAD, config_features, head_names, model_order
from ....checkpoint.source.checkpoint import TensorSource
from ....errors import CheckpointError, FormatError, ShapeError
from ...model import Verification
from .config import add_image_processor, exl2_config
from .linear import QuantizedLinear
from .manifest import MANIFEST_FILE, MANIFEST_VERSION
from .store import QUANTIZED_SUFFIXES, linear_tensors
from .verify import check_rules, verify_exl2

__all__ = ["require_writable", "write_model"]


def require_writable(source: TensorSource, linears: Collection[str]) -> None:
    """Refuse a model that ``write_model`` would refuse, whatever its linears are rounded to.

    Reads every tensor that is carried over, and no weight of a quantized linear.

    Args:
        source: The original model.
        linears: Names of the linears to quantize, without ``.weight``.

    Raises:
        BpwiseError: As ``write_model``.
    """
    _checked_config(source, linears, {})
    quantized = {f"{name}.weight" for name in linears}
    # Biases of quantized linears are carried over, too.
    for name in sorted(_carried(source, ()) - quantized, key=model_order):
        require_float16_range(name, source.tensor(name), CheckpointError)


def write_model(
    source: TensorSource,
    linears: Mapping[str, Callable[[], QuantizedLinear]],
    out: Path,
    *,
    quantization: Mapping[str, Any],
    provenance: Mapping[str, Any],
    float16: Collection[str] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Verification:
    """Write an EXL2 model; ``out`` appears only once everything in it has been read back and found right.

    Tensors stand in model order. What is not in ``linears`` is carried over in its dtype, except that an
    unquantized head and the linears in ``float16`` become float16. A tied model with ``lm_head`` in
    ``linears`` gets a head of its own beside the embedding.

    Args:
        source: The original model.
        linears: For each linear to quantize, named without ``.weight``, a function that makes or loads it;
            called once each, in model order. If its bias is None, the source's is taken.
        out: Directory to make; it must not exist, or be empty.
        quantization: Entries of ``quantization_config``: version, bits, head_bits and calibration.
        provenance: Anything that JSON can hold, stored in ``bpwise.json`` beside the manifest.
        float16: Other linears, named without ``.weight``, to write unquantized.
        shard_bytes: Largest file in bytes; only a single larger tensor or linear may exceed it.

    Returns:
        What was read back from the finished files.

    Raises:
        CheckpointError: An unquantized tensor does not fit float16, or a side file leads outside the model.
        FormatError: A linear is not in the source, or breaks a rule of the format.
        ShapeError: A linear does not have the shape of the weight it replaces.
        UnsupportedModelError: The config names no architecture.
        VerificationError: Something on the disk does not decode to what was intended.
        WorkDirectoryError: ``out`` is in the way or cannot be written, or the disk is full.
    """
    config = _checked_config(source, linears, quantization)
    carried = _carried(source, linears)
    halved = {f"{name}.{part}" for name in float16 for part in ("weight", "bias")} | head_names(source.names)
    manifest: dict[str, dict[str, str]] = {"linears": {}, "tensors": {}}
    with atomic_directory(Path(out)) as directory:
        parts = (*QUANTIZED_SUFFIXES, "bias")
        names = carried | {f"{linear}.{part}" for linear in linears for part in parts}
        with ShardWriter(directory, "output", names=names, shard_bytes=shard_bytes) as shards:
            for tensors in _units(source, linears, carried, halved, manifest):
                shards.add(tensors)
            files = sorted(set(shards.finish().values()))
        write_json(directory / "config.json", config)
        record = {
            "manifest_version": MANIFEST_VERSION,
            "provenance": dict(provenance),
            "manifest": manifest,
            "files": dict(zip(files, file_digests([directory / name for name in files], FormatError), strict=True)),
        }
        write_json(directory / MANIFEST_FILE, checksummed(record))
        copy_side_files(source.directory, directory)
        add_image_processor(directory)
        return verify_exl2(directory)


def _checked_config(source: TensorSource, linears: Collection[str], quantization: Mapping[str, Any]) -> dict[str, Any]:
    config = exl2_config(source.config, quantization, tied_embeddings=source.tied_embeddings)
    check_rules(config, set(linears), _carried(source, linears) | {f"{name}.weight" for name in linears})
    _check_shapes(source, linears)
    return config


def _carried(source: TensorSource, linears: Collection[str]) -> set[str]:
    replaced = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    if source.tied_embeddings:
        replaced |= head_names(source.names)
    return set(source.names - replaced)


def _check_shapes(source: TensorSource, linears: Collection[str]) -> None:
    # The readers' sizes come from the config, so it must agree with the weights before anything is written.
    for name in linears:
        weight = f"{name}.weight"
        if weight not in source.names:
            if name.endswith(HEAD) and source.tied_embeddings:
                continue
            raise FormatError(
                f"{name}: to be quantized, but the source model has no tensor {weight}."
                " The file is damaged: make it again."
            )
        rows, columns = config_features(name, source.config)
        shape = source.shape(weight)
        expected = (columns or shape[0], rows or shape[-1])
        if shape != expected:
            raise ShapeError(name, "weight, by config.json,", got=shape, expected=expected)


def _units(
    source: TensorSource,
    linears: Mapping[str, Callable[[], QuantizedLinear]],
    carried: set[str],
    halved: set[str],
    manifest: dict[str, dict[str, str]],
) -> Iterator[dict[str, Tensor]]:
    """Yield what must stand together in one file, in model order; note in ``manifest`` what it decodes to."""
    for name in sorted(carried | linears.keys(), key=model_order):
        if name not in linears:
            tensor = source.tensor(name)
            require_float16_range(name, tensor, CheckpointError)
            if name in halved:
                tensor = tensor.half()
            manifest["tensors"][name] = tensor_sha256(tensor)
            yield {name: tensor}
            continue
        linear = _with_bias(source, name, linears[name]())
        _check_replacement(source, name, linear)
        if linear.bias is not None:
            manifest["tensors"][f"{name}.bias"] = tensor_sha256(linear.bias.cpu())
        linear.validate(name)
        manifest["linears"][name] = tensor_sha256(linear.dequantize().cpu())
        yield linear_tensors(name, linear)


def _with_bias(source: TensorSource, name: str, linear: QuantizedLinear) -> QuantizedLinear:
    bias = f"{name}.bias"
    if linear.bias is not None or bias not in source.names:
        return linear
    tensor = source.tensor(bias)
    require_float16_range(bias, tensor, CheckpointError)
    return replace(linear, bias=tensor.to(torch.float16))


def _check_replacement(source: TensorSource, name: str, linear: QuantizedLinear) -> None:
    rows, columns = config_features(name, source.config)
    weight = f"{name}.weight"
    expected = source.shape(weight) if weight in source.names else (columns or 0, rows or 0)
    if (linear.out_features, linear.in_features) != expected:
        raise ShapeError(name, "quantized weight", got=(linear.out_features, linear.in_features), expected=expected)

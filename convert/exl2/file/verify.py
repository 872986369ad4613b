"""Reads a finished EXL2 model back from the disk and compares it with what was intended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from ....checkpoint.carry.carried import require_float16_range
from ....checkpoint.files.digests import file_digests
from ....checkpoint.files.shards import tensor_sha256
from ....checkpoint.model.names import HEAD, config_features, head_names
from ....checkpoint.source.hub import confined_file
from ....errors import FormatError, VerificationError
from ...model import Verification
from .describe import decoder_bpw, head_bpw
from .linear import QuantizedLinear
from .reader import Exl2Model

__all__ = ["check_rules", "verify_exl2"]

_SHOWN = 5

# Readers build these blocks as one: either all of their linears are quantized, or none is.
_BLOCKS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w2", "w3"),
    ("c_fc", "c_proj"),
)

# Of an MLP: what reads its neurons, and what makes them.
_MLPS = {"down_proj": ("gate_proj", "up_proj"), "c_proj": ("c_fc",)}


def verify_exl2(directory: Path) -> Verification:
    """Read every tensor of an EXL2 model, check the format's rules and compare with the model's manifest.

    Args:
        directory: An EXL2 directory, by whatever program; only bpwise's own have a manifest.

    Raises:
        FormatError: A rule of the format is broken.
        ShapeError: A tensor does not have the shape that the config demands.
        VerificationError: A tensor does not decode to what the manifest says, is missing or unexpected.
    """
    model = Exl2Model.open(directory)
    check_rules(model.stored_config, frozenset(model.linears), model.names)
    record = model.manifest
    manifest = None if record is None else {"linears": record.manifest.linears, "tensors": record.manifest.tensors}
    found: dict[str, dict[str, str]] = {"linears": {}, "tensors": {}}
    for name in model.linears:
        linear = model.linear(name)
        _check_linear(model, name, linear)
        if manifest is not None:
            found["linears"][name] = tensor_sha256(linear.dequantize())
    others = sorted(model.names - {f"{name}.weight" for name in model.linears})
    for name in others:
        tensor = model.tensor(name)
        require_float16_range(name, tensor, FormatError)
        found["tensors"][name] = tensor_sha256(tensor) if manifest is not None else ""
    if record is not None and manifest is not None:
        _compare(found, manifest)
        _compare_files(directory, record.files)
    float16 = len(model.float16_linears)
    return Verification(
        quantized=len(model.linears),
        others=len(others),
        rates={"decoder": decoder_bpw(model), "head": head_bpw(model)},
        file_bytes=model.file_bytes,
        compared=manifest is not None,
        facts=(f"{float16} linears of the decoder in float16",) if float16 else (),
    )


def check_rules(config: Mapping[str, Any], quantized: Set[str], names: Set[str]) -> None:
    """Check the rules that need no tensor: the config's keys, and what may be quantized beside what.

    Args:
        config: config.json of the EXL2 model.
        quantized: Names of the quantized linears.
        names: Names of all tensors of the dense model, the quantized linears' weights included.

    Raises:
        FormatError: A rule is broken.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise FormatError(
            f"config.json: architectures is {architectures!r}. Expected a list with exactly one name."
            " The file is damaged: make it again."
        )
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and "type" in scaling and "rope_type" in scaling:
        raise FormatError(
            "config.json: rope_scaling holds both type and rope_type. Expected one of them."
            " The file is damaged: make it again."
        )
    if not head_names(names) and config.get("tie_word_embeddings") is False:
        raise FormatError(
            f"{HEAD}: not stored, but tie_word_embeddings is false in config.json. The file is damaged: make it again."
        )
    for linear in sorted(quantized):
        block, _, last = linear.rpartition(".")
        rows = config_features(linear, config)[0]
        if last in _MLPS and rows is not None and rows % 32:
            raise FormatError(
                f"{linear}: {rows} input features. Expected a multiple of 32 in a quantized MLP."
                " The file is damaged: make it again."
            )
        for members in _BLOCKS:
            dense = [f"{block}.{member}" for member in members if last in members]
            dense = [member for member in dense if f"{member}.weight" in names and member not in quantized]
            if dense:
                raise FormatError(
                    f"{linear}: quantized, but {', '.join(dense)} not. Readers need all of a block quantized or none."
                )


def _check_linear(model: Exl2Model, name: str, linear: QuantizedLinear) -> None:
    block, _, last = name.rpartition(".")
    biased = any(f"{block}.{member}.bias" in model.names for member in _MLPS.get(last, ()))
    if biased and not torch.equal(linear.order, torch.arange(linear.in_features)):
        raise FormatError(
            f"{name}: its rows are reordered, but readers do not reorder the biases of the linears before it along. "
            "Quantize it in the order of its input features."
        )


def _compare(found: Mapping[str, Mapping[str, str]], manifest: Mapping[str, Mapping[str, str]]) -> None:
    missing, unexpected, different = set(), set(), set()
    for part in ("linears", "tensors"):
        missing |= manifest[part].keys() - found[part].keys()
        unexpected |= found[part].keys() - manifest[part].keys()
        common = manifest[part].keys() & found[part].keys()
        different |= {name for name in common if manifest[part][name] != found[part][name]}
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (
            ("decode differently", different),
            ("missing", missing),
            ("unexpected", unexpected),
        )
        if names
    ]
    if problems:
        raise VerificationError(
            f"model on disk: not as intended, {'; '.join(problems)}. Write it again; if this "
            "happens twice, "
            "check the disk and the memory."
        )


def _compare_files(directory: Path, expected: Mapping[str, str]) -> None:
    found = file_digests([confined_file(directory, name) for name in expected], FormatError)
    for (name, digest), got in zip(expected.items(), found, strict=True):
        if got != digest:
            raise VerificationError(
                f"{directory / name}: has changed since it was written, in bytes that decode to nothing. Get or "
                "make it again."
            )


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = "" if len(ordered) <= _SHOWN else f" and {len(ordered) - _SHOWN} more"
    return ", ".join(ordered[:_SHOWN]) + more

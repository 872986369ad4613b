"""Descriptions of all files and directories that bpwise reads or writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files.safetensors_file import load_metadata
from ..checkpoint.model.structure import ModelStructure
from ..checkpoint.model.structure_json import structure_from_json
from ..checkpoint.source.original import open_model
from ..convert.model import Description
from ..convert.registry import format_of, formats, load_plan
from ..errors import FormatError
from ..measure.measurement import HEADER_KEY, FormatCurves, Measurement
from ..measure.text.calibration import CalibrationSet
from ..tables import Table, bytes_text

__all__ = ["inspect_path"]


def inspect_path(path: str | Path) -> Description:
    """Describe a quantized model of any format, a checkpoint directory, a measurement, a calibration set or a plan.

    Raises:
        BpwiseError: It is none of these, or damaged.

    Example:
        >>> from bpwise import inspect_path
        >>> inspect_path("m.safetensors").kind
        'measurement'
    """
    path = Path(path)
    format_ = format_of(path)
    if format_ is not None:
        return format_.describe(path)
    if path.is_dir():
        return _checkpoint(path)
    if path.suffix == ".json":
        return load_plan(path).describe()
    if path.suffix == ".safetensors":
        return _measurement(path) if HEADER_KEY in load_metadata(path) else _calibration(path)
    titles = ", ".join(each.title for each in formats().values())
    raise FormatError(
        f"{path}: cannot be inspected. Expected a model ({titles}, or a checkpoint directory), a .safetensors "
        "measurement or calibration set, or a plan.json. Check the path."
    )


def _checkpoint(path: Path) -> Description:
    checkpoint = open_model(path)
    rows = []
    for name in sorted(checkpoint.names):
        info = checkpoint.info(name)
        rows.append((name, " x ".join(map(str, info.shape)), str(info.dtype).removeprefix("torch."), info.file.name))
    return Description(
        kind="checkpoint",
        facts=(
            f"model_type {checkpoint.config.get('model_type')}, "
            f"{checkpoint.parameter_count / 1e6:.1f} million stored parameters, "
            f"{bytes_text(checkpoint.total_bytes)}",
            f"tied embeddings: {'yes' if checkpoint.tied_embeddings else 'no'}",
        ),
        table=Table(("tensor", "shape", "dtype", "file"), tuple(rows)),
        content={
            "model_type": checkpoint.config.get("model_type"),
            "parameters": checkpoint.parameter_count,
            "tensors_bytes": checkpoint.total_bytes,
            "tied_embeddings": checkpoint.tied_embeddings,
            "tensors": [
                {"name": name, "shape": list(checkpoint.info(name).shape), "dtype": dtype, "file": file}
                for name, _, dtype, file in rows
            ],
        },
    )


def _measurement(path: Path) -> Description:
    measurement = Measurement.load(path)
    linears = (*measurement.linears, measurement.head)
    names = [linear.name for linear in linears]
    columns = [_damages(name, curves, names) for name, curves in measurement.curves.items()]
    rows = [
        (
            linear.name,
            f"{linear.in_features} x {linear.out_features}",
            *(f"{damage:.2e}" for _, damages in columns for damage in damages[index]),
        )
        for index, linear in enumerate(linears)
    ]
    facts = {key: value for key, value in measurement.provenance.items() if not isinstance(value, list)}
    if "structure" in facts:
        where = f"{path}: provenance: structure"
        facts["structure"] = _blocks(structure_from_json(facts["structure"], FormatError, where=where))
    if measurement.experts_sentence is not None:
        facts["experts"] = measurement.experts_sentence
    return Description(
        kind="measurement",
        facts=tuple(f"{key}: {value}" for key, value in facts.items()),
        table=Table(
            ("linear, damage in nats/token", "in x out", *(title for titles, _ in columns for title in titles)),
            tuple(rows),
        ),
        content={
            "provenance": facts,
            "rows": int(measurement.tokens.shape[0]),
            "row_tokens": int(measurement.tokens.shape[1]),
            "linears": [
                {
                    "name": linear.name,
                    "in_features": linear.in_features,
                    "out_features": linear.out_features,
                    "damage_nats": {
                        title: float(damage)
                        for titles, damages in columns
                        for title, damage in zip(titles, damages[index], strict=True)
                    },
                }
                for index, linear in enumerate(linears)
            ],
        },
    )


def _blocks(structure: ModelStructure) -> str:
    kinds = list({id(block): block for block in structure.structures}.values())
    alike = "one kind" if len(kinds) == 1 else f"{len(kinds)} kinds"
    groups = " or ".join(str(len(block.groups)) for block in kinds)
    return f"{len(structure.structures)} blocks of {alike}, with {groups} input groups"


def _damages(name: str, curves: FormatCurves, linears: Sequence[str]) -> tuple[list[str], list[NDArray[Any]]]:
    # Titles, and the damage of each linear in each of the format's choices; nothing where a header names none.
    choices = next((value for value in curves.header.values() if isinstance(value, list)), [])
    damages = [curves.linears[linear].get("damage_nats", np.zeros(0)) for linear in linears]
    if not choices or not all(damage.ndim and damage.shape[-1] == len(choices) for damage in damages):
        return [], [np.zeros(0)] * len(linears)
    sums = [damage.reshape(-1, len(choices)).sum(axis=0) for damage in damages]
    return [f"{name} {choice}" for choice in choices], sums


def _calibration(path: Path) -> Description:
    rows = CalibrationSet.load(path)
    count, length = rows.tokens.shape
    return Description(
        kind="calibration set",
        facts=(rows.description, f"{count} rows of {length} tokens", f"fingerprint {rows.fingerprint}"),
        table=Table(
            ("kind of text", "rows"), tuple((kind, str(number)) for kind, number in rows.rows_per_kind.items())
        ),
        content={
            "text": rows.description,
            "rows": int(count),
            "row_tokens": int(length),
            "fingerprint": rows.fingerprint,
            "rows_by_kind": dict(rows.rows_per_kind),
        },
    )

"""Importances that a measurement implies, as an importance matrix for llama.cpp."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....measure.calibrated import measured_rows
from ....measure.measurement import MeasuredLinear, Measurement
from ..plan.layout import Layout
from ..plan.measured import gguf_curves
from .imatrix import ImportanceMatrix, write_imatrix

__all__ = ["export_imatrix", "importance_of", "table_importance"]


def importance_of(measurement: Measurement, layout: Layout, *, of_original: bool = False) -> ImportanceMatrix:
    """Return the importances that a measurement implies: weighted mean squares of the inputs of every tensor.

    Tokens count as the end loss says (see ``bpwise.measure.statistics.inputs``), where llama.cpp counts all alike.

    Args:
        measurement: What was measured.
        layout: The file that the tensors are in.
        of_original: Whether they are those of the model as it was before its channels were equalized.
    """
    table = measurement.embedding
    heads = () if table.tied else (measurement.head,)
    linears = {linear.name: linear for linear in (*measurement.linears, *heads)}
    if of_original:
        linears = {name: _of_original(linear) for name, linear in linears.items()}
    means = {
        name: _means(layout, name, linears)
        for name, own in layout.rows.tensors.items()
        if linears.keys() >= set(own.linears)
    }
    means |= dict.fromkeys(layout.rows.tensors_of(table.name), table_importance(measurement))
    own = measurement.layer_embedding
    if own is not None:
        means |= dict.fromkeys(layout.rows.tensors_of(own.name), torch.from_numpy(own.importance))
    rows, row_tokens = measurement.tokens.shape
    return ImportanceMatrix.from_means(
        means,
        rows * row_tokens,
        datasets=(measured_rows(measurement).description,),
        chunks=rows,
        chunk_tokens=row_tokens,
    )


def table_importance(measurement: Measurement) -> Tensor:
    """Return what squared errors in each column of the token embeddings cost, float32, shape (hidden size,).

    A table that is the output head too costs there what its inputs weigh, summed over its rows, and as embeddings what
    the gradients say, summed over the rows that each token reads.
    """
    table, head = measurement.embedding, measurement.head
    importance = torch.from_numpy(table.importance)
    if table.tied:
        importance = importance + float(head.fisher.sum()) * torch.from_numpy(head.input_power)
    return importance


def export_imatrix(measurement: Measurement | str | Path, output: str | Path) -> int:
    """Write what a measurement says of the inputs as an importance matrix for llama.cpp.

    Args:
        measurement: A measurement, or its file; GGUF was measured, which says what tensors are called.
        output: File to make or replace; in the old format if it ends in ``.dat``.

    Returns:
        The number of tensors in it.

    Raises:
        ConfigError: GGUF was not measured.
        FormatError: Its curves are damaged, or of another version.
        WorkDirectoryError: The file cannot be written.

    Example:
        >>> from bpwise import export_imatrix
        >>> export_imatrix("m.safetensors", "imatrix.gguf")
        16
    """
    output = Path(output)
    measured = measurement if isinstance(measurement, Measurement) else Measurement.load(measurement)
    matrix = importance_of(measured, gguf_curves(measured).layout, of_original=True)
    write_imatrix(output, matrix, legacy=output.suffix.lower() == ".dat")
    return len(matrix.sums)


def _of_original(linear: MeasuredLinear) -> MeasuredLinear:
    factors = linear.input_factors
    return linear if factors is None else replace(linear, input_power=linear.input_power * np.square(factors))


def _means(layout: Layout, tensor: str, linears: dict[str, MeasuredLinear]) -> Tensor:
    # Shape (experts, K), or (K,) of a single matrix.
    own, shape = layout.rows.tensors[tensor], layout.tensors[tensor].shape
    count = shape[-2]
    means = []
    for first in range(0, math.prod(shape[:-1]), count):
        source, output = (each[first : first + count] for each in (own.source, own.output))
        parts = [(linears[own.linears[index]], output[source == index]) for index in np.unique(source)]
        means.append(_mean(parts))
    power = np.stack(means) if len(shape) > 2 else means[0]
    return torch.from_numpy(power if own.columns is None else power[..., own.columns])


def _mean(parts: list[tuple[MeasuredLinear, NDArray[np.int64]]]) -> NDArray[np.float32]:
    # Linears that were joined to one matrix read the same input, but their tokens count each by its own gradients: a
    # squared error in a column costs the sum over linears of what their outputs weigh times their power there.
    if len(parts) == 1:
        return parts[0][0].input_power
    weights = np.array([linear.fisher[outputs].sum() for linear, outputs in parts], dtype=np.float64)
    powers = np.stack([linear.input_power for linear, _ in parts])
    shares = weights / weights.sum() if weights.any() else np.full(len(parts), 1 / len(parts))
    return (shares @ powers).astype(np.float32)

"""Importances that a measurement implies, as an importance matrix for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ....errors import UnsupportedModelError
from ....measure.measurement import Measurement
from ....measure.run import measured_rows
from ..file.names import gguf_name
from .imatrix import ImportanceMatrix, write_imatrix

__all__ = ["export_imatrix", "importance_of", "table_importance", "tensor_name"]


def importance_of(measurement: Measurement) -> ImportanceMatrix:
    """Return the importances that a measurement implies: weighted mean squares of every linear's inputs.

    Tokens count as the end loss says (see ``bpwise.measure.statistics.inputs``), where llama.cpp counts all alike.

    Raises:
        UnsupportedModelError: A linear has no name in llama.cpp.
    """
    table = measurement.embedding
    heads = () if table.tied else (measurement.head,)
    means = {tensor_name(x.name): torch.from_numpy(x.input_power) for x in (*measurement.linears, *heads)}
    means[tensor_name(table.name)] = table_importance(measurement)
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


def export_imatrix(measurement: Measurement, output: Path) -> int:
    """Write what a measurement says of the inputs as an importance matrix for llama.cpp.

    Args:
        measurement: The measurement.
        output: File to make or replace; in the old format if it ends in ``.dat``.

    Returns:
        The number of tensors in it.

    Raises:
        UnsupportedModelError: A linear has no name in llama.cpp.
        WorkDirectoryError: The file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from bpwise import Measurement, export_imatrix
        >>> export_imatrix(Measurement.load(Path("m.safetensors")), Path("imatrix.gguf"))
        16
    """
    matrix = importance_of(measurement)
    write_imatrix(output, matrix, legacy=output.suffix.lower() == ".dat")
    return len(matrix.sums)


def tensor_name(module: str) -> str:
    """Return the name that GGUF has for a module's weight.

    Args:
        module: Its name in Transformers.

    Raises:
        UnsupportedModelError: There is none.
    """
    name = gguf_name(f"{module}.weight")
    if name is None:
        raise UnsupportedModelError(
            f"{module}: has no name in GGUF. Expected a linear of a family that GGUF output is for (docs/families.md). "
            "Choose another format."
        )
    return name

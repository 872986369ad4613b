"""Measuring tables of embeddings: the tokens', and those that every block of some models has of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint.files.resume import ResumeStore
from .curves import CurveMaker, TableInputs, TiedHead
from .input_group import TINY, split_formats
from .measurement import MeasuredTable
from .model.batches import check_finite
from .model.stream import StreamedModel

__all__ = ["EMBEDDING", "LAYER_EMBEDDING", "FinishedTable", "finished_tables", "measured_table"]

EMBEDDING, LAYER_EMBEDDING = "embedding", "layer-embedding"
"""Artifacts of the token embeddings, and of those that blocks have of their own."""


@dataclass(frozen=True, slots=True, eq=False)
class FinishedTable:
    """A table of embeddings, measured.

    Attributes:
        table: What is known of it whatever the format.
        curves: Its curves, by format and by name.
    """

    table: MeasuredTable
    curves: dict[str, dict[str, NDArray[Any]]]


def measured_table(
    model: StreamedModel,
    name: str,
    tokens: Tensor,
    gradient: Tensor,
    makers: Sequence[CurveMaker],
    head: TiedHead | None,
) -> dict[str, Tensor]:
    """Measure a table in every format, and return it as an artifact.

    Args:
        model: The model.
        name: Full name of the table's module.
        tokens: Token ids of the calibration sequences, int64, shape (rows, tokens).
        gradient: At each token's row, as it is stored, shape (rows, tokens, width).
        makers: The formats' curves.
        head: The output head, if the table is that too.

    Raises:
        NumericalError: NaN or infinity in the squares of the gradients.
    """
    squares = gradient.flatten(0, 1).square()
    total = squares.sum()
    check_finite(total, name, "squared gradients")
    # As in a Hessian, a token counts what its gradients say.
    weights = squares.sum(dim=1) / max(float(total), TINY)
    table = f"{name}.weight"
    uses = torch.zeros(model.source.parameter_shape(table)[0]).index_add_(0, tokens.flatten(), weights)
    inputs = TableInputs(
        embeddings=lambda rows: model.embeddings(rows, table), uses=uses, fisher=squares.mean(dim=0), head=head
    )
    curves = {f"{maker.name}/{key}": tensor for maker in makers for key, tensor in maker.table(inputs).items()}
    return {"importance": inputs.fisher, **curves}


def finished_tables(model: StreamedModel, artifacts: ResumeStore) -> tuple[FinishedTable, FinishedTable | None]:
    """Return the measured tables of a finished run: the token embeddings, and those of all blocks, if there are any."""
    own = model.source.layer_embedding
    return (
        _finished(model, artifacts.load(EMBEDDING), model.source.embedding_name, tied=model.source.tied_embeddings),
        None if own is None else _finished(model, artifacts.load(LAYER_EMBEDDING), own, tied=False),
    )


def _finished(model: StreamedModel, artifact: dict[str, Tensor], name: str, *, tied: bool) -> FinishedTable:
    tokens = model.source.parameter_shape(f"{name}.weight")[0]
    table = MeasuredTable(name=name, tokens=tokens, importance=artifact["importance"].numpy(), tied=tied)
    return FinishedTable(table, split_formats(artifact))

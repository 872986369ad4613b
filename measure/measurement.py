"""The measurement: every linear's error curve and where it came from, in one file. Needs no torch to read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ..checkpoint.files.atomic import atomic_file, metadata_begins
from ..convert.exl2.file.layout import group_rows
from .measurement_file import HEADER_KEY, MeasuredTensors, read_measurement

__all__ = [
    "HEADER_KEY",
    "MEASUREMENT_VERSION",
    "RARE_TOKENS",
    "MeasuredLinear",
    "MeasuredTable",
    "Measurement",
    "is_measurement",
]

MEASUREMENT_VERSION = 5
"""Raised when the file's content changes meaning; older files are refused."""

RARE_TOKENS = 100
"""An expert that fewer calibration tokens chose is reported: its statistics are mostly those of other tokens."""

_FIELDS = ("damage_nats", "order", "fisher", "input_power", "coupling", "type_damage_nats")
_TABLE_FIELDS = ("importance", "type_damage_nats")
_WEIGHTS = "token_weights"
_TOKENS = "calibration_tokens"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredLinear:
    """One linear's curve, as ``bpwise.convert.exl2.rounding.curves.ErrorCurve``, in NumPy.

    Attributes:
        name: Full name, for example ``model.layers.0.self_attn.q_proj``.
        damage_nats: float32, shape (groups, widths), nats per token.
        order: Input feature of each row, int32, shape (K,).
        fisher: float32, shape (out,).
        input_power: float32, shape (K,).
        coupling: float16, shape (out, rank), rank 0 for the head: how outputs act together on the loss, as
            ``bpwise.measure.statistics.sketch.FisherSketch.coupling``.
        token_weights: float16, shape (rows, tokens): what each calibration token counts in the Gram matrix, mean 1.
            Linears of a stage have the same.
        type_damage_nats: Damage in each of the measurement's ``types``, nats per token, float32, shape (types,);
            infinite where the type does not fit the row length.
        damping: Relative damping of the Gram matrix, for rounding too; infinite where error feedback was given up.
        chosen_tokens: How many calibration tokens chose the expert that the linear belongs to; None outside of
            experts.
    """

    name: str
    damage_nats: NDArray[np.float32]
    order: NDArray[np.int32]
    fisher: NDArray[np.float32]
    input_power: NDArray[np.float32]
    coupling: NDArray[np.float16]
    token_weights: NDArray[np.float16]
    type_damage_nats: NDArray[np.float32]
    damping: float
    chosen_tokens: int | None = None

    @property
    def in_features(self) -> int:
        """K, the number of input features."""
        return len(self.order)

    @property
    def out_features(self) -> int:
        """Number of outputs, padding excluded."""
        return len(self.fisher)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredTable:
    """What the table of token embeddings would cost, as the input of the first block.

    Attributes:
        name: Full name, for example ``model.embed_tokens``.
        tokens: Number of its rows.
        importance: Mean over tokens of (dL/dh)^2 of each element of an embedding h, float32, shape (hidden size,).
        type_damage_nats: As ``MeasuredLinear.type_damage_nats``.
        tied: Whether it is the output head too. What its errors cost there is measured as the head's.
    """

    name: str
    tokens: int
    importance: NDArray[np.float32]
    type_damage_nats: NDArray[np.float32]
    tied: bool

    @property
    def hidden_size(self) -> int:
        """Length of an embedding."""
        return len(self.importance)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """Everything that allocation and rounding need, for any bitrate.

    Attributes:
        linears: Decoder linears in model order.
        head: The output head.
        embedding: The token embeddings.
        other_weights: Number of weights outside of linears, head and embeddings: norms and biases.
        tokens: The calibration rows, int32, shape (rows, tokens). Rounding works on the same ones.
        widths: Bit widths of the curves' columns.
        types: Names of the ggml types whose damage was measured; none where ggml's library was not installed.
        group_size: Rows of a group.
        provenance: Model and calibration fingerprints, calibration description, options, version: plain JSON.
    """

    linears: tuple[MeasuredLinear, ...]
    head: MeasuredLinear
    embedding: MeasuredTable
    other_weights: int
    tokens: NDArray[np.int32]
    widths: tuple[int, ...]
    types: tuple[str, ...]
    group_size: int
    provenance: dict[str, Any]

    @property
    def without_feedback(self) -> tuple[str, ...]:
        """Linears whose Gram matrix could not be factored, however damped: they are rounded without error feedback.

        Their curves were measured so, hence they look costlier and the allocation gives them wider formats.
        """
        return tuple(linear.name for linear in (*self.linears, self.head) if linear.damping == float("inf"))

    @property
    def experts_sentence(self) -> str | None:
        """How many experts calibration text hardly reached, and which least; None for a model without experts."""
        chosen = {
            linear.name.rpartition(".")[0]: linear.chosen_tokens
            for linear in self.linears
            if linear.chosen_tokens is not None
        }
        if not chosen:
            return None
        rare = sum(tokens < RARE_TOKENS for tokens in chosen.values())
        least = min(chosen, key=lambda name: chosen[name])
        return (
            f"{rare} of {len(chosen)} were chosen by fewer than {RARE_TOKENS} tokens, least: {least} by {chosen[least]}"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over curves and provenance, 32 hexadecimal digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """Return the file's content: a safetensors image with the provenance in its metadata."""
        tensors = {
            f"{linear.name}.{field}": np.ascontiguousarray(getattr(linear, field))
            for linear in (*self.linears, self.head)
            for field in _FIELDS
        }
        for field in _TABLE_FIELDS:
            tensors[f"{self.embedding.name}.{field}"] = np.ascontiguousarray(getattr(self.embedding, field))
        tensors[_TOKENS] = np.ascontiguousarray(self.tokens)
        shared: dict[bytes, str] = {}
        owners = {
            linear.name: shared.setdefault(linear.token_weights.tobytes(), linear.name)
            for linear in (*self.linears, self.head)
        }
        for linear in (*self.linears, self.head):
            if owners[linear.name] == linear.name:
                tensors[f"{linear.name}.{_WEIGHTS}"] = np.ascontiguousarray(linear.token_weights)
        header = {
            "version": MEASUREMENT_VERSION,
            "linears": [linear.name for linear in self.linears],
            "head": self.head.name,
            "embedding": {
                "name": self.embedding.name,
                "tokens": self.embedding.tokens,
                "tied": self.embedding.tied,
            },
            "other_weights": self.other_weights,
            "token_weights": owners,
            "widths": self.widths,
            "types": self.types,
            "group_size": self.group_size,
            # JSON knows no infinity: a damping of null means that feedback was given up.
            "damping": {
                linear.name: linear.damping if np.isfinite(linear.damping) else None
                for linear in (*self.linears, self.head)
            },
            "chosen_tokens": {
                linear.name: linear.chosen_tokens for linear in self.linears if linear.chosen_tokens is not None
            },
            "provenance": self.provenance,
        }
        # One entry only: safetensors writes several in an order that differs from run to run.
        image: bytes = save(tensors, metadata={HEADER_KEY: json.dumps(header)})
        return image

    def save(self, path: Path) -> None:
        """Write the measurement, atomically; an existing file is replaced."""
        with atomic_file(path) as temporary:
            temporary.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read a measurement file.

        Raises:
            FormatError: It is not a measurement, is damaged, or has another version.
        """
        header, tensors = read_measurement(path, MEASUREMENT_VERSION)
        types = len(header.types)
        tokens = tensors.take(_TOKENS, np.int32, (None, None))
        if tokens.max() >= header.embedding.tokens:
            most = header.embedding.tokens - 1
            raise tensors.error(_TOKENS, "holds ids beyond the vocabulary", str(tokens.max()), f"at most {most}")
        weights = {
            owner: tensors.take(f"{owner}.{_WEIGHTS}", np.float16, tokens.shape)
            for owner in set(header.token_weights.values())
        }

        def linear(name: str) -> MeasuredLinear:
            order = tensors.order(f"{name}.order")
            fisher = tensors.take(f"{name}.fisher", np.float32, (None,))
            groups = len(group_rows(len(order), header.group_size))
            damping = header.damping[name]
            return MeasuredLinear(
                name=name,
                damage_nats=tensors.take(f"{name}.damage_nats", np.float32, (groups, len(header.widths))),
                order=order,
                fisher=fisher,
                input_power=tensors.take(f"{name}.input_power", np.float32, order.shape),
                coupling=tensors.take(f"{name}.coupling", np.float16, (len(fisher), None), least=None, empty=True),
                token_weights=weights[header.token_weights[name]],
                type_damage_nats=_of_types(tensors, name, types),
                damping=float("inf") if damping is None else damping,
                chosen_tokens=header.chosen_tokens.get(name),
            )

        table = header.embedding
        return cls(
            linears=tuple(linear(name) for name in header.linears),
            head=linear(header.head),
            embedding=MeasuredTable(
                name=table.name,
                tokens=table.tokens,
                importance=tensors.take(f"{table.name}.importance", np.float32, (None,)),
                type_damage_nats=_of_types(tensors, table.name, types),
                tied=table.tied,
            ),
            other_weights=header.other_weights,
            tokens=tokens,
            widths=header.widths,
            types=header.types,
            group_size=header.group_size,
            provenance=header.provenance,
        )


def is_measurement(path: Path) -> bool:
    """Return whether a file is a measurement, of this version or another; behind its head it may be damaged."""
    return metadata_begins(path, f'"{HEADER_KEY}":')


def _of_types(tensors: MeasuredTensors, name: str, types: int) -> NDArray[np.float32]:
    # Rounding errors may leave a damage of nearly nothing a little below it.
    return tensors.take(f"{name}.type_damage_nats", np.float32, (types,), least=None, infinite=True)

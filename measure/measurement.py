"""The measurement: what is known of every linear, every format's curves, and where they came from. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ..checkpoint.files.atomic import atomic_file
from ..checkpoint.files.operations import write
from ..checkpoint.files.schemas import metadata_begins
from ..errors import ConfigError, FormatError
from .measurement_file import CURVES, HEADER_KEY, EmbeddingHeader, MeasuredTensors, read_measurement

__all__ = [
    "HEADER_KEY",
    "MEASUREMENT_VERSION",
    "RARE_TOKENS",
    "FormatCurves",
    "MeasuredLinear",
    "MeasuredTable",
    "Measurement",
    "is_measurement",
]

MEASUREMENT_VERSION = 7
"""Raised when the file's content changes meaning; older files are refused."""

RARE_TOKENS = 100
"""An expert that fewer calibration tokens chose is reported: its statistics are mostly those of other tokens."""

_FIELDS = ("fisher", "input_power", "coupling")
_FACTORS, _IMPORTANCE = "input_factors", "importance"
_WEIGHTS = "token_weights"
_TOKENS = "calibration_tokens"

_MEASURE_AGAIN = "Measure the model again with `bpwise measure`."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredLinear:
    """What is known of one linear, whatever the format.

    Attributes:
        name: Full name, for example ``model.layers.0.self_attn.q_proj``.
        fisher: Mean over tokens of (dL/dy)^2 of each output, float32, shape (out,), nats per squared unit of y.
        input_power: Weighted mean over tokens of x^2 of each input channel, float32, shape (K,).
        coupling: float16, shape (out, rank), rank 0 for the head: how outputs act together on the loss, as
            ``bpwise.measure.statistics.sketch.FisherSketch.coupling``.
        token_weights: float16, shape (rows, tokens): what each calibration token counts in the Hessian, mean 1.
            Linears of an input group have the same.
        damping: Relative damping of the Hessian, for rounding too: the largest that a measured format took; infinite
            where error feedback was given up.
        chosen_tokens: How many calibration tokens chose the expert that the linear belongs to; None outside of
            experts.
        input_factors: What equalization multiplied each column of the weight with, float32, shape (K,); None: nothing.
    """

    name: str
    fisher: NDArray[np.float32]
    input_power: NDArray[np.float32]
    coupling: NDArray[np.float16]
    token_weights: NDArray[np.float16]
    damping: float
    chosen_tokens: int | None = None
    input_factors: NDArray[np.float32] | None = None

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return len(self.input_power)

    @property
    def out_features(self) -> int:
        """Number of output channels, padding excluded."""
        return len(self.fisher)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredTable:
    """What is known of the table of token embeddings, as the input of the first block.

    Attributes:
        name: Full name, for example ``model.embed_tokens``.
        tokens: Number of its rows.
        importance: Mean over tokens of (dL/dh)^2 of each element of an embedding h, float32, shape (hidden size,).
        tied: Whether it is the output head too. A format that stores both as one measures what its errors cost there
            with the table, others with the head.
    """

    name: str
    tokens: int
    importance: NDArray[np.float32]
    tied: bool

    @property
    def hidden_size(self) -> int:
        """Length of an embedding."""
        return len(self.importance)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormatCurves:
    """The curves of one format, as its ``CurveMaker`` measured them. The format's own reader checks and explains them.

    Attributes:
        version: Of their meaning.
        header: What they depend on beside the model, as plain JSON.
        linears: By linear and by name; and those of ``Measurement.layer_embedding``.
        table: Those of the token embeddings, by name.
    """

    version: int
    header: dict[str, Any]
    linears: Mapping[str, Mapping[str, NDArray[Any]]]
    table: Mapping[str, NDArray[Any]]

    def checked(self, where: str, table: str) -> MeasuredTensors:
        """Return all of them as ``OWNER.NAME``, to be checked as they are taken.

        Args:
            where: What messages begin with.
            table: Name of the token embeddings.
        """
        owners = {**self.linears, table: self.table}
        return MeasuredTensors(where, {f"{owner}.{key}": x for owner, own in owners.items() for key, x in own.items()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Measurement:
    """Everything that allocation and rounding need, for any bitrate.

    Attributes:
        linears: Decoder linears in model order.
        head: The output head.
        embedding: The token embeddings.
        layer_embedding: The table of embeddings that every block has of its own, side by side; None for most models.
        other_weights: Number of all weights that belong to none of them.
        tokens: Token ids of the calibration sequences, int32, shape (rows, tokens).
        curves: Every measured format's curves, by its name.
        provenance: Fingerprints, calibration description, options, version, and what the model's blocks are made of:
            plain JSON.
        config: The language model's config.json; empty in files of older versions.
    """

    linears: tuple[MeasuredLinear, ...]
    head: MeasuredLinear
    embedding: MeasuredTable
    other_weights: int
    tokens: NDArray[np.int32]
    curves: Mapping[str, FormatCurves]
    provenance: dict[str, Any]
    layer_embedding: MeasuredTable | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return how much was measured, and for which formats."""
        rows, row_tokens = self.tokens.shape
        return (
            f"Measurement({len(self.linears)} linears, {rows} sequences of {row_tokens} tokens, "
            f"for {', '.join(self.curves)})"
        )

    def curves_of(
        self, name: str, version: int, *, remedy: str = _MEASURE_AGAIN
    ) -> tuple[FormatCurves, MeasuredTensors]:
        """Return the curves of a format, and their tensors as ``OWNER.NAME``, for its reader to check.

        Args:
            name: Name of the format.
            version: The only version of its curves that its reader takes.
            remedy: What to do where the format was not measured, as a sentence.

        Raises:
            ConfigError: The format was not measured.
            FormatError: Its curves are of another version.
        """
        where = f"measurement: {CURVES}{name}"
        if name not in self.curves:
            raise ConfigError(
                f"{where}: this format was not measured. Got {', '.join(self.curves) or 'no curves'}. Expected {name}. "
                f"{remedy}"
            )
        curves = self.curves[name]
        if curves.version != version:
            raise FormatError(
                f"{where}: curves of another version. Got {curves.version}. Expected {version}. {_MEASURE_AGAIN}"
            )
        return curves, curves.checked(where, self.embedding.name)

    @property
    def without_feedback(self) -> tuple[str, ...]:
        """Linears whose Gram matrix could not be factored, however damped: they are rounded without error feedback.

        Their curves were measured so, hence they look costlier and the allocation gives them wider formats.
        """
        return tuple(linear.name for linear in (*self.linears, self.head) if linear.damping == float("inf"))

    @property
    def precision(self) -> str:
        """How products of the measuring passes were computed; see ``bpwise.linalg.products``."""
        return str(self.provenance.get("precision", "float32"))

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
        return hashlib.sha256(self._image()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """Return the file's content: a safetensors image with provenance and fingerprint in its metadata."""
        return self._image(sha256=self.fingerprint)

    def _image(self, **more: str) -> bytes:
        linears = (*self.linears, self.head)
        tensors = {f"{linear.name}.{field}": getattr(linear, field) for linear in linears for field in _FIELDS}
        tensors |= {f"{x.name}.{_FACTORS}": x.input_factors for x in linears if x.input_factors is not None}
        own = self.layer_embedding
        tables = (self.embedding,) if own is None else (self.embedding, own)
        tensors |= {f"{table.name}.{_IMPORTANCE}": table.importance for table in tables}
        tensors[_TOKENS] = self.tokens
        shared: dict[bytes, str] = {}
        owners = {x.name: shared.setdefault(x.token_weights.tobytes(), x.name) for x in linears}
        tensors |= {f"{x.name}.{_WEIGHTS}": x.token_weights for x in linears if owners[x.name] == x.name}
        for name, curves in self.curves.items():
            checked = curves.checked("", self.embedding.name)
            tensors |= {f"{CURVES}{name}/{key}": values for key, values in checked.tensors.items()}
        header = {
            "version": MEASUREMENT_VERSION,
            "linears": [linear.name for linear in self.linears],
            "head": self.head.name,
            "embedding": {
                "name": self.embedding.name,
                "tokens": self.embedding.tokens,
                "tied": self.embedding.tied,
            },
            "layer_embedding": None if own is None else {"name": own.name, "tokens": own.tokens, "tied": False},
            "other_weights": self.other_weights,
            "token_weights": owners,
            "curves": {
                name: {"version": curves.version, "header": curves.header} for name, curves in self.curves.items()
            },
            # JSON knows no infinity: a damping of null means that feedback was given up.
            "damping": {x.name: x.damping if np.isfinite(x.damping) else None for x in linears},
            "chosen_tokens": {x.name: x.chosen_tokens for x in self.linears if x.chosen_tokens is not None},
            "provenance": self.provenance,
            **({"config": dict(self.config)} if self.config else {}),
            **more,
        }
        # One entry only: safetensors writes several in an order that differs from run to run.
        contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        image: bytes = save(contiguous, metadata={HEADER_KEY: json.dumps(header)})
        return image

    def save(self, path: str | Path) -> None:
        """Write the measurement, atomically; an existing file is replaced."""
        with atomic_file(Path(path)) as temporary:
            write(temporary, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Measurement:
        """Read a measurement file.

        Raises:
            FormatError: It is not a measurement, is damaged, has changed since it was written, or has another version.
        """
        header, tensors = read_measurement(Path(path), MEASUREMENT_VERSION)
        tokens = tensors.take(_TOKENS, np.int32, (None, None))
        if tokens.max() >= header.embedding.tokens:
            most = header.embedding.tokens - 1
            raise tensors.error(_TOKENS, "holds ids beyond the vocabulary", str(tokens.max()), f"at most {most}")
        weights = {
            owner: tensors.take(f"{owner}.{_WEIGHTS}", np.float16, tokens.shape)
            for owner in set(header.token_weights.values())
        }

        def linear(name: str) -> MeasuredLinear:
            fisher = tensors.take(f"{name}.fisher", np.float32, (None,))
            power = tensors.take(f"{name}.input_power", np.float32, (None,))
            damping, factors = header.damping[name], f"{name}.{_FACTORS}"
            return MeasuredLinear(
                name=name,
                fisher=fisher,
                input_power=power,
                coupling=tensors.take(f"{name}.coupling", np.float16, (len(fisher), None), least=None, empty=True),
                token_weights=weights[header.token_weights[name]],
                damping=float("inf") if damping is None else damping,
                chosen_tokens=header.chosen_tokens.get(name),
                input_factors=tensors.take(factors, np.float32, power.shape) if factors in tensors.tensors else None,
            )

        def format_curves(name: str) -> FormatCurves:
            more = [] if header.layer_embedding is None else [header.layer_embedding.name]
            linears = tensors.curves(name, [*header.linears, header.head, *more, header.embedding.name])
            own = linears.pop(header.embedding.name)
            described = header.curves[name]
            return FormatCurves(version=described.version, header=described.header, linears=linears, table=own)

        def measured_table(known: EmbeddingHeader) -> MeasuredTable:
            return MeasuredTable(
                name=known.name,
                tokens=known.tokens,
                importance=tensors.take(f"{known.name}.{_IMPORTANCE}", np.float32, (None,)),
                tied=known.tied,
            )

        measurement = cls(
            linears=tuple(linear(name) for name in header.linears),
            head=linear(header.head),
            embedding=measured_table(header.embedding),
            layer_embedding=None if header.layer_embedding is None else measured_table(header.layer_embedding),
            other_weights=header.other_weights,
            tokens=tokens,
            curves={name: format_curves(name) for name in header.curves},
            provenance=header.provenance,
            config=header.config,
        )
        if header.sha256 not in (None, measurement.fingerprint):
            raise FormatError(
                f"{path}: has changed since it was written. Got fingerprint {measurement.fingerprint}. Expected "
                f"{header.sha256}. {_MEASURE_AGAIN}"
            )
        return measurement


def is_measurement(path: Path) -> bool:
    """Return whether a file is a measurement, of this version or another; behind its head it may be damaged."""
    return metadata_begins(path, f'"{HEADER_KEY}":')

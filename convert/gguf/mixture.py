"""A GGUF file in one of llama.cpp's fixed mixtures: byte for byte what llama-quantize makes; nothing is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...checkpoint.equalized.view import equalized
from ...checkpoint.model.names import text_config
from ...checkpoint.source.checkpoint import Checkpoint
from ...errors import CheckpointError, FormatError, UnsupportedModelError
from ...linalg.parallel import cores
from ...measure.measurement import Measurement, is_measurement
from ...progress import Progress
from ...tables import Table
from ..conversion import Provenance, SizeForecast, Target
from ..model import Description, Verification
from ..plan import LinearCost, Plan
from ..rounding import RoundedModel
from .conversion import GgufConversion
from .file.header import GgufHeader, GgufTensor
from .file.split import read_model_header
from .file.writer import write_gguf
from .ggml.kernels import require_kernels
from .ggml.types import TYPES, GgmlType
from .labels import coming_header
from .llama_cpp.assign import mixture_types, require_importance
from .llama_cpp.imatrix import ImportanceMatrix, imatrix_metadata, read_imatrix, require_fitting
from .llama_cpp.importance import importance_of
from .llama_cpp.mixtures import mixture
from .model.names import gguf_name
from .options import GgufOptions
from .plan.measured import gguf_curves
from .plan.plan import type_shares

__all__ = ["MixtureConversion", "MixturePlan"]


@dataclass(frozen=True, slots=True, eq=False)
class MixturePlan(Plan):
    """Types of all tensors as a mixture has them.

    Attributes:
        name: The mixture.
        tensors: The unquantized tensors, by their names in the file.
        types: The type of each.
        importances: Where importances come from; None if there are none.
    """

    format: ClassVar[str] = "gguf"
    name: str
    tensors: Mapping[str, GgufTensor]
    types: Mapping[str, GgmlType]
    importances: str | None = None

    @property
    def kinds(self) -> Mapping[str, GgmlType]:
        """Type of every tensor, by its name in the file."""
        return self.types

    @property
    def damage_nats(self) -> None:
        """None: nothing was measured."""
        return

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors' data, in bytes."""
        return sum(
            math.prod(tensor.shape[:-1]) * self.types[name].row_bytes(tensor.shape[-1])
            for name, tensor in self.tensors.items()
        )

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors of the file, as llama.cpp counts."""
        return 8 * self.stored_bytes / sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def identity(self) -> Any:
        """Return the mixture's name and all types."""
        return [self.name, {name: self.types[name].name for name in sorted(self.types)}]

    def save(self, path: str | Path) -> None:
        """Write nothing: the mixture's name says it all."""

    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every tensor gets."""
        return tuple(LinearCost(name, kind.bits_per_weight) for name, kind in self.types.items())

    def shares(self) -> dict[str, float]:
        """Return the share of all weights in each type, the largest type first."""
        return type_shares((self.types[name], math.prod(tensor.shape)) for name, tensor in self.tensors.items())

    def describe(self) -> Description:
        """Return what is in the plan."""
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items())
        facts = [f"{self.bpw:.4f} bits per weight over all tensors", f"weights: {shares}"]
        facts += [] if self.importances is None else [f"errors weighted with the importances of {self.importances}"]
        rows = tuple((name, kind.name, f"{kind.bits_per_weight:.3f}") for name, kind in self.types.items())
        table = Table(("tensor", "type", "bpw"), rows)
        return Description(kind=f"mixture {self.name}", facts=tuple(facts), table=table, content=self.content())


class MixtureConversion(GgufConversion):
    """See ``Conversion``."""

    def __init__(self, checkpoint: Checkpoint, options: GgufOptions) -> None:
        """See ``Conversion``."""
        super().__init__(checkpoint, options)
        self._mixture = mixture(options.mixture or "")

    @property
    def inputs(self) -> tuple[Path, ...]:
        """See ``Conversion``."""
        return (*super().inputs, *(() if self.options.imatrix is None else (self.options.imatrix,)))

    @cached_property
    def _matrix(self) -> ImportanceMatrix | None:
        path = self.options.imatrix
        if self._measured is not None:
            return importance_of(self._measured, gguf_curves(self._measured).layout, of_original=True)
        return None if path is None else read_imatrix(path)

    @cached_property
    def _measured(self) -> Measurement | None:
        path = self.options.imatrix
        return Measurement.load(path) if path is not None and is_measurement(path) else None

    def prepare(
        self, work: Path, progress: Progress, measurement: Path | None = None
    ) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """See ``Conversion``; the measurement of another model is refused first."""
        if self._measured is not None:
            self.checkpoint.prepare_fingerprint(progress)
            model = self._measured.provenance.get("model")
            if model != self.checkpoint.fingerprint and model != equalized(self.checkpoint).fingerprint:
                raise FormatError(
                    f"{self.options.imatrix}: the measurement belongs to another model than "
                    f"{self.checkpoint.directory}. Measure this one, or export an imatrix and name that."
                )
        return super().prepare(work, progress, measurement)

    def require_support(self) -> None:
        """Refuse missing tools, and importances that do not fit, as far as that is known before converting."""
        if TYPES[self._mixture.default].quantized:
            require_kernels()
        self.require_converter()
        hidden_size = text_config(self.checkpoint.config).get("hidden_size")
        if self._matrix is None and isinstance(hidden_size, int):
            require_importance(self._mixture, hidden_size)

    def forecast(
        self, target: Target | None, measured: Measurement | None, provenance: Provenance | None = None
    ) -> SizeForecast:
        """Return what the file takes; roughly where the converter's names for tensors are not known before it ran."""
        header = self._coming_header()
        if header is None:
            bpw = TYPES[self._mixture.default].bits_per_weight
            output_bytes = int(self.checkpoint.parameter_count * bpw / 8)
            facts = ("roughly: all types show once the model is converted",)
            return SizeForecast(output_bytes=output_bytes, bpw=bpw, lowest_bpw=bpw, highest_bpw=bpw, facts=facts)
        plan = MixturePlan(self._mixture.name, header.tensors, self._types_of(header))
        bpw = plan.bpw
        return SizeForecast(output_bytes=plan.stored_bytes, bpw=bpw, lowest_bpw=bpw, highest_bpw=bpw)

    def _coming_header(self) -> GgufHeader | None:
        # What the converter will write, as far as mixtures look at it; None where a tensor's name is not known.
        if self.given_base is not None:
            return read_model_header(self.given_base)
        try:
            source = self.source
        except (CheckpointError, UnsupportedModelError):  # a mixture needs no more than the converter does
            return None
        known = not source.others and all(map(gguf_name, source.names))
        return coming_header(source) if known else None

    @cached_property
    def _types(self) -> dict[str, GgmlType]:
        return self._types_of(self.header)

    def _types_of(self, header: GgufHeader) -> dict[str, GgmlType]:
        importance = None if self._matrix is None else self._matrix.sums.keys()
        return mixture_types(self._mixture, header, importance=importance)

    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> MixturePlan:
        """See ``Conversion``."""
        if self._matrix is not None:
            require_fitting(self._matrix, {name: tensor.shape for name, tensor in self.header.tensors.items()})
        return self._plan(self.header.tensors, self._types)

    def finished_plan(self, output: Path, saved: Path) -> MixturePlan:
        """See ``Conversion``; the output tells it."""
        tensors = read_model_header(output).tensors
        return self._plan(tensors, {name: tensor.type for name, tensor in tensors.items()})

    def _plan(self, tensors: Mapping[str, GgufTensor], types: Mapping[str, GgmlType]) -> MixturePlan:
        path = self.options.imatrix
        named = None if path is None else f"{'' if self._measured is None else 'measurement '}{path.name}"
        return MixturePlan(self._mixture.name, tensors, types, named)

    def write(
        self,
        rounded: RoundedModel | None,
        output: Path,
        plan: Any,
        measurement: Measurement | None,
        provenance: Provenance,
        progress: Progress,
    ) -> Verification:
        """See ``Conversion``."""
        matrix = self._matrix
        self.write_beside(output)
        return write_gguf(
            self.base,
            output,
            plan.types,
            split_max_bytes=self.options.split_max_size,
            file_type=self._mixture.file_type,
            importance=None if matrix is None else matrix.mean_squares,
            metadata={} if matrix is None else imatrix_metadata(matrix, str(self.options.imatrix)),
            run=provenance.run,
            threads=cores(),
            progress=progress,
        )

"""One original on its way to a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...checkpoint.files.digests import file_digests
from ...checkpoint.model.families import EMBEDDING
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import LanguageModel, language_model
from ...checkpoint.source.linears import Linear, model_linears
from ...errors import BudgetError, ConfigError, FormatError, UnsupportedModelError
from ...linalg.parallel import cores
from ...measure.measurement import Measurement
from ...measure.text.context import context_tokens
from ...progress import Progress
from ..conversion import Conversion, Provenance, SizeForecast, Target
from ..model import Verification
from ..plan import Plan
from ..rounding import RoundedModel
from .base import BASE, base_identity, base_path, base_to_make, converted, projector_path, write_projector
from .curves import gguf_curves
from .engine.gate import gate_once
from .file.header import GgufHeader, read_gguf_header
from .file.metadata import CALIBRATION_KEY, LIMITS_KEY, RUN_KEY, SPANS_KEY, VERSION_KEY
from .file.names import architecture_of, known_model_types, row_order
from .file.reader import GgufModel
from .file.writer import planned_bytes, write_gguf
from .ggml.curves import measured_types
from .ggml.kernels import Bytes, require_kernels
from .llama_cpp.assign import dominant_file_type
from .llama_cpp.converter import find_converter
from .llama_cpp.importance import importance_of, tensor_name
from .llama_cpp.readers import require_llama_cpp
from .llama_cpp.vram import room_for_weights
from .making import make_gguf_plan, require_gguf_plan
from .options import GgufOptions
from .plan import GgufPlan
from .rounder import GgufRounder

__all__ = ["GgufConversion", "require_known"]

_ALIGNMENT_BYTES = 32

_GATE = ".gate.json"
"""What came out of running the base in llama.cpp, beside a base of our own."""


class GgufConversion(Conversion):
    """See ``Conversion``."""

    options: GgufOptions

    def __init__(self, checkpoint: Checkpoint, options: GgufOptions) -> None:
        """See ``Conversion``."""
        super().__init__(checkpoint, options)
        self.writes_card = options.card
        self.inputs = () if options.base is None else (options.base,)
        self._base: Path | None = None
        self._base_digest = ""

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """See ``Conversion``."""
        return require_llama_cpp(self.checkpoint.config)

    @cached_property
    def _source(self) -> LanguageModel:
        return language_model(self.checkpoint)

    def require_support(self) -> None:
        """Refuse a family that GGUF files are not planned for, and missing tools."""
        require_known(
            self.checkpoint.config, "Give one of llama.cpp's mixtures with --type and --no-eval instead of a size."
        )
        require_kernels()
        self.require_converter()

    def require_converter(self) -> None:
        """Refuse a place of the converter where it is not; where none is named, it is fetched when it is needed."""
        if self.options.llama_cpp is not None and self.options.base is None:
            find_converter(self.options.llama_cpp)

    def forecast(
        self, target: Target | None, measured: Measurement | None, provenance: Provenance | None = None
    ) -> SizeForecast:
        """See ``Conversion``."""
        assert target is not None
        types = [kind.name for kind in measured_types()] if measured is None else gguf_curves(measured).types
        source = self._source
        linears, head = model_linears(source)
        tensors = [*linears, *([] if source.tied_embeddings else [head])]
        planned = {f"{linear.name}.weight" for linear in (*linears, head)} | {EMBEDDING}
        other_weights = sum(math.prod(source.shape(name)) for name in source.names - planned)
        table = Linear(EMBEDDING.removesuffix(".weight"), head.in_features, head.out_features)
        limits = require_gguf_plan(
            tensors,
            table,
            other_weights,
            types,
            bpw=target.bpw,
            tensor_bytes=self._tensor_bytes(target, provenance),
            overrides=self.options.overrides,
        )
        weights = sum(each.in_features * each.out_features for each in (*tensors, table)) + other_weights
        return SizeForecast(
            output_bytes=limits.target_bytes,
            bpw=8 * limits.target_bytes / weights if target.bpw is None else target.bpw,
            lowest_bpw=8 * limits.least_bytes / weights,
            highest_bpw=8 * limits.most_bytes / weights,
        )

    def beside(self, output: Path) -> tuple[Path, ...]:
        """Return the file with what the model sees images with, if it does. See ``Conversion``."""
        path = None if self.options.base is not None else projector_path(self.checkpoint, output)
        return () if path is None else (path,)

    def write_beside(self, output: Path) -> None:
        """Write the files of ``beside``; a note says so where the converter makes none."""
        for path in self.beside(output):
            missing = write_projector(self.checkpoint, path, self.options.llama_cpp)
            if missing is not None and missing not in self.notes:
                self.notes = (*self.notes, missing)

    def require_readable(self) -> None:
        """See ``Conversion``."""
        if self._base is not None:
            GgufModel.open(self._base)

    def scratch(self, work: Path, measurement: Path | None = None) -> Mapping[Path, int]:
        """See ``Conversion``."""
        base = base_to_make(self.checkpoint, work, measurement)
        return {} if base is None or self.options.base is not None else {base: self.checkpoint.total_bytes}

    def prepare(
        self, work: Path, progress: Progress, measurement: Path | None = None
    ) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Convert the model to the unquantized file that is quantized. See ``Conversion``."""
        if self._base is not None:
            return ()
        if self.options.base is not None:
            self._base = self.options.base
        else:
            find_converter(self.options.llama_cpp, progress)
            self.checkpoint.prepare_fingerprint(progress)
            self._base = base_path(self.checkpoint, work, self.options.llama_cpp, measurement)
        notes = converted(self.checkpoint, self._base, self.options.llama_cpp)
        kept = None if self.options.base is not None else self._base.with_suffix(_GATE)
        gate = gate_once(self._base, self.checkpoint, work, kept=kept)
        gate.require()
        self.notes = (*notes, *gate.notes)
        self.details = {"Base": {"in llama.cpp": gate.sentence}}
        if self.measures:  # otherwise the file says nothing of its run
            self._base_digest = file_digests([self._base], FormatError, progress)[0]
        if self.measures and self.options.feedback:
            GgufModel.open(self._base)  # rounding will
        if self.options.base is not None:
            return ()
        return ((BASE, base_identity(self.checkpoint, self.options.llama_cpp)),)

    @property
    def base(self) -> Path:
        """The unquantized file, once it is prepared."""
        assert self._base is not None, "prepare comes first"
        return self._base

    @cached_property
    def header(self) -> GgufHeader:
        """Header of the unquantized file."""
        return read_gguf_header(self.base)

    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> Plan:
        """See ``Conversion``."""
        assert measurement is not None
        assert target is not None
        tensor_bytes = self._tensor_bytes(target, provenance)
        overrides = self.options.overrides
        return make_gguf_plan(measurement, bpw=target.bpw, tensor_bytes=tensor_bytes, overrides=overrides)

    def identity(self) -> Any:
        """See ``Conversion``."""
        return [self._base_digest, self.options.feedback]

    def rounder(self, plan: GgufPlan, measurement: Measurement) -> GgufRounder | None:
        """See ``Conversion``."""
        return GgufRounder(plan, measurement, self.checkpoint) if self.options.feedback else None

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
        assert measurement is not None
        self.write_beside(output)  # first: an output that is there is complete
        types = {tensor_name(name): kind for name, kind in plan.kinds.items()}
        distances = {} if rounded is None else rounded.numbers("distance")
        return write_gguf(
            self.base,
            output,
            types,
            file_type=dominant_file_type(types, self.header),
            encoded={} if rounded is None else self._in_file_order(rounded),
            distances={tensor_name(name): distance for name, distance in distances.items()},
            importance=importance_of(measurement).mean_squares,
            metadata=_metadata(provenance),
            threads=cores(),
        )

    def _in_file_order(self, rounded: RoundedModel) -> dict[str, Callable[[], Bytes]]:
        # What makes each tensor's bytes, by its name in the file, with the file's order of rows.
        model = GgufModel.open(self.base)
        architecture = architecture_of(model.header.metadata["general.architecture"])

        def data(name: str) -> Bytes:
            order = row_order(f"{name}.weight", architecture, model.config)
            rows: Bytes = rounded.artifact(name)["data"].numpy()
            return rows if order is None else rows[order.numpy()]

        return {tensor_name(name): partial(data, name) for name in rounded.names}

    def _tensor_bytes(self, target: Target, provenance: Provenance | None) -> int | None:
        # What a largest size leaves for tensors beside the file's own metadata, as far as these are known; None where
        # bits per weight are asked for.
        max_bytes = self._largest_file(target)
        if max_bytes is None or provenance is None or self._base is None:
            return max_bytes
        tensors = sum(tensor.size_bytes for tensor in self.header.tensors.values())
        overhead = planned_bytes(self.header, {}, file_type=0, metadata=_metadata(provenance))
        room = max_bytes - (overhead - tensors) - _ALIGNMENT_BYTES * len(self.header.tensors)
        if room <= 0:
            raise BudgetError(
                f"a file of {max_bytes} bytes has no room for tensors: metadata and vocabulary take "
                f"{max_bytes - room}. Ask for a larger file."
            )
        return room

    def _largest_file(self, target: Target) -> int | None:
        if target.vram_bytes is None:
            return target.max_bytes
        context = target.context_tokens or context_tokens(self._source)
        if context is None:
            raise ConfigError(
                "config.json: max_position_embeddings is missing. Give the length of the context: --context."
            )
        return room_for_weights(target.vram_bytes, self._source.config, context)


def require_known(config: Mapping[str, Any], hint: str) -> None:
    """Refuse a family whose files can be neither planned nor read back.

    Args:
        config: config.json.
        hint: What else can be done.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    model_type = config.get("model_type")
    if model_type not in known_model_types():
        raise UnsupportedModelError(
            f"config.json: GGUF files of model_type {model_type!r} cannot be planned or read back. Expected one of "
            f"{', '.join(known_model_types())}. {hint}"
        )


def _metadata(provenance: Provenance) -> dict[str, str]:
    return {
        RUN_KEY: provenance.run,
        VERSION_KEY: provenance.version,
        CALIBRATION_KEY: provenance.calibration_text,
        SPANS_KEY: provenance.calibration_spans,
        **({LIMITS_KEY: "\n".join(provenance.warnings)} if provenance.warnings else {}),
    }

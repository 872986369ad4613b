"""One original on its way to a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...checkpoint.equalized.view import EQUALIZED
from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...errors import FormatError
from ...linalg.parallel import cores
from ...measure.measurement import Measurement
from ...progress import Progress, silent
from ..conversion import Provenance, SizeForecast, Target
from ..model import QuantizedModel, Verification
from ..plan import Plan
from ..rounding import Refinement, RoundedModel
from .base import BASE, BasedConversion, base_identity, base_path, converted
from .curves import GgufCurves
from .engine.gate import gate_once
from .file.header import GgufHeader
from .file.metadata import (
    CALIBRATION_KEY,
    DIGEST_KEY,
    DIGEST_ROOM,
    EFFORT_KEY,
    EQUALIZED_KEY,
    LIMITS_KEY,
    MAP_KEY,
    RUN_KEY,
    SPANS_KEY,
    VERSION_KEY,
    origin_metadata,
)
from .file.split import first_path, model_digest, read_model_header
from .file.writer import planned_parts, write_gguf
from .ggml.curves import measured_types
from .ggml.kernels import Bytes, require_kernels
from .ggml.work import GgufWork
from .llama_cpp.converter import find_converter
from .llama_cpp.imatrix import imatrix_notes
from .llama_cpp.importance import importance_of
from .llama_cpp.mixtures import MIXTURES
from .llama_cpp.readers import require_llama_cpp
from .model.mapped import MappedGguf
from .model.mapping import ROWS, kept_map, require_held
from .model.reader import GgufModel
from .options import GgufOptions
from .plan.layout import Layout
from .plan.making import bytes_for_vram, make_gguf_plan
from .plan.measured import gguf_curves
from .plan.plan import GgufPlan
from .plan.problem import PlanProblem, measured_problem
from .rounder import GgufRounder, rounded_matrices, tensor_distances
from .rows.rowmap import RowMap
from .rows.text import map_to_text
from .sizes import coming_problem, largest_file, room_for_tensors, room_in_vram
from .tuning import TunedGguf, tune_gguf

__all__ = ["GgufConversion"]

_GATE = ".gate.json"
"""What came out of running the base in llama.cpp, beside a base of our own."""

_MEASUREMENT = "bpwise measurement"
"""Where importances come from, in place of the name of an imatrix file."""


class GgufConversion(BasedConversion):
    """See ``Conversion``."""

    def __init__(self, checkpoint: Checkpoint, options: GgufOptions) -> None:
        """See ``Conversion``."""
        super().__init__(checkpoint, options)
        self.writes_card = options.card
        self.refines = options.effort == "high"
        self._base: Path | None = None
        self._base_digest = ""
        self._rows_store: ResumeStore | None = None
        self._progress: Progress = silent

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """See ``Conversion``."""
        return require_llama_cpp(self.checkpoint.config)

    def require_support(self) -> None:
        """Refuse missing tools."""
        require_kernels()
        self.require_converter()

    def forecast(
        self, target: Target | None, measured: Measurement | None, provenance: Provenance | None = None
    ) -> SizeForecast:
        """See ``Conversion``."""
        assert target is not None
        problem = self._problem(measured)
        wanted = problem.target_bytes(bpw=target.bpw, tensor_bytes=self._tensor_bytes(target, provenance, measured))
        return _size_forecast(problem, wanted, target.bpw)

    def work(self, bpw: float) -> GgufWork:
        """See ``Conversion``."""
        return GgufWork(bpw, feedback=self.measures and self.options.feedback)

    def _problem(self, measured: Measurement | None) -> PlanProblem:
        overrides = self.options.choices
        layout = None if self._base is None else self.layout
        if measured is not None:
            return measured_problem(measured, overrides, layout)
        return coming_problem(self.source, layout, overrides)

    def prepare(
        self, work: Path, progress: Progress, measurement: Path | None = None
    ) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Convert the model to the unquantized file that is quantized. See ``Conversion``."""
        if self._base is not None:
            return ()
        self.require_support()
        self._progress = progress
        if self.given_base is None:
            find_converter(self.options.llama_cpp, progress)
        self.checkpoint.prepare_fingerprint(progress)
        base = self.given_base or base_path(self.checkpoint, work, self.options.llama_cpp, measurement)
        kept = None if self.given_base is not None else base.with_suffix(_GATE)
        notes = converted(
            self.checkpoint,
            base,
            self.options.llama_cpp,
            check=lambda made: gate_once(made, self.checkpoint, work, kept=kept).require(),
        )
        self._base = base
        gate = gate_once(base, self.checkpoint, work, kept=kept)
        gate.require()
        self.notes = (*notes, *gate.notes)
        self.details = {"Base": {"in llama.cpp": gate.sentence}}
        steps: list[tuple[str, Mapping[str, Any]]] = []
        if self.given_base is None:
            steps.append((BASE, base_identity(self.checkpoint, self.options.llama_cpp)))
        if self.measures:  # otherwise the file says nothing of its run
            self._base_digest = model_digest(self.header, progress)
            steps.append((ROWS, {"model": self.checkpoint.fingerprint, "base": self._base_digest}))
            self._rows_store = ResumeStore(work, *steps[-1])
        return tuple(steps)

    @property
    def base(self) -> Path:
        """The unquantized file, once it is prepared."""
        assert self._base is not None, "prepare comes first"
        return self._base

    @cached_property
    def header(self) -> GgufHeader:
        """Header of the unquantized file."""
        return read_model_header(self.base)

    @cached_property
    def layout(self) -> Layout:
        """What the unquantized file holds, and whose rows, once it is prepared."""
        rows = kept_map(self._rows_store, self.source, self.header, self._progress)
        if self.measures:
            require_held(rows, self.source, self.header)
        return Layout.of(self.header, rows)

    def curves(self) -> GgufCurves:
        """See ``Conversion``."""
        return GgufCurves(measured_types(), self.layout)

    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> Plan:
        """See ``Conversion``."""
        assert measurement is not None
        assert target is not None
        _require_measured(self.base, self.layout, measurement)
        tensor_bytes = self._tensor_bytes(target, provenance, measurement)
        overrides = self.options.choices
        return make_gguf_plan(
            measurement, bpw=target.bpw, tensor_bytes=tensor_bytes, overrides=overrides, layout=self.layout
        )

    def placed(self, output: Path, plan: Any) -> Path:
        """Return the first part's path where the tensors do not fit into one file. See ``Conversion``."""
        return first_path(output, len(planned_parts(self.header, plan.kinds, self.options.split_max_size)))

    def identity(self, base_model: str | None) -> Any:
        """See ``Conversion``."""
        return [self._base_digest, self.options.feedback, self.options.effort, base_model]

    def opened(self, output: Path) -> QuantizedModel:
        """See ``Conversion``."""
        model = GgufModel.open(output)
        return model if model.stands_alone else MappedGguf(model.header, self.checkpoint, lambda: self.layout.rows)

    def rounder(self, plan: GgufPlan, measurement: Measurement) -> GgufRounder | None:
        """See ``Conversion``."""
        return GgufRounder(plan, measurement, self.checkpoint, self.layout.rows) if self.options.feedback else None

    def refine(self, rounded: RoundedModel, rounder: Any, refinement: Refinement) -> None:
        """See ``Conversion``."""
        tune_gguf(rounded, rounder, self.source, refinement)

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
        rows = self.layout.rows
        importance = importance_of(measurement, self.layout)
        rounder = self.rounder(plan, measurement)
        if rounded is not None and rounder is not None and self.refines:
            rounded = TunedGguf.of(rounded, rounder, self.source)
        return write_gguf(
            self.base,
            output,
            plan.kinds,
            split_max_bytes=self.options.split_max_size,
            file_type=MIXTURES[self.sizes.nearest(bpw=plan.bpw)].file_type,
            encoded={} if rounded is None else _encoded(rounded, plan, rows),
            distances={} if rounded is None else tensor_distances(rounded, rows),
            importance=importance.mean_squares,
            metadata=_metadata(provenance, self.header, rows, self.options.effort, entries=len(importance.sums)),
            threads=cores(),
        )

    def _tensor_bytes(
        self, target: Target, provenance: Provenance | None, measured: Measurement | None = None
    ) -> int | None:
        # What a largest size leaves for tensors beside the file's own metadata, which is in no GPU, as far as these are
        # known; None where bits per weight are asked for.
        if target.vram_bytes is not None and measured is not None:
            layout = None if self._base is None else self.layout
            return bytes_for_vram(measured, room_in_vram(target, self.source), self.options.choices, layout)
        max_bytes = largest_file(target, self.source, None if self._base is None else self.header)
        if max_bytes is not None and self._base is None and measured is not None and target.size_of is None:
            return max_bytes - gguf_curves(measured).layout.overhead_bytes
        if max_bytes is None or provenance is None or self._base is None or target.vram_bytes is not None:
            return max_bytes
        metadata = _metadata(provenance, self.header, self.layout.rows, self.options.effort)
        return room_for_tensors(max_bytes, self.header, metadata)


def _size_forecast(problem: PlanProblem, wanted: int, bpw: float | None) -> SizeForecast:
    least, most = problem.size_range
    return SizeForecast(
        output_bytes=min(wanted, most),
        bpw=8 * min(wanted, most) / problem.weights if bpw is None else bpw,
        lowest_bpw=8 * least / problem.weights,
        highest_bpw=8 * most / problem.weights,
    )


def _require_measured(base: Path, layout: Layout, measurement: Measurement) -> None:
    if not gguf_curves(measurement).layout.is_like(layout):
        raise FormatError(
            f"{base}: not the GGUF file that was measured. Got tensors of other shapes, or of other rows. "
            "Expected the measurement's. Measure again, or convert with the same converter."
        )


def _encoded(rounded: RoundedModel, plan: GgufPlan, rows: RowMap) -> dict[str, Callable[[], Iterator[Bytes]]]:
    # What makes the matrices of each tensor that was measured, by its name.
    return {
        tensor.name: partial(rounded_matrices, rounded, rows, tensor.name, tensor.shape)
        for tensor in plan.tensors
        if tensor.damage_nats is not None and set(tensor.linears) <= set(rounded.names)
    }


def _metadata(
    provenance: Provenance, base: GgufHeader, rows: RowMap, effort: str, *, entries: int = 0
) -> dict[str, Any]:
    # Entries: tensors whose importances are known; the size of what is returned does not depend on it.
    datasets, chunks = (provenance.calibration_text,), provenance.calibration_shape[0]
    return {
        **origin_metadata(base, provenance.base_model),
        **imatrix_notes(_MEASUREMENT, datasets, entries=entries, chunks=chunks),
        MAP_KEY: map_to_text(rows),
        RUN_KEY: provenance.run,
        VERSION_KEY: provenance.version,
        CALIBRATION_KEY: provenance.calibration_text,
        SPANS_KEY: provenance.calibration_spans,
        DIGEST_KEY: DIGEST_ROOM,
        **({EFFORT_KEY: effort} if effort == "high" else {}),
        **({EQUALIZED_KEY: str(provenance.changes[EQUALIZED])} if EQUALIZED in provenance.changes else {}),
        **({LIMITS_KEY: "\n".join(provenance.warnings)} if provenance.warnings else {}),
    }

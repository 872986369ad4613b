"""One original on its way to EXL2."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...checkpoint.files.digests import file_digests
from ...checkpoint.model.dtypes import FLOAT_DTYPES
from ...checkpoint.model.families import HEAD
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.hub import side_files
from ...checkpoint.source.language import LanguageModel, language_model
from ...checkpoint.source.linears import model_linears
from ...errors import CheckpointError
from ...measure.measurement import Measurement
from ...progress import Progress
from ..conversion import Conversion, Provenance, SizeForecast, Target
from ..model import Verification
from ..rounding import Refinement, RoundedModel
from .curves import Exl2Curves
from .file.config import require_side_files
from .file.writer import require_writable, write_model
from .options import Exl2Options
from .plan.making import make_exl2_plan
from .plan.measured import exl2_curves
from .plan.plan import Exl2Plan
from .plan.problem import AllocationProblem, SizeLimit, allocation_problem
from .plan.size_limit import disk_limit, gpu_limit
from .plan.unquantized import unquantized_lines
from .readers.limits import reader_warnings, require_reader
from .readers.names import Exl2Names
from .rounding.rounder import Exl2Rounder, rounded_linear, tune_rounded
from .rounding.work import Exl2Work

__all__ = ["Exl2Conversion"]


class Exl2Conversion(Conversion):
    """See ``Conversion``."""

    options: Exl2Options

    def __init__(self, checkpoint: Checkpoint, options: Exl2Options) -> None:
        """See ``Conversion``."""
        super().__init__(checkpoint, options)
        self.refines = options.effort == "high"

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """See ``Conversion``."""
        if not self.options.force:
            require_reader(self.checkpoint.config)
        return reader_warnings(self.checkpoint.config)

    @cached_property
    def _source(self) -> LanguageModel:
        return language_model(self.checkpoint)

    def require_support(self) -> None:
        """Refuse dtypes that cannot be carried over."""
        for name in sorted(self.checkpoint.names):
            info = self.checkpoint.info(name)
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{info.file}: tensor {name!r} cannot be carried over. Got "
                    f"{str(info.dtype).removeprefix('torch.')}. Expected float16, bfloat16 or float32. If it is not a "
                    "weight (a mask, positions), load the model in Transformers and save it again: save_pretrained "
                    "leaves it out."
                )

    def forecast(
        self, target: Target | None, measured: Measurement | None, provenance: Provenance | None = None
    ) -> SizeForecast:
        """See ``Conversion``."""
        assert target is not None
        group_size = self.options.group_size if measured is None else exl2_curves(measured).group_size
        problem = self._problem(group_size)
        size = self._size_limit(target)
        bits = problem.budget_bits_within(size) if size is not None else problem.budget_bits(target.bpw or 0)
        linears, _ = model_linears(self._source)
        stored_head = 0 if self._source.tied_embeddings else self._source.stored_bytes(f"{HEAD}.weight")
        planned = sum(self._source.stored_bytes(f"{each.name}.weight") for each in linears)
        head = stored_head if problem.head is None else 0
        lowest, highest = problem.bpw_range
        return SizeForecast(
            output_bytes=self.checkpoint.total_bytes
            - stored_head
            - planned
            + (bits + problem.head_alone_bits) // 8
            + head,
            bpw=bits / problem.weights if target.bpw is None else target.bpw,
            lowest_bpw=lowest,
            highest_bpw=highest,
            facts=(
                f"head bits {self.options.head}",
                *(f"in float16: {line}" for line in unquantized_lines(problem.unquantized, problem.head_reason)),
            ),
        )

    def work(self, bpw: float) -> Exl2Work:
        """See ``Conversion``."""
        return Exl2Work(self.options.group_size)

    def require_writable(self) -> None:
        """See ``Conversion``."""
        problem = self._problem(self.options.group_size)
        quantized = (*problem.quantized, *([problem.head] if problem.head else []))
        written = Exl2Names(self._source)
        require_writable(written, {written.prefix + linear.name for linear in quantized})
        require_side_files(self.checkpoint.directory)

    def curves(self) -> Exl2Curves:
        """See ``Conversion``."""
        return Exl2Curves(self.options.group_size)

    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> Exl2Plan:
        """See ``Conversion``."""
        assert measurement is not None
        assert target is not None
        return make_exl2_plan(
            measurement,
            bpw=target.bpw,
            size=self._size_limit(target),
            head_bits=self.options.head,
            overrides=self.options.overrides,
            keep_fp16=self.options.keep_fp16,
        )

    def identity(self, base_model: str | None) -> Any:
        """See ``Conversion``."""
        files = [self.checkpoint.file(name) for name in side_files(self.checkpoint.directory)]
        return [file_digests(files, CheckpointError), self.options.effort, self.options.shard_bytes]

    def rounder(self, plan: Exl2Plan, measurement: Measurement) -> Exl2Rounder:
        """See ``Conversion``."""
        return Exl2Rounder(plan, measurement)

    def refine(self, rounded: RoundedModel, rounder: Any, refinement: Refinement) -> None:
        """See ``Conversion``."""
        tune_rounded(rounded, self._source, refinement)

    def write(
        self,
        rounded: RoundedModel | None,
        output: Path,
        plan: Exl2Plan,
        measurement: Measurement | None,
        provenance: Provenance,
        progress: Progress,
    ) -> Verification:
        """See ``Conversion``."""
        assert rounded is not None
        rows, row_tokens = provenance.calibration_shape
        written = Exl2Names(self._source)
        return write_model(
            written,
            {
                written.prefix + name: partial(rounded_linear, rounded, self._source, name, tuned=self.refines)
                for name in rounded.names
            },
            output,
            quantization={
                "version": provenance.version,
                "bits": plan.target_bpw,
                "head_bits": plan.head_code_bits,
                "calibration": {"rows": rows, "length": row_tokens, "dataset": provenance.calibration_text},
            },
            provenance={
                "bpwise": provenance.version,
                "run": provenance.run,
                "model": provenance.model,
                **({"changes": dict(provenance.changes)} if provenance.changes else {}),
                "calibration": provenance.calibration,
                "calibration_spans": provenance.calibration_spans,
                "measurement": plan.measurement,
                "bpw": plan.bpw,
                "head_bits": plan.head_bits,
                "float16_linears": len(plan.unquantized),
                "effort": self.options.effort,
                "predicted_damage_nats": plan.damage_nats,
            },
            float16=[written.prefix + linear.name for linear in plan.unquantized],
            shard_bytes=self.options.shard_bytes,
        )

    def _problem(self, group_size: int) -> AllocationProblem:
        linears, head = model_linears(self._source)
        return allocation_problem(
            linears,
            head,
            group_size=group_size,
            head_bits=self.options.head,
            overrides=self.options.overrides,
            keep_fp16=self.options.keep_fp16,
        )

    def _size_limit(self, target: Target) -> SizeLimit | None:
        if target.max_bytes is not None:
            return disk_limit(self.checkpoint, target.max_bytes, shard_bytes=self.options.shard_bytes)
        if target.vram_bytes is not None:
            return gpu_limit(
                self.checkpoint,
                target.vram_bytes,
                context_tokens=target.context_tokens,
                cache_bits=self.options.cache_bits,
            )
        return None

"""One original on its way to MLX."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ...checkpoint.files.digests import file_digests
from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.hub import side_files
from ...checkpoint.source.language import LanguageModel, language_model
from ...checkpoint.source.linears import model_linears
from ...errors import CheckpointError, FormatError
from ...measure.measurement import Measurement
from ...progress import Progress
from ..conversion import Conversion, Provenance, SizeForecast, Target
from ..model import Verification
from ..rounding import RoundedModel
from .curves import MlxCurves
from .file.layout import Layout, StoredTensor
from .file.writer import write_mlx
from .grid.schemes import SCHEMES
from .grid.work import MlxWork
from .mlx_lm.keys import published_keys
from .mlx_lm.loading import STEP, KeptModel, layout_identity, load_layout, require_mlx_lm
from .options import MlxOptions
from .plan.measured import mlx_curves
from .plan.plan import MlxPlan
from .plan.problem import PlanProblem, measured_problem, plan_problem
from .rounder import MlxRounder

__all__ = ["MlxConversion"]


class MlxConversion(Conversion):
    """See ``Conversion``."""

    options: MlxOptions

    def __init__(self, checkpoint: Checkpoint, options: MlxOptions) -> None:
        """See ``Conversion``."""
        super().__init__(checkpoint, options)
        self._kept: KeptModel | None = None

    @cached_property
    def source(self) -> LanguageModel:
        """The original's language model."""
        return language_model(self.checkpoint)

    @property
    def kept(self) -> KeptModel:
        """The model as mlx-lm has it, once it is prepared."""
        assert self._kept is not None, "prepare comes first"
        return self._kept

    def require_support(self) -> None:
        """Refuse missing tools."""
        require_mlx_lm()

    def scratch(self, work: Path, measurement: Path | None = None) -> Mapping[Path, int]:
        """See ``Conversion``: a copy of the model, while mlx-lm runs."""
        made = any(work.glob(f"{STEP}-*/layout.safetensors"))
        return {} if made else {work / STEP: self.checkpoint.total_bytes}

    def prepare(
        self, work: Path, progress: Progress, measurement: Path | None = None
    ) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Have mlx-lm load the model. See ``Conversion``."""
        self.require_support()
        self.checkpoint.prepare_fingerprint(progress)
        identity = layout_identity(self.checkpoint)
        if self._kept is None:
            self._kept = load_layout(self.checkpoint, self.source, ResumeStore(work, STEP, identity), progress)
        return ((STEP, identity),)

    def curves(self) -> MlxCurves:
        """See ``Conversion``."""
        return MlxCurves(self.kept.layout)

    def forecast(
        self, target: Target | None, measured: Measurement | None, provenance: Provenance | None = None
    ) -> SizeForecast:
        """See ``Conversion``."""
        assert target is not None
        problem = self._problem(measured)
        wanted = problem.target_bytes(bpw=target.bpw, tensor_bytes=target.max_bytes)
        least, most = problem.size_range
        size = min(wanted, most)
        return SizeForecast(
            output_bytes=size,
            bpw=8 * size / problem.weights if target.bpw is None else target.bpw,
            lowest_bpw=8 * least / problem.weights,
            highest_bpw=8 * most / problem.weights,
        )

    def work(self, bpw: float) -> MlxWork:
        """See ``Conversion``."""
        return MlxWork(bpw)

    def identity(self, base_model: str | None) -> Any:
        """See ``Conversion``."""
        files = [self.checkpoint.file(name) for name in side_files(self.checkpoint.directory)]
        return [file_digests(files, CheckpointError), self.options.shard_bytes]

    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> MlxPlan:
        """See ``Conversion``."""
        assert measurement is not None
        if mlx_curves(measurement).layout != self.kept.layout:
            raise FormatError(
                f"{self.checkpoint.directory}: mlx-lm has other modules for this model than when it was measured. "
                "Measure again, or take the same version of mlx-lm."
            )
        plan = super().plan(measurement, target, provenance)
        assert isinstance(plan, MlxPlan)
        return plan

    def rounder(self, plan: MlxPlan, measurement: Measurement) -> MlxRounder:
        """See ``Conversion``."""
        return MlxRounder(plan, measurement, self.source, self.kept.layout)

    def write(
        self,
        rounded: RoundedModel | None,
        output: Path,
        plan: MlxPlan,
        measurement: Measurement | None,
        provenance: Provenance,
        progress: Progress,
    ) -> Verification:
        """See ``Conversion``."""
        assert rounded is not None
        return write_mlx(
            self.source,
            self.kept.layout,
            self.kept.kept,
            plan.kinds,
            {name: partial(rounded.artifact, name) for name in rounded.names},
            output,
            config={**self.checkpoint.config, **published_keys(self.checkpoint.config)},
            directory=self.checkpoint.directory,
            provenance={
                "bpwise": provenance.version,
                "run": provenance.run,
                "model": provenance.model,
                **({"changes": dict(provenance.changes)} if provenance.changes else {}),
                "calibration": provenance.calibration_text,
                "calibration_spans": provenance.calibration_spans,
                "measurement": plan.measurement,
                "predicted_damage_nats": plan.damage_nats,
                "warnings": list(provenance.warnings),
            },
            shard_bytes=self.options.shard_bytes,
            progress=progress,
        )

    def _problem(self, measured: Measurement | None) -> PlanProblem:
        # Before mlx-lm has loaded the model: as if every linear were a module.
        if measured is not None:
            return measured_problem(measured, self.options.overrides)
        layout = self._likely_layout() if self._kept is None else self._kept.layout
        names = [name for tensor in layout.tensors.values() for name in tensor.linears]
        channels = {name: x.shape[-1] for x in layout.tensors.values() for name in x.linears}
        free = {name: [0.0 if scheme.fits(channels[name]) else float("inf") for scheme in SCHEMES] for name in names}
        return plan_problem(layout, free, SCHEMES, self.options.overrides)

    def _likely_layout(self) -> Layout:
        linears, head = model_linears(self.source)
        table = self.source.embedding_name
        matrices = {each.name: (each.out_features, each.in_features) for each in linears}
        matrices[table] = (head.out_features, head.in_features)
        if not self.source.tied_embeddings:
            matrices[head.name] = matrices[table]
        tensors = {
            f"{name}.weight": StoredTensor(shape=shape, dtype="bfloat16", linears=(name,), outputs=shape[:1])
            for name, shape in matrices.items()
        }
        others = {
            name: StoredTensor(shape=self.source.shape(name) or (1,), dtype="bfloat16", source=name)
            for name in self.source.names - tensors.keys()
        }
        return Layout(tensors={**tensors, **others}, modules=tuple(matrices))

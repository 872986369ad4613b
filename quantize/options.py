"""What can be asked of a whole run, for each format."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from ..checkpoint.files.shards import DEFAULT_SHARD_BYTES
from ..checkpoint.source.checkpoint import Checkpoint
from ..convert.exl2.curves import Exl2Curves, exl2_curves
from ..convert.exl2.plan.problem import HeadBits, SizeLimit, WidthOverride, check_head_bits
from ..convert.exl2.plan.size_limit import disk_limit, gpu_limit
from ..convert.exl2.readers import reader_warnings, require_reader
from ..convert.gguf.curves import GgufCurves
from ..convert.gguf.llama_cpp.readers import require_llama_cpp
from ..convert.gguf.plan import Override
from ..convert.publishing.cards import check_base_model
from ..convert.vram import CACHE_BITS
from ..errors import ConfigError
from ..eval.config import EvalConfig
from ..measure.curves import CurveMaker
from ..measure.measurement import Measurement
from ..measure.run import MeasureConfig
from ..measure.text.calibration import CalibrationSet
from ..measure.text.context import CALIBRATION, fit_row_tokens
from .forecast import Forecast, forecast_run, tuning_memory
from .judge import refuse_same_source

__all__ = ["Effort", "GgufConfig", "QuantizeConfig"]

Effort = Literal["normal", "high"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """Options of the whole line to EXL2.

    Attributes:
        bpw: Decoder bits per weight, all overheads counted; met from below, never exceeded.
        max_bytes: Largest size of all files with tensors together.
        vram_bytes: Memory of a GPU that weights, cache and what ExLlamaV2 needs beside them should fit into; exactly
            one of the three is given.
        context_tokens: Length of the context whose cache should fit too; None for the model's own.
        cache_bits: 16 for a float16 cache, or ExLlamaV2's caches of 8, 6 or 4 bits.
        head_bits: Bits of the output head: 2, 3, 4, 5, 6, 8, 16 for unquantized, or ``auto``: see ``make_plan``.
        overrides: Widths that linears may have: see ``make_plan``.
        keep_fp16: Shell patterns of linears that stay in float16: see ``make_plan``.
        group_size: Rows that share a bit width and a scale; a multiple of 32.
        effort: ``high`` fits the decoder's scales to the original's predictions in the end (see ``tuning``), ``normal``
            does not.
        measure: Options of the measuring stage; its calibration rows and device serve rounding too.
        evaluate: Options of the evaluation, or None to leave it out.
        shard_bytes: Largest output file, in bytes.
        base_model: Hub id of the original for the model card; None takes it from where the original came from.
        force: Whether to quantize a model that EXL2 readers do not know, or would compute otherwise.
    """

    bpw: float | None = None
    max_bytes: int | None = None
    vram_bytes: int | None = None
    context_tokens: int | None = None
    cache_bits: int = 16
    head_bits: HeadBits = 6
    overrides: tuple[WidthOverride, ...] = ()
    keep_fp16: tuple[str, ...] = ()
    group_size: int = 32
    effort: Effort = "normal"
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluate: EvalConfig | None = field(default_factory=EvalConfig)
    shard_bytes: int = DEFAULT_SHARD_BYTES
    base_model: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if sum(target is not None for target in (self.bpw, self.max_bytes, self.vram_bytes)) != 1:
            raise ConfigError(
                "an EXL2 model needs one target: bits per weight, a largest size, or the memory of a GPU."
            )
        if self.bpw is not None and not 2 <= self.bpw <= 16:
            raise ConfigError(f"bpw must lie between 2 and 16, got {self.bpw}.")
        if self.cache_bits not in CACHE_BITS:
            raise ConfigError(f"cache_bits must be one of {CACHE_BITS}, got {self.cache_bits}.")
        check_head_bits(self.head_bits)
        Exl2Curves(self.group_size)
        if self.effort not in get_args(Effort):
            raise ConfigError(f"effort must be one of {get_args(Effort)}, got {self.effort!r}.")
        check_base_model(self.base_model)
        refuse_same_source(self.measure.calibration.source, self.evaluate)
        if self.shard_bytes <= 0:
            raise ConfigError(f"shard_bytes must be positive, got {self.shard_bytes}.")

    @property
    def curves(self) -> list[CurveMaker]:
        """What is measured."""
        return [Exl2Curves(self.group_size)]

    @property
    def offload_dirs(self) -> tuple[Path | None, ...]:
        """Where hidden states are kept, or None: of measuring and rounding, and of the evaluation."""
        return self.measure.offload_dir, None if self.evaluate is None else self.evaluate.offload_dir

    def reader_warnings(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Return what EXL2 readers compute otherwise than Transformers, as sentences to show before a run.

        Raises:
            UnsupportedModelError: They do not know the model or would compute another one, and it is not forced.
        """
        if not self.force:
            require_reader(checkpoint.config)
        return reader_warnings(checkpoint.config)

    def size_limit(self, checkpoint: Checkpoint) -> SizeLimit | None:
        """Return what a model must keep below; None if bits per weight are asked for.

        Raises:
            BudgetError: The memory of the GPU leaves nothing for weights.
            UnsupportedModelError: The family is unknown.
        """
        if self.max_bytes is not None:
            return disk_limit(checkpoint, self.max_bytes, shard_bytes=self.shard_bytes)
        if self.vram_bytes is not None:
            return gpu_limit(
                checkpoint, self.vram_bytes, context_tokens=self.context_tokens, cache_bits=self.cache_bits
            )
        return None

    def known(self, measured: Measurement | None, rows: CalibrationSet | None) -> QuantizeConfig:
        """Return the same with the number and length of the rows, and the group size, that are known already.

        Args:
            measured: A measurement to work from.
            rows: Calibration rows that are given.
        """
        source = rows if measured is None else measured
        if source is None:
            return self
        count, row_tokens = source.tokens.shape
        calibration = replace(self.measure.calibration, rows=count, row_tokens=row_tokens)
        group_size = self.group_size if measured is None else exl2_curves(measured).group_size
        return replace(self, measure=replace(self.measure, calibration=calibration), group_size=group_size)

    def forecast(self, checkpoint: Checkpoint) -> Forecast:
        """Return what a run will take; see ``forecast_run`` and ``tuning_memory``.

        Raises:
            BpwiseError: As ``forecast_run``; or rows are longer than the model's context.
        """
        row_tokens = fit_row_tokens(self.measure.calibration.row_tokens, checkpoint, CALIBRATION)
        measure = replace(self.measure, calibration=replace(self.measure.calibration, row_tokens=row_tokens))
        forecast = forecast_run(
            checkpoint,
            bpw=self.bpw,
            size=self.size_limit(checkpoint),
            head_bits=self.head_bits,
            group_size=self.group_size,
            config=measure,
            overrides=self.overrides,
            keep_fp16=self.keep_fp16,
        )
        if self.effort == "normal":
            return forecast
        return replace(forecast, memory_bytes=max(forecast.memory_bytes, tuning_memory(checkpoint, measure)))


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufConfig:
    """Options of the whole line to GGUF.

    Attributes:
        bpw: Bits per weight over all tensors of the file; met from below, never exceeded.
        max_bytes: Largest size of the whole file.
        vram_bytes: Memory of a GPU that file, cache and runtime should fit into; exactly one of the three is given.
        context_tokens: Length of the context whose cache should fit too; None for the model's own.
        overrides: Types that tensors must have.
        feedback: Whether linears are rounded with error feedback, block after block on what the quantized blocks before
            give them; otherwise by ggml alone, as llama-quantize does, in seconds. The plan is the same.
        llama_cpp: A llama.cpp checkout, or a directory with its converter; None for the usual place.
        measure: Options of the measuring stage; its calibration rows and device serve rounding too.
        evaluate: Options of the evaluation, or None to leave it out.
        card: Whether a model card ``NAME.README.md`` is written beside the file.
        base_model: Hub id of the original for the model card; None takes it from where the original came from.
    """

    bpw: float | None = None
    max_bytes: int | None = None
    vram_bytes: int | None = None
    context_tokens: int | None = None
    overrides: tuple[Override, ...] = ()
    feedback: bool = True
    llama_cpp: Path | None = None
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluate: EvalConfig | None = field(default_factory=EvalConfig)
    card: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if sum(target is not None for target in (self.bpw, self.max_bytes, self.vram_bytes)) != 1:
            raise ConfigError("a GGUF file needs one target: bits per weight, a largest size, or the memory of a GPU.")
        if self.bpw is not None and not 1 <= self.bpw <= 16:
            raise ConfigError(f"bpw must lie between 1 and 16, got {self.bpw}.")
        check_base_model(self.base_model)
        refuse_same_source(self.measure.calibration.source, self.evaluate)

    @property
    def curves(self) -> list[CurveMaker]:
        """What is measured."""
        made = GgufCurves.installed()
        return [] if made is None else [made]

    @property
    def offload_dirs(self) -> tuple[Path | None, ...]:
        """As ``QuantizeConfig.offload_dirs``."""
        return self.measure.offload_dir, None if self.evaluate is None else self.evaluate.offload_dir

    def reader_warnings(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Return what llama.cpp computes otherwise than Transformers, as sentences to show before a run.

        Raises:
            UnsupportedModelError: It would compute another model.
        """
        return require_llama_cpp(checkpoint.config)

"""Originals on their way into a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .model import QuantizedModel, Verification
from .plan import Plan

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import Checkpoint
    from ..measure.curves import CurveMaker
    from ..measure.measurement import Measurement
    from ..progress import Progress
    from .format import Format
    from .rounding import FormatWork, Refinement, RoundedModel, Rounder

__all__ = ["Conversion", "Provenance", "SizeForecast", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How large an output may be; exactly one of bpw, max_bytes, vram_bytes and size_of is given.

    Attributes:
        bpw: Bits per weight, as the format counts them; met from below, never exceeded.
        max_bytes: Largest size of all files with tensors together.
        vram_bytes: Memory of a GPU that weights, cache and what the reader needs beside them should fit into.
        context_tokens: With ``vram_bytes``: length of the context whose cache should fit; None for the model's own.
        size_of: As large as another program's file of that name, one of ``Format.size_names``: ``Q4_K_M``.
    """

    bpw: float | None = None
    max_bytes: int | None = None
    vram_bytes: int | None = None
    context_tokens: int | None = None
    size_of: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: None or several are given, or one makes no sense.
        """
        if sum(each is not None for each in (self.bpw, self.max_bytes, self.vram_bytes, self.size_of)) != 1:
            raise ConfigError(
                "target: none, or several. Expected bits per weight, a largest size, the memory of a GPU or a name to "
                "be as large as. Give one."
            )
        if self.bpw is not None and not 1 <= self.bpw <= 16:
            raise ConfigError(f"bpw: not usable. Got {self.bpw}. Expected a value between 1 and 16. Choose another.")

    @property
    def label(self) -> float | str:
        """The size in names of outputs: bits per weight, or as ``700MB`` or ``bpwise-Q4_K_M``."""
        if self.bpw is not None:
            return self.bpw
        if self.size_of is not None:
            return f"bpwise-{self.size_of}"
        size = self.max_bytes or self.vram_bytes or 0
        unit, factor = ("GB", 10**9) if size >= 10**9 else ("MB", 10**6)
        return f"{size / factor:.4g}{unit}{'' if self.vram_bytes is None else '-vram'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeForecast:
    """What an output will take, from shapes alone.

    Attributes:
        output_bytes: Size of its tensors, roughly.
        bpw: Bits per weight, as asked or as the asked size leaves.
        lowest_bpw: Smallest bits per weight possible.
        highest_bpw: Largest bits per weight possible.
        facts: What else there is to say, as lines.
    """

    output_bytes: int
    bpw: float
    lowest_bpw: float
    highest_bpw: float
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of an output, for its metadata.

    Attributes:
        version: Version of bpwise.
        run: Identifies the run: what the written bytes depend on.
        model: Fingerprint of the original.
        changes: What was changed while the original was read, as plain JSON.
        base_model: Hub id of the original; None if it is not known.
        calibration: Fingerprint of the calibration rows; empty where nothing was calibrated, as are the next three.
        calibration_text: What they are.
        calibration_spans: Hashes of them (see ``bpwise.eval.metrics.overlap``).
        calibration_shape: Their number, and the tokens in each.
        warnings: What readers of the format compute otherwise than Transformers, as sentences.
    """

    version: str
    run: str
    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    calibration: str = ""
    calibration_text: str = ""
    calibration_spans: str = ""
    calibration_shape: tuple[int, int] = (0, 0)
    warnings: tuple[str, ...] = ()


class Conversion(ABC):
    """One original on its way into a format.

    Attributes:
        checkpoint: The original.
        options: The format's options.
    """

    writes_card: bool = True
    """Whether a model card belongs to every output."""
    refines: bool = False
    """Whether ``refine`` does something."""
    notes: tuple[str, ...] = ()
    """What ``prepare`` found that a user should know, as sentences."""
    details: Mapping[str, Mapping[str, str | float]] = MappingProxyType({})
    """What it found, for reports: section -> entry -> value."""

    def __init__(self, checkpoint: Checkpoint, options: Any) -> None:
        """Hold both; nothing is read.

        Args:
            checkpoint: The original.
            options: The format's options.
        """
        self.checkpoint = checkpoint
        self.options = options

    @property
    def measures(self) -> bool:
        """Whether plans are made from a measurement."""
        return bool(self.options.measures)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files that are read beside the original; a ``CheckpointError`` tells of one that is not there."""
        return ()

    @property
    def tool(self) -> str:
        """Version of a program that ``prepare`` runs, as far as it is known before; empty where it runs none."""
        return ""

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What readers of the format compute otherwise than Transformers, as sentences.

        Raises:
            UnsupportedModelError: They do not know the model, or would compute another one.
        """
        return ()

    def require_support(self) -> None:
        """Refuse a model that the format cannot hold, or missing tools, by a ``BpwiseError``; costs next to no time."""

    def forecast(
        self, target: Target | None, measured: Measurement | None, provenance: Provenance | None = None
    ) -> SizeForecast:
        """Return what an output will take, from shapes alone.

        Args:
            target: How large it may be; None if ``measures`` is false.
            measured: A measurement that plans will be made from; None if there is none yet.
            provenance: What the output's metadata will say; None if that is not known yet.

        Raises:
            BudgetError: No plan has this size.
            ConfigError: Options match nothing or contradict each other.
        """
        if target is not None and target.vram_bytes is not None:
            raise ConfigError("--vram: not known how much memory this format's readers take. Give --bpw or --max-size.")
        bpw = 16.0 if target is None or target.bpw is None else target.bpw
        return SizeForecast(output_bytes=self.checkpoint.total_bytes, bpw=bpw, lowest_bpw=0.0, highest_bpw=16.0)

    def size_label(self, target: Target | None) -> float | str:
        """Return the size in names of outputs; ``target`` is None if ``measures`` is false."""
        return (self.options.label or "") if target is None else target.label

    def output_name(self, base_name: str, target: Target | None) -> str:
        """Return an output's name by convention, suffix included; ``base_name`` may be a Hub id."""
        return self._format.output_name(base_name, self.size_label(target), self.options)

    @property
    def _format(self) -> Format:
        from .registry import format_asking  # noqa: PLC0415 - it holds the formats, which hold this

        return format_asking(self.options)

    def work(self, bpw: float) -> FormatWork:
        """Return the format's work on an output of so many bits per weight, from shapes; for forecasts of time."""
        from .rounding import FormatWork  # noqa: PLC0415 - it needs torch; options do not

        return FormatWork()

    def require_writable(self) -> None:
        """Refuse by a ``BpwiseError`` what the writer would at its end; reads what is carried over as it is."""

    def beside(self, output: Path) -> tuple[Path, ...]:
        """Return the files of this format that ``write`` makes beside an output, or finds there from an earlier run."""
        return ()

    def require_readable(self) -> None:
        """Refuse by an ``UnsupportedModelError`` what could not be opened: before ``prepare``, and after it."""

    def scratch(self, work: Path, measurement: Path | None = None) -> Mapping[Path, int]:
        """Return the files that ``prepare`` will make, and about how large, in bytes; arguments as there."""
        return {}

    def prepare(
        self, work: Path, progress: Progress, measurement: Path | None = None
    ) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Make what a run needs before anything is measured.

        Args:
            work: Work directory to keep it in.
            progress: Shows how far it is.
            measurement: File of the measurement that the run works from; what serves other runs too may be kept beside
                it. None if there is none yet.

        Returns:
            Names and identities of the resume stores it lies in.
        """
        return ()

    @abstractmethod
    def curves(self) -> CurveMaker:
        """Return what measures the format's curves, once ``prepare`` is done; only asked for if ``measures`` is true.

        Raises:
            BpwiseError: What ``prepare`` made does not fit the original.
        """

    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> Plan:
        """Choose what every linear or tensor gets.

        Args:
            measurement: What was measured; None if ``measures`` is false.
            target: How large the output may be; None if ``measures`` is false.
            provenance: What the output's metadata will say; its run may be a placeholder of the same length.

        Raises:
            BudgetError: No plan has this size.
        """
        assert measurement is not None, "nothing is measured for this format"
        assert target is not None, "nothing is asked of this format"
        return self._format.plan(measurement, self.options, bpw=target.bpw, max_bytes=target.max_bytes)

    def finished_plan(self, output: Path, saved: Path) -> Plan:
        """Return the plan that a finished output was made by; ``saved`` is where its run has saved it, if it has.

        Raises:
            FormatError: It cannot be read.
        """
        from .registry import load_plan  # noqa: PLC0415 - it holds the formats, which hold this

        return load_plan(saved)

    def placed(self, output: Path, plan: Any) -> Path:
        """Return the path by which an output is opened: another one where the plan asks for several files."""
        return output

    def identity(self, base_model: str | None) -> Any:
        """Return what written bytes depend on beside original, calibration rows and plan, as plain JSON."""
        return None

    @abstractmethod
    def rounder(self, plan: Any, measurement: Measurement) -> Rounder | None:
        """Return what rounds linears; None where the writer does it alone."""

    def opened(self, output: Path) -> QuantizedModel:
        """Open a finished output as it is evaluated.

        Raises:
            BpwiseError: It breaks the format's rules.
        """
        return self._format.open(output).beside(self.checkpoint)

    def refine(self, rounded: RoundedModel, rounder: Any, refinement: Refinement) -> None:
        """Improve on all that ``rounder`` has made, end to end; what is found is kept in the same store.

        Raises:
            NumericalError: NaN or infinity in activations or gradients.
        """

    @abstractmethod
    def write(
        self,
        rounded: RoundedModel | None,
        output: Path,
        plan: Any,
        measurement: Measurement | None,
        provenance: Provenance,
        progress: Progress,
    ) -> Verification:
        """Write the output, which appears only once everything in it has been read back and found right.

        Args:
            rounded: What the rounder made; None if there was none.
            output: Directory or file to make.
            plan: What every linear or tensor gets.
            measurement: What was measured; None if ``measures`` is false.
            provenance: What the output says of where it comes from.
            progress: Shows how far the writing is.

        Raises:
            BpwiseError: It cannot be written, or does not read back as intended.
        """

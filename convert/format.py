"""A format is one object. It knows all that is special to it; everything else reaches it through this protocol.

``Format`` recognises and opens finished models. ``Conversion`` takes one original into the format, with the options
that only this format has: curves to measure, a plan, a rounder, a writer. ``docs/adding-a-format.md`` walks through
one that is complete in 150 lines.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ..tables import Table
from .options import Conflict, FormatOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..checkpoint.source.checkpoint import Checkpoint, TensorSource
    from ..measure.curves import CurveMaker
    from ..measure.measurement import MeasuredLinear, Measurement
    from ..progress import Progress
    from .rounded import RoundedModel

__all__ = [
    "CardFacts",
    "Conversion",
    "Description",
    "Export",
    "Format",
    "LinearCost",
    "Plan",
    "Provenance",
    "QuantizedModel",
    "Rounder",
    "SizeForecast",
    "Target",
    "Verification",
]


_IN_BLOCK = re.compile(r"(?:[^.]+\.)+?(\d{1,9})\..+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How large an output may be; exactly one of the three is given.

    Attributes:
        bpw: Bits per weight, as the format counts them; met from below, never exceeded.
        max_bytes: Largest size of all files with tensors together.
        vram_bytes: Memory of a GPU that weights, cache and what the reader needs beside them should fit into.
        context_tokens: With ``vram_bytes``: length of the context whose cache should fit; None for the model's own.
    """

    bpw: float | None = None
    max_bytes: int | None = None
    vram_bytes: int | None = None
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: None or several are given, or one makes no sense.
        """
        if sum(each is not None for each in (self.bpw, self.max_bytes, self.vram_bytes)) != 1:
            raise ConfigError("one target is needed: bits per weight, a largest size, or the memory of a GPU.")
        if self.bpw is not None and not 1 <= self.bpw <= 16:
            raise ConfigError(f"bpw must lie between 1 and 16, got {self.bpw}.")


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Size and expected damage of one linear, or of the token embeddings.

    Attributes:
        name: Full name of the module.
        bpw: Bits per weight, overheads included.
        damage_nats: Damage that the plan predicted, nats per token; None if it is not known.
    """

    name: str
    bpw: float
    damage_nats: float | None = None

    @property
    def block(self) -> int | None:
        """Index of the decoder block; None outside of them."""
        match = _IN_BLOCK.fullmatch(self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """Last part of the name, as ``q_proj``: what blocks have in common."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is in a file or directory, for people.

    Attributes:
        kind: What the thing is.
        facts: Lines about the whole.
        table: One row for each linear or tensor.
    """

    kind: str
    facts: tuple[str, ...]
    table: Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was read back of a finished model.

    Attributes:
        quantized: Number of quantized linears or tensors that were decoded.
        others: Number of other tensors that were read.
        rates: Bits per weight with all overheads, by part of the model; the first is what a target in bits means.
        file_bytes: Size of all files with tensors, in bytes.
        compared: Whether everything was compared with what was meant. Otherwise only the format's rules were checked,
            and that all values are finite.
        facts: What else there is to say, as lines.
        warnings: What could not be checked, as lines.
    """

    quantized: int
    others: int
    rates: Mapping[str, float]
    file_bytes: int
    compared: bool
    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def bpw(self) -> float:
        """Bits per weight as a target in bits means them."""
        return next(iter(self.rates.values()))


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
    calibration: str = ""
    calibration_text: str = ""
    calibration_spans: str = ""
    calibration_shape: tuple[int, int] = (0, 0)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a model card says of the format.

    Attributes:
        name: Name of the model by convention: that of its original, ``-``, and a rate, as ``8.0bpw``; a format may add
            more behind.
        kind: What it is, with an article.
        library: The Hub's ``library_name``.
        made: What was done: names and values.
        limits: What programs that load it compute otherwise than it was measured, as sentences.
        loading: How to load it, as Markdown.
    """

    name: str
    kind: str
    library: str
    made: tuple[tuple[str, str], ...]
    limits: tuple[str, ...]
    loading: str


class QuantizedModel(ABC):
    """A finished model, opened: a ``TensorSource`` that decodes to dense weights, and what it says of itself."""

    format: ClassVar[str]
    """Name of its format."""
    engines: ClassVar[tuple[str, ...]] = ()
    """Engines of ``bpwise.eval.engines`` that run it as it is stored, beside Transformers."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The directory or file."""

    @property
    def directory(self) -> Path:
        """Where the tokenizer's files may be; ``path`` itself if the model comes with them."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json of the dense model; not to be modified."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the model."""

    @property
    @abstractmethod
    def names(self) -> frozenset[str]:
        """Full names of all tensors of the dense model, as Transformers has them."""

    @property
    @abstractmethod
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding."""

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """Size of all files with tensors, in bytes."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the dense model without decoding it."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the dense model, decoded, on the CPU, in memory of its own."""

    @abstractmethod
    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every linear, overheads included, in model order."""

    @abstractmethod
    def describe(self) -> Description:
        """Return what is in it."""

    def as_transformers(self) -> TensorSource:
        """Return the dense model with the names and the config that Transformers loads."""
        return self

    @property
    def matrix_dtype(self) -> str | None:
        """Dtype that its matrices are stored in, as ``float16``; None if a tensor is quantized, as is the rule."""
        return None

    @property
    def predicted_damage_nats(self) -> float | None:
        """Damage that its plan predicted, nats per token; None if it does not say."""
        return None

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text, as ``Provenance.calibration_spans``; None if it does not say."""
        return None


class Plan(ABC):
    """What every linear or tensor of a model gets. Made from a measurement, saved as JSON."""

    @property
    @abstractmethod
    def damage_nats(self) -> float | None:
        """Predicted damage, nats per token; None where nothing was measured."""

    @property
    @abstractmethod
    def bpw(self) -> float:
        """Bits per weight as a target in bits means them."""

    @property
    @abstractmethod
    def gap(self) -> float:
        """How far the predicted damage may be above the best possible, as a fraction of it."""

    @abstractmethod
    def identity(self) -> Any:
        """Return all of it that rounding and written bytes depend on, as plain JSON."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write it as JSON."""

    @abstractmethod
    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every linear gets and is expected to cost, in model order."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Return the share of the planned weights in each width or type, the largest first."""

    @abstractmethod
    def describe(self) -> Description:
        """Return what is in it."""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Size of all tensors together, roughly, in bytes."""


class Rounder(ABC):
    """Rounds the linears of one model, one by one, as its plan says.

    Attributes:
        names: Full names of all that is rounded, in the order in which it is written.
        identity: What its artifacts depend on beside model, measurement and plan, as plain JSON.
        unquantized: Linears that stay as they are, in float16.
        table: Name of the token embeddings, if they are rounded too: before all else, since blocks read them.
    """

    names: tuple[str, ...]
    identity: Mapping[str, Any]
    unquantized: frozenset[str] = frozenset()
    table: str | None = None

    @abstractmethod
    def round_linear(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        """Round one linear.

        Args:
            measured: What is known of it.
            target: The weight to represent, float32, shape (K, out), contiguous; its memory may be used.
            gram: Weighted mean of x x^T over the quantized model's inputs, float32, shape (K, K).

        Returns:
            What to keep, by name. A ``damping`` among it is what its Hessian was factored with, relative; infinite
            where it went without error feedback.
        """

    @abstractmethod
    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that a reader makes of what was kept, shape (out, K), on the device of what was kept."""

    def round_table(self) -> dict[str, Tensor]:
        """Round the token embeddings; return what to keep."""
        raise NotImplementedError


class Conversion(ABC):
    """One original on its way into a format.

    Attributes:
        checkpoint: The original.
        options: The format's options.
    """

    measures: bool = True
    """Whether plans are made from a measurement."""
    writes_card: bool = True
    """Whether a model card belongs to every output."""
    refines: bool = False
    """Whether ``refine`` does something."""
    inputs: tuple[Path, ...] = ()
    """Files that are read beside the original."""
    notes: tuple[str, ...] = ()
    """What ``prepare`` found that a user should know, as sentences."""

    def __init__(self, checkpoint: Checkpoint, options: Any) -> None:
        """Hold both; nothing is read.

        Args:
            checkpoint: The original.
            options: The format's options.
        """
        self.checkpoint = checkpoint
        self.options = options

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What readers of the format compute otherwise than Transformers, as sentences.

        Raises:
            UnsupportedModelError: They do not know the model, or would compute another one.
        """
        return ()

    def require_support(self) -> None:
        """Refuse a model that the format cannot hold, or tools that are missing; costs next to no time.

        Raises:
            BpwiseError: What is wrong.
        """

    @abstractmethod
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

    def require_writable(self) -> None:
        """Refuse what the writer would refuse at its end; reads what is carried over as it is.

        Raises:
            BpwiseError: What is wrong.
        """

    def require_readable(self) -> None:
        """Refuse what could not be read back to be evaluated, as far as is known: before ``prepare``, and after it.

        Raises:
            UnsupportedModelError: The output could not be opened.
        """

    def scratch(self, work: Path) -> Mapping[Path, int]:
        """Return the files that ``prepare`` will make in a work directory, and about how large, in bytes."""
        return {}

    def prepare(self, work: Path, progress: Progress) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """Make what a run needs before anything is measured.

        Args:
            work: Work directory to keep it in.
            progress: Shows how far it is.

        Returns:
            Names and identities of the resume stores it lies in.
        """
        return ()

    @abstractmethod
    def plan(self, measurement: Measurement | None, target: Target | None, provenance: Provenance) -> Plan:
        """Choose what every linear or tensor gets.

        Args:
            measurement: What was measured; None if ``measures`` is false.
            target: How large the output may be; None if ``measures`` is false.
            provenance: What the output's metadata will say; its run may be a placeholder of the same length.

        Raises:
            BudgetError: No plan has this size.
        """

    @abstractmethod
    def identity(self) -> Any:
        """Return what written bytes depend on beside original, calibration rows and plan, as plain JSON."""

    @abstractmethod
    def rounder(self, plan: Any, measurement: Measurement) -> Rounder | None:
        """Return what rounds linears; None where the writer does it alone."""

    def refine(
        self,
        rounded: RoundedModel,
        measurement: Measurement,
        device: torch.device,
        offload_dir: Path | None,
        progress: Progress,
    ) -> None:
        """Improve on all that was rounded, end to end; what is found is kept in the same store.

        Args:
            rounded: What the rounder made.
            measurement: Gives the calibration rows.
            device: Where models run.
            offload_dir: Directory for files with hidden states; None keeps them in memory.
            progress: Wraps the steps.

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
            BpwiseError: It cannot be written, or does not read back as it was meant.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A file for other programs that a format makes of a measurement alone.

    Attributes:
        name: Name of the command.
        kind: What the file is, with an article.
        help: What the command does.
        output_help: What its output is.
        write: Writes it; returns the number of tensors in it.
        is_own: Returns whether a file is one that bpwise wrote.
    """

    name: str
    kind: str
    help: str
    output_help: str
    write: Callable[[Measurement, Path], int]
    is_own: Callable[[Path], bool]


class Format(ABC):
    """All that is special to a format, behind one object; ``bpwise.convert.registry`` names them all."""

    name: ClassVar[str]
    """As ``--format`` takes it."""
    title: ClassVar[str]
    """As prose has it."""
    suffix: ClassVar[str] = ""
    """What file names end in; empty where an output is a directory."""
    Options: ClassVar[type[FormatOptions]]
    """What only this format can be asked."""
    conflicts: ClassVar[Mapping[str, Sequence[Conflict]]] = {}
    """Options without effect beside others, by command."""
    bpw_means: ClassVar[str] = "of all weights"
    """What a target in bits per weight counts."""
    exports: ClassVar[Sequence[Export]] = ()
    """Files for other programs that it makes of measurements."""
    own_files: ClassVar[tuple[str, ...]] = ("*.safetensors", "*.safetensors.index.json", "config.json")
    """Patterns of the files that make up a model in a directory, side files excluded."""
    keeps_digests: ClassVar[bool] = True
    """Whether outputs hold digests of what they must decode to, for ``verify`` to compare with."""

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Return whether a file or directory is a model of this format, by whatever program."""

    @abstractmethod
    def open(self, path: Path) -> QuantizedModel:
        """Open a finished model.

        Raises:
            BpwiseError: It breaks the format's rules.
        """

    def describe(self, path: Path) -> Description:
        """Return what is in a finished model.

        Raises:
            BpwiseError: It breaks the format's rules.
        """
        return self.open(path).describe()

    @abstractmethod
    def verify(self, path: Path) -> Verification:
        """Read every tensor back, and compare it with what was meant as far as that is known.

        Raises:
            FormatError: A rule of the format is broken.
            VerificationError: A tensor does not decode to what was meant.
        """

    @abstractmethod
    def card(self, model: QuantizedModel, base_name: str) -> CardFacts:
        """Return what a card says of a model; ``base_name`` is what the original is called."""

    @abstractmethod
    def output_name(self, base_name: str, bpw: float, options: Any) -> str:
        """Return the name of an output by convention, suffix included."""

    @abstractmethod
    def run_of(self, path: Path) -> str | None:
        """Return what a finished output says of its run (``Provenance.run``); None if it is not bpwise's.

        Raises:
            FormatError: It is not a model of this format, or damaged.
        """

    @abstractmethod
    def curves(self, options: Any) -> CurveMaker | None:
        """Return what measures this format's curves; None where what it needs is not installed."""

    @abstractmethod
    def load_plan(self, raw: dict[str, Any], where: str) -> Plan:
        """Return the plan that a JSON file holds.

        Args:
            raw: The file's content.
            where: The file, to begin messages with.

        Raises:
            FormatError: It is damaged, or of another version.
        """

    @abstractmethod
    def plan(self, measurement: Measurement, options: Any, *, bpw: float | None, max_bytes: int | None) -> Plan:
        """Return a plan made from a measurement alone; one of ``bpw`` and ``max_bytes`` (of all tensors) is given.

        Raises:
            BudgetError: No plan has this size.
        """

    @abstractmethod
    def bpw_range(self, measurement: Measurement, options: Any) -> tuple[float, float] | None:
        """Return the smallest and largest bits per weight worth planning; None if the format was not measured."""

    @abstractmethod
    def conversion(self, checkpoint: Checkpoint, options: Any) -> Conversion:
        """Return an original on its way into this format."""

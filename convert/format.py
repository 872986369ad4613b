"""A format is one object. It knows all that is special to it; everything else reaches it through this protocol.

``Format`` recognises and opens finished models (``bpwise.convert.model``), makes plans (``plan``) and takes originals
into the format (``conversion``), whose linears a rounder rounds (``rounding``). ``docs/adding-a-format.md`` walks
through one that is complete in 150 lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ..tables import bytes_text
from .model import CardFacts, Description, QuantizedModel, Verification, verify_values
from .names import NameParts, convention_name
from .options import Conflict, FormatOptions
from .plan import Plan

if TYPE_CHECKING:
    from ..checkpoint.source.checkpoint import Checkpoint
    from ..measure.measurement import Measurement
    from .conversion import Conversion, Target

__all__ = ["Export", "ExportedPlan", "Exporter", "Format"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedPlan:
    """A plan as another program takes it.

    Attributes:
        text: Content of its file.
        facts: What is in it, as lines.
        commands: The lines that quantize a model by it: of a shell, or of Python. Capitals stand for what only the user
            knows.
    """

    text: str
    facts: tuple[str, ...]
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """Another program that quantizes models, and can be told what each linear or tensor gets.

    Attributes:
        engine: Name of the program, as ``bpwise export --for`` takes it.
        suffix: What names of its files end in.
        sign: Regular expression: how a file that was made for it begins.
        make: Makes a plan for it; takes the measurement, how large the model may be, the measurement's file and the
            file to make.
    """

    engine: str
    suffix: str
    sign: str
    make: Callable[[Measurement, Target, Path, Path], ExportedPlan]


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
    size_names: ClassVar[tuple[str, ...]] = ()
    """Files of another program that an output may be as large as, by name; see ``Target.size_of``."""
    default_bpw: ClassVar[float] = 8.0
    """Bits per weight of an output where no size is asked for."""
    default_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Options of such an output, by field, where they leave it open by None; see ``completed``."""
    exports: ClassVar[Sequence[Export]] = ()
    """Files for other programs that it makes of measurements."""
    exporters: ClassVar[Sequence[Exporter]] = ()
    """Other programs that make its files, by plans of it."""
    own_files: ClassVar[tuple[str, ...]] = ("*.safetensors", "*.safetensors.index.json", "config.json")
    """Patterns of the files that make up a model in a directory, side files excluded."""
    keeps_digests: ClassVar[bool] = True
    """Whether outputs hold digests of what they must decode to, for ``verify`` to compare with."""

    def is_installed(self) -> bool:
        """Whether the packages are there that it needs and most users do without: without, it is measured if named."""
        return True

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

    def verify(self, path: Path) -> Verification:
        """Read every tensor back, and compare it with what was intended as far as that is known.

        Raises:
            FormatError: A rule of the format is broken.
            VerificationError: A tensor does not decode to what was intended.
        """
        return verify_values(self.open(path))

    def card(self, model: QuantizedModel, base_name: str) -> CardFacts:
        """Return what a card says of a model; ``base_name`` is what the original is called."""
        return CardFacts(
            name=model.path.name,
            kind=f"a {self.title} model",
            library=self.name,
            made=(("format", self.title), ("size of the weights", bytes_text(model.file_bytes))),
            limits=(),
            loading="Decode it with `bpwise dequantize`; Transformers loads the result.",
        )

    def completed(self, options: Any, *, sized: bool) -> Any:
        """Return options as an output gets them: if no size is given, ``default_options`` fill what they leave open.

        Args:
            options: The format's.
            sized: Whether a size is asked for.
        """
        own = {name: value for name, value in self.default_options.items() if getattr(options, name) is None}
        return options if sized else replace(options, **own)

    def output_name(self, base_name: str, bpw: float | str, options: Any) -> str:
        """Return the name of an output by convention, suffix included.

        Args:
            base_name: Name or Hub id of the original.
            bpw: Bits per weight, or another label of the size (see ``Target.label``).
            options: The format's options.
        """
        return convention_name(base_name, bpw, self.name) + self.suffix

    def name_parts(self, name: str) -> NameParts | None:
        """Take the name of an output apart, suffix excluded; None of names that tell no size."""
        return NameParts.of(name)

    def run_of(self, path: Path) -> str | None:
        """Return what a finished output says of its run (``Provenance.run``); None if it is not bpwise's.

        Raises:
            FormatError: It is damaged.
        """
        return self.open(path).run if self.recognises(path) else None

    def companions(self, output: Path) -> tuple[Path, ...]:
        """Return the files beside a finished output that belong to its model, are none by themselves, and go with it.

        Raises:
            FormatError: One of them is damaged.
        """
        return ()

    def whole_path(self, path: Path) -> Path:
        """Return what a model would be called in one file, by the path of one of several; else the path itself."""
        return path

    def places(self, output: Path) -> Mapping[Path, tuple[Path, ...]]:
        """Return the paths by which an output may be opened, and of each the files that may be there.

        ``Conversion.placed`` tells which it is, once there is a plan; before, all that are traced in the folder count.
        """
        return {output: (output,)}

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

    def overhead_bytes(self, measurement: Measurement) -> int:
        """Return how much larger than its tensors an output's file is, at most, as far as a measurement tells."""
        return 0

    def beside_in_vram(
        self, measurement: Measurement, options: Any, vram_bytes: int, context_tokens: int | None
    ) -> int:
        """Return what a reader takes of a GPU beside a plan's ``vram_bytes``: the cache of a context, and computing.

        Args:
            measurement: Tells the model's config.
            options: The format's options.
            vram_bytes: Memory of the GPU.
            context_tokens: Length of the context; None for the model's own.

        Raises:
            BudgetError: Nothing is left for weights.
            ConfigError: It is not known what readers of the format take, or how long a context is.
        """
        raise ConfigError("--vram: not known how much memory this format's readers take. Give --bpw or --max-size.")

    def bytes_for_vram(self, measurement: Measurement, options: Any, room_bytes: int) -> int:
        """Return the size of all tensors, as ``plan`` takes it, of which so many bytes are in a GPU's memory."""
        return room_bytes

    def bpw_range(self, measurement: Measurement, options: Any) -> tuple[float, float] | None:
        """Return the smallest and largest bits per weight worth planning; None if the format was not measured."""
        return None

    def damage_by_bits(self, measurement: Measurement) -> Mapping[str, Mapping[int, float]] | None:
        """Return what every linear and the head cost at whole bits per weight, for programs with formats of their own.

        Returns:
            Damage in nats per token, by linear and bits; None if the format was not measured, or has other choices.
        """
        return None

    @abstractmethod
    def conversion(self, checkpoint: Checkpoint, options: Any) -> Conversion:
        """Return an original on its way into this format."""

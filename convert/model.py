"""Finished models: opened, described, verified."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..checkpoint.model.names import head_names
from ..errors import CalibrationError, CheckpointError, VerificationError
from ..tables import Table, bytes_text, html_summary

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.source.checkpoint import TensorSource
    from ..measure.text.chat_template import ChatTemplate

__all__ = ["CardFacts", "Description", "QuantizedModel", "Verification", "verify_values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is in a file or directory.

    Attributes:
        kind: What the thing is.
        facts: Lines about the whole, for people.
        table: One row for each linear or tensor, for people.
        content: The same for programs, in types that JSON has; names of numbers end in their units.
    """

    kind: str
    facts: tuple[str, ...]
    table: Table
    content: Mapping[str, Any]

    def _repr_html_(self) -> str:
        return html_summary(self.kind, self.facts, self.table, folded=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was read back of a finished model.

    Attributes:
        quantized: Number of quantized linears or tensors that were decoded.
        others: Number of other tensors that were read.
        rates: Bits per weight with all overheads, by part of the model; the first is what a target in bits means.
        file_bytes: Size of all files with tensors, in bytes.
        compared: Whether everything was compared with what was written. Otherwise only the format's rules were checked,
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

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in types that JSON has."""
        return {
            "quantized_tensors": self.quantized,
            "other_tensors": self.others,
            "bpw": dict(self.rates),
            "file_bytes": self.file_bytes,
            "compared": self.compared,
            "facts": list(self.facts),
            "warnings": list(self.warnings),
        }


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
    run: str | None = None
    """What it says of the run that made it; None if that was not bpwise's."""
    engines: ClassVar[tuple[str, ...]] = ()
    """Engines of ``bpwise.eval.engines`` that run it as it is stored, beside Transformers."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """The directory or file."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files with tensors."""
        return tuple(sorted(self.path.glob("*.safetensors"))) if self.path.is_dir() else (self.path,)

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
    def tied_embeddings(self) -> bool:
        """Whether the output head is the token embedding: by default if no head is stored."""
        return not head_names(self.names)

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """Size of all files with tensors, in bytes."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the dense model, without decoding it where a format can."""
        return tuple(self.tensor(name).shape)

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor of the dense model, decoded, on the CPU, in memory of its own."""

    def entry(self, name: str, index: int) -> Tensor:
        """Return one entry of a tensor's first dimension, as one of stacked experts."""
        return self.tensor(name)[index].clone()

    @abstractmethod
    def stored_bpw(self) -> dict[str, float]:
        """Return the bits per weight of every linear, overheads included, in model order."""

    def describe(self) -> Description:
        """Return what is in it."""
        bpw = self.stored_bpw()
        rows = tuple((name, f"{bpw[name]:.3f}") for name in bpw)
        facts = (f"{len(bpw)} linears, {bytes_text(self.file_bytes)} of tensors",)
        content = {"tensors_bytes": self.file_bytes, "linears": [{"name": name, "bpw": bpw[name]} for name in bpw]}
        table = Table(("linear", "bpw"), rows)
        return Description(kind=f"{self.format} model", facts=facts, table=table, content=content)

    def as_transformers(self) -> TensorSource:
        """Return the dense model with the names and the config that Transformers loads."""
        return self

    def beside(self, original: TensorSource) -> QuantizedModel:
        """Return the model as it is compared with its original: itself, if it needs nothing of that to be read.

        Args:
            original: The model that it was made of.
        """
        return self

    @property
    def matrix_dtype(self) -> str | None:
        """Dtype that its matrices are stored in, as ``float16``; None if a tensor is quantized, as is the rule."""
        return None

    @property
    def predicted_damage_nats(self) -> float | None:
        """Damage that its plan predicted, nats per token; None if it does not say."""
        return None

    def chat_template(self) -> ChatTemplate | None:
        """Return its own chat template; None if it has none, or its tokenizer cannot be loaded."""
        from ..measure.text.tokenizer import chat_template, load_tokenizer  # noqa: PLC0415 - only cards ask

        try:
            return chat_template(load_tokenizer(self.directory))
        except (CalibrationError, CheckpointError):
            return None

    @property
    def calibration_spans(self) -> str | None:
        """Hashes of its calibration text, as ``Provenance.calibration_spans``; None if it does not say."""
        return None


def verify_values(model: QuantizedModel) -> Verification:
    """Read every tensor of a model back, and check that its values are finite.

    Raises:
        VerificationError: One is not.
    """
    weights: Counter[str] = Counter()
    for name in sorted(model.names):
        tensor = model.tensor(name)
        if not bool(tensor.isfinite().all()):
            raise VerificationError(
                f"{model.path}: {name} holds NaN or infinite values. Expected none. Write it again."
            )
        weights[name.removesuffix(".weight")] = tensor.numel()
    bpw = model.stored_bpw()
    total = sum(weights[name] for name in bpw)
    return Verification(
        quantized=len(bpw),
        others=len(model.names) - len(bpw),
        rates={"all linears": sum(bpw[name] * weights[name] for name in bpw) / max(total, 1)},
        file_bytes=model.file_bytes,
        compared=False,
    )

"""The card of an output, made from what lies on the disk: the model itself, its report, and the original's card."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.files.atomic import write_text
from ...checkpoint.files.schemas import Count, NonNegative, Number, check_schema, read_json
from ...checkpoint.model.families import is_known
from ...checkpoint.source.hub import resolve_model
from ...errors import BrokenModelError, ConfigError, FormatError
from ...eval.models import directory_name, open_any
from ...eval.report.report import JSON_NAME
from ..exl2.file.config import stored_rates
from ..exl2.file.manifest import Changes, Provenance, read_manifest
from ..exl2.file.reader import Exl2Model
from ..exl2.readers import reader_warnings
from ..gguf.file.reader import GgufModel
from ..gguf.llama_cpp.readers import LIMITS_KEY
from .base_card import CARD_NAME, BaseCard, read_base_card
from .card import HUB_ID, Card, rate_text, render_card
from .mark import read_mark

__all__ = ["card_path", "check_base_model", "make_card", "output_name", "write_card"]

_NO_CARD = BaseCard(notes=("The original's card was not at hand: licence and language are not carried over.",))
_FINISHED_NAME = re.compile(r"-(exl2|\d+(\.\d+)?bpw)$", re.IGNORECASE)


def card_path(output: Path) -> Path:
    """Return where the card of a model lies: ``OUT/README.md``, or ``NAME.README.md`` beside ``NAME.gguf``."""
    return output / CARD_NAME if output.is_dir() else output.with_name(f"{output.stem}.{CARD_NAME}")


def output_name(base_name: str, *, bpw: float, head_bits: int | None = None, exl2: bool = True) -> str:
    """Return the name by convention: ``Llama-3.2-1B-8.0bpw-8hb-exl2``, or ``Llama-3.2-1B-4.5bpw`` for a GGUF file.

    Args:
        base_name: Name of the original; of a Hub id the part after the owner.
        bpw: Bits per weight that were asked for.
        head_bits: Bits of the head; None leaves them out.
        exl2: Whether it is an EXL2 model.
    """
    head = "" if head_bits is None else f"-{head_bits}hb"
    return f"{base_name.rpartition('/')[2]}-{rate_text(bpw)}bpw{head}{'-exl2' if exl2 else ''}"


def write_card(output: Path, *, original: str | Path | None = None, base_model: str | None = None) -> Path:
    """Write the card of an output; an older one is replaced.

    Args:
        output: EXL2 directory or GGUF file.
        original: Directory or Hub id of the original, whose card is taken over; None does without.
        base_model: Hub id of the original; None takes ``original``'s if it came from the Hub.

    Returns:
        The path of the card.

    Raises:
        BrokenModelError: The model is marked as broken.
        ConfigError: ``base_model`` is no Hub id.
        FormatError: It is no quantized model, or its report is damaged.
        CheckpointError: The original cannot be found, or its card leads outside its directory.
        WorkDirectoryError: The card cannot be written.
    """
    card = make_card(output, original=original, base_model=base_model)
    path = card_path(output)
    write_text(path, render_card(card))
    return path


def make_card(output: Path, *, original: str | Path | None = None, base_model: str | None = None) -> Card:
    """Return the card of an output; see ``write_card``."""
    reason = read_mark(output)
    if reason is not None:
        raise BrokenModelError(f"{output}: marked as broken, so it gets no card. {reason}")
    check_base_model(base_model)
    report = _report(output)
    directory = resolve_model(original) if isinstance(original, str) else original
    base_name = _base_name(report, directory, base_model)
    if base_model is None and HUB_ID.fullmatch(base_name):
        base_model = base_name
    common: dict[str, Any] = {
        "base_name": base_name,
        "base_model": base_model,
        "base": _NO_CARD if directory is None else read_base_card(directory),
        "measured": _measured(report),
        "measured_note": _measured_note(report),
    }
    model = open_any(output)
    if isinstance(model, GgufModel):
        limits = tuple(str(model.header.metadata.get(LIMITS_KEY, "")).splitlines())
        made = _made_gguf(model)
        return Card(name=output.stem, format="gguf", file_name=output.name, made=made, limits=limits, **common)
    if not isinstance(model, Exl2Model):
        raise FormatError(f"{output}: not quantized, expected an EXL2 directory or a GGUF file.")
    limits = reader_warnings(model.config) if is_known(model.config) else ()
    name = _exl2_name(model, base_name)
    return Card(name=name, format="exl2", made=_made_exl2(model), limits=limits, **common)


def check_base_model(base_model: str | None) -> None:
    """Check that an original's Hub id is one, or None.

    Raises:
        ConfigError: It is something else.
    """
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise ConfigError(f"base model: got {base_model!r}, expected a Hub id such as org/name.")


def _base_name(report: _Report | None, directory: Path | None, base_model: str | None) -> str:
    if base_model is not None:
        return base_model
    if directory is not None:
        return directory_name(directory)
    return "the original" if report is None else report.original.name


def _exl2_name(model: Exl2Model, base_name: str) -> str:
    bits, head_bits = stored_rates(model.stored_config)
    if _FINISHED_NAME.search(model.directory.name) or bits is None:
        return model.directory.name
    return output_name(base_name, bpw=bits, head_bits=head_bits)


def _made_exl2(model: Exl2Model) -> tuple[tuple[str, str], ...]:
    quantization = _mapping(model.stored_config.get("quantization_config"))
    manifest = read_manifest(model.directory)
    provenance = Provenance() if manifest is None else manifest.provenance
    calibration = _mapping(quantization.get("calibration"))
    bits, head_bits = stored_rates(model.stored_config)
    decoder_bpw = bits if provenance.bpw is None else provenance.bpw
    rows: list[tuple[str, object]] = [
        ("format", "EXL2"),
        (
            "decoder",
            _with_unit(decoder_bpw, "bits per weight, all overheads counted"),
        ),
        ("left in float16", _with_unit(provenance.float16_linears or None, "linears of the decoder")),
        ("output head", _with_unit(head_bits, "bits")),
        ("size of the weights", f"{model.file_bytes / 1e9:.3f} GB"),
        ("changed while reading", _changes(provenance.changes)),
        ("calibration", calibration.get("dataset")),
        ("calibration rows", _with_unit(calibration.get("rows"), f"of {calibration.get('length')} tokens")),
        ("predicted damage", _with_unit(provenance.predicted_damage_nats, "nats per token")),
        ("scales", "fitted to the original's predictions" if provenance.effort == "high" else None),
        ("made with", f"bpwise {provenance.bpwise or quantization.get('version')}"),
    ]
    return tuple((name, str(value)) for name, value in rows if value is not None)


def _made_gguf(model: GgufModel) -> tuple[tuple[str, str], ...]:
    tensors = model.header.tensors.values()
    weights = Counter[str]()
    for tensor in tensors:
        weights[tensor.type.name] += math.prod(tensor.shape)
    total, data_bytes = sum(weights.values()), sum(tensor.size_bytes for tensor in tensors)
    metadata = model.header.metadata
    # Numbers and arrays, which a file may have there too, say nothing.
    version, calibration = (
        value if isinstance(value, str) else None
        for value in (metadata.get("bpwise.version"), metadata.get("bpwise.calibration"))
    )
    rows: list[tuple[str, object]] = [
        ("format", "GGUF"),
        ("bits per weight", f"{8 * data_bytes / total:.4f}, over all tensors"),
        ("types", ", ".join(f"{name} {count / total:.1%}" for name, count in weights.most_common())),
        ("size of the file", f"{model.file_bytes / 1e9:.3f} GB"),
        ("calibration", calibration),
        ("made with", f"bpwise {version}" if version else "bpwise, as llama-quantize does"),
    ]
    return tuple((name, str(value)) for name, value in rows if value is not None)


def _changes(changes: Changes) -> str | None:
    return "; ".join(f"merged with the adapter {adapter.name}" for adapter in changes.adapters) or None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _with_unit(value: object, unit: str) -> str | None:
    if not isinstance(value, int | float):
        return None
    return f"{value if isinstance(value, int) else format(value, '.4g')} {unit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Estimate:
    """A number of a report, with its standard error if that is known."""

    value: Number
    standard_error: NonNegative | None

    def text(self, factor: float = 1) -> str:
        """Return both, multiplied by a factor."""
        value = f"{self.value * factor:.4g}"
        return value if self.standard_error is None else f"{value} ± {self.standard_error * factor:.2g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReportedModel:
    """What a report says of a model."""

    name: str
    stored_bytes: Count | None

    @property
    def size(self) -> str:
        """Size of the weights."""
        return "" if self.stored_bytes is None else f"{self.stored_bytes / 1e9:.3f} GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReportedSummary:
    """What a report says of the damage; see ``bpwise.eval.metrics.divergence.Summary``."""

    original_perplexity: _Estimate
    quantized_perplexity: _Estimate
    kl_nats: _Estimate
    kl_p99_nats: Number
    top1_agreement: _Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """What a card takes from a report; see ``bpwise.eval.comparison.Comparison``."""

    original: _ReportedModel
    quantized: _ReportedModel
    summary: _ReportedSummary
    predicted_tokens: Count
    text: str
    engine: str
    dtype: str


def _report(output: Path) -> _Report | None:
    path = output / JSON_NAME if output.is_dir() else output.with_name(f"{output.stem}.{JSON_NAME}")
    if not path.exists():
        return None
    remedy = "The report is damaged, or of another version: evaluate again."
    raw = read_json(path, FormatError).get("comparison")
    return check_schema(raw, _Report, FormatError, where=f"{path}: comparison", remedy=remedy)


def _measured(report: _Report | None) -> tuple[tuple[str, str, str], ...]:
    if report is None:
        return ()
    summary = report.summary
    return (
        ("size", report.original.size, report.quantized.size),
        ("perplexity", summary.original_perplexity.text(), summary.quantized_perplexity.text()),
        ("mean KL divergence, nats per token", "0", summary.kl_nats.text()),
        ("KL divergence, 99 % of tokens below", "0", f"{summary.kl_p99_nats:.3g}"),
        ("same most likely token", "100 %", f"{summary.top1_agreement.text(100)} %"),
    )


def _measured_note(report: _Report | None) -> str:
    if report is None:
        return ""
    return (
        f"Over {report.predicted_tokens} tokens of text ({report.text}), run by {report.engine} in {report.dtype}. "
        "Numbers after ± are one standard error."
    )

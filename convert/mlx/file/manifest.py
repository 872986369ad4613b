"""``bpwise.json`` of an MLX output: where it came from, and what every tensor must decode to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....checkpoint.files.schemas import NonNegative, read_checksummed
from ....checkpoint.source.hub import confined_file
from ....errors import FormatError
from .layout import Layout, layout_from_json

__all__ = ["MANIFEST_FILE", "MANIFEST_VERSION", "Manifest", "Provenance", "read_manifest"]

MANIFEST_FILE = "bpwise.json"

MANIFEST_VERSION = 1

_REMEDY = "The file is damaged: quantize again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an output came from; None where it is not said.

    Attributes:
        bpwise: Version that wrote it.
        run: Identifies the run.
        changes: What was changed while the original was read.
        calibration: What was calibrated on.
        calibration_spans: Hashes of the calibration text.
        predicted_damage_nats: What the plan predicted, nats per token.
        warnings: What readers compute otherwise than Transformers, as sentences.
    """

    bpwise: str | None = None
    run: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    calibration_spans: str | None = None
    predicted_damage_nats: NonNegative | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    provenance: Provenance
    layout: dict[str, Any]
    digests: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The file.

    Attributes:
        provenance: Where the output came from.
        layout: What its tensors are made of.
        digests: SHA-256 of what every tensor decodes to, hexadecimal, by name.
        files: Digest of each file with tensors, as ``file_digests`` returns it: also of bytes that decode to nothing.
    """

    provenance: Provenance
    layout: Layout
    digests: dict[str, str]
    files: dict[str, str]


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of an MLX directory; None if it has none, as those of other programs.

    Raises:
        FormatError: It is damaged, or of another version.
        CheckpointError: It is a link that leads outside.
    """
    if not (directory / MANIFEST_FILE).exists():
        return None
    path = confined_file(directory, MANIFEST_FILE)
    version = ("manifest_version", MANIFEST_VERSION)
    stored = read_checksummed(path, _Stored, FormatError, version=version, remedy=_REMEDY)
    layout = layout_from_json(stored.layout, where=f"{path}: layout", remedy=_REMEDY)
    return Manifest(provenance=stored.provenance, layout=layout, digests=stored.digests, files=stored.files)

"""``bpwise.json`` of an EXL2 output: where it came from, and what every tensor must decode to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ....checkpoint.files.schemas import Count, NonNegative, Positive, read_checksummed
from ....checkpoint.source.hub import confined_file
from ....errors import FormatError

__all__ = ["MANIFEST_FILE", "MANIFEST_VERSION", "Changes", "Manifest", "Provenance", "read_manifest"]

MANIFEST_FILE = "bpwise.json"
"""Provenance, and the SHA-256 of every tensor as it must decode."""

MANIFEST_VERSION = 1

_REMEDY = "The file is damaged: quantize again."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """An adapter that was merged while the original was read."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What was changed while the original was read.

    Attributes:
        adapters: Adapters merged into it.
        equalized: Version of the rules by which its channels were equalized; None if they were not.
    """

    adapters: tuple[_Adapter, ...] = ()
    equalized: Positive | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where an output came from, as far as it is read again; None where it is not said.

    Attributes:
        bpwise: Version that wrote it.
        run: Identifies the run.
        model: Fingerprint of the original.
        changes: What was changed while it was read.
        calibration_spans: Hashes of the calibration text.
        bpw: Decoder bits per weight, overheads included.
        float16_linears: Number of the decoder's linears that are not quantized.
        effort: Effort of the run.
        predicted_damage_nats: What the plan predicted, nats per token.
    """

    bpwise: str | None = None
    run: str | None = None
    model: str | None = None
    changes: Changes = Changes()
    calibration_spans: str | None = None
    bpw: NonNegative | None = None
    float16_linears: Count = 0
    effort: str | None = None
    predicted_damage_nats: NonNegative | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Digests:
    """SHA-256 of what is decoded, hexadecimal, by name."""

    linears: dict[str, str]
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The file.

    Attributes:
        provenance: Where the output came from.
        manifest: What every quantized linear and every other tensor must decode to.
        files: Digest of each file with tensors, as ``file_digests`` returns it: also of bytes that decode to nothing.
    """

    provenance: Provenance
    manifest: _Digests
    files: dict[str, str] = field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of an EXL2 directory; None if it has none, as those of other programs.

    Raises:
        FormatError: It is damaged, or of another version.
        CheckpointError: It is a link that leads outside.
    """
    if not (directory / MANIFEST_FILE).exists():
        return None
    path = confined_file(directory, MANIFEST_FILE)
    version = ("manifest_version", MANIFEST_VERSION)
    return read_checksummed(path, Manifest, FormatError, version=version, remedy=_REMEDY)

"""Where a GGUF file comes from, in its metadata: keys of bpwise's own, and those that all programs read."""

from __future__ import annotations

from typing import Any

from .header import GgufHeader

__all__ = [
    "CALIBRATION_KEY",
    "DIGEST_KEY",
    "DIGEST_ROOM",
    "EFFORT_KEY",
    "EQUALIZED_KEY",
    "LIMITS_KEY",
    "MAP_KEY",
    "RUN_KEY",
    "SPANS_KEY",
    "VERSION_KEY",
    "origin_metadata",
]

CALIBRATION_KEY = "bpwise.calibration"
"""Text that the model was calibrated on, in words."""

DIGEST_KEY = "bpwise.sha256"
"""Digest of the whole file; see ``digest``."""

DIGEST_ROOM = "0" * 64
"""What stands in its place until it is known."""

EFFORT_KEY = "bpwise.effort"
"""``high`` where scales were fitted to the original's predictions; missing otherwise."""

EQUALIZED_KEY = "bpwise.equalized"
"""Version of the rules by which channels were equalized; missing where they are as in the original."""

LIMITS_KEY = "bpwise.limits"
"""Sentences that ``require_llama_cpp`` returned for the model, a line each."""

MAP_KEY = "bpwise.map"
"""Text of the map of rows: whose outputs the rows of matrices are (``rows.text``)."""

RUN_KEY = "bpwise.run"
"""Identifies the run that wrote the file."""

SPANS_KEY = "bpwise.calibration_spans"
"""Hashes of the calibration text."""

VERSION_KEY = "bpwise.version"
"""Version of bpwise that wrote the file."""

_QUANTIZED_BY = "bpwise"


def origin_metadata(base: GgufHeader, base_model: str | None) -> dict[str, Any]:
    """Return who quantized a model, and which: what converters, which see a directory, cannot know.

    Licence, languages and tags of the original's card are llama.cpp's converter's work; so is the base model that the
    card names, which is kept.

    Args:
        base: The unquantized file's.
        base_model: Hub id of the original; None if it is not known.
    """
    entries: dict[str, Any] = {"general.quantized_by": _QUANTIZED_BY}
    if base_model is None:
        return entries
    organization, _, name = base_model.partition("/")
    url = f"https://huggingface.co/{base_model}"
    entries["general.source.repo_url"] = url
    if "general.base_model.count" not in base.metadata:
        entries |= {
            "general.base_model.count": 1,
            "general.base_model.0.name": name.replace("-", " "),  # as llama.cpp's converter writes names
            "general.base_model.0.organization": organization,
            "general.base_model.0.repo_url": url,
        }
    return entries

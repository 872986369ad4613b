"""Keys of bpwise's own in a GGUF file's metadata: where the file comes from."""

from __future__ import annotations

__all__ = [
    "CALIBRATION_KEY",
    "DIGEST_KEY",
    "DIGEST_ROOM",
    "LIMITS_KEY",
    "MAP_KEY",
    "RUN_KEY",
    "SPANS_KEY",
    "VERSION_KEY",
]

CALIBRATION_KEY = "bpwise.calibration"
"""Text that the model was calibrated on, in words."""

DIGEST_KEY = "bpwise.sha256"
"""Digest of the whole file; see ``digest``."""

DIGEST_ROOM = "0" * 64
"""What stands in its place until it is known."""

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

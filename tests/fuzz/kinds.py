"""The kinds of files that readers take: how each is changed, and whether what came of it still is one."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pyarrow
import pyarrow.parquet
import yaml
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from . import containers, mutations

__all__ = [
    "ARROW",
    "CARD",
    "DAT",
    "GGUF",
    "JSON",
    "JSON_LINES",
    "LOGITS",
    "PARQUET",
    "TEMPLATE",
    "TENSORS",
    "TEXT",
    "Kind",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    Attributes:
        mutated: Changes the bytes of a file.
        check: Takes them apart as the first parser of any reader must: JSON, a container's header. Raises what it will
            where they are not of this kind. Knows nothing of bpwise.
    """

    mutated: Callable[[bytes, Random], bytes]
    check: Callable[[bytes], object]

    def passes(self, data: bytes) -> bool:
        """Return whether the first parser takes the bytes."""
        try:
            self.check(data)
        except Exception:
            return False
        return True


def _safetensors_header(data: bytes) -> None:
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + size].decode("utf-8"))
    for name, entry in entries.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(data) - 8 - size or math.prod(entry["shape"]) < 0:
                raise ValueError(name)


def _card(data: bytes) -> None:
    front = mutations.FRONT_MATTER.match(data)
    if front is None:
        raise ValueError("no front matter")
    yaml.load(front[1].decode("utf-8"), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))


def _template(data: bytes) -> None:
    ImmutableSandboxedEnvironment(extensions=[loopcontrols]).parse(data.decode("utf-8"))


def _logits(data: bytes) -> None:
    if not data.startswith(b"_logits_"):
        raise ValueError("another beginning")
    window_tokens, _, windows = struct.unpack_from("<3i", data, 8)
    struct.unpack_from(f"<{min(window_tokens * windows, len(data))}i", data, 20)


def _arrow(data: bytes) -> None:
    try:
        pyarrow.ipc.open_stream(data)
    except pyarrow.ArrowInvalid:
        pyarrow.ipc.open_file(data)


JSON = Kind(mutations.mutated_json, lambda data: json.loads(data.decode("utf-8")))
JSON_LINES = Kind(
    mutations.mutated_json_lines, lambda data: [json.loads(line) for line in data.decode("utf-8").splitlines()]
)
TENSORS = Kind(containers.mutated_safetensors, _safetensors_header)
GGUF = Kind(containers.mutated_gguf, containers.parsed_gguf)
DAT = Kind(containers.mutated_dat, containers.parsed_dat)
LOGITS = Kind(containers.mutated_logits, _logits)
TEXT = Kind(mutations.mutated_text, lambda data: data.decode("utf-8"))
TEMPLATE = Kind(mutations.mutated_template, _template)
CARD = Kind(mutations.mutated_card, _card)
PARQUET = Kind(containers.mutated_parquet, lambda data: pyarrow.parquet.ParquetFile(io.BytesIO(data)))
ARROW = Kind(containers.mutated_arrow, _arrow)

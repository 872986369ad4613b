"""Tensors of an EXL2 directory as they are stored, by name, from whichever safetensors file holds them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ....checkpoint.files.safetensors_file import HeaderEntry, SafetensorsHeader, read_entry, read_header
from ....checkpoint.source.hub import confined_file
from ....errors import FormatError
from .store import QUANTIZED_SUFFIXES

__all__ = ["MARK", "StoredTensors", "is_exl2"]

MARK = ".q_weight"
"""End of the name that every quantized linear has a tensor of."""


def is_exl2(directory: Path) -> bool:
    """Return whether a directory holds an EXL2 model: some tensor's name ends in ``.q_weight``.

    Raises:
        FormatError: A safetensors file in it is damaged.
        CheckpointError: A safetensors file in it leads outside of it.
    """
    return Path(directory).is_dir() and any(
        name.endswith(MARK) for header in _headers(Path(directory)).values() for name in header.entries
    )


class StoredTensors:
    """All tensors of a directory; nothing stays open.

    Attributes:
        directory: The model directory.
        files: Header of every safetensors file by name; no tensor is in two of them.
        entries: What the headers say of every tensor, by name.
        linears: Names of the quantized linears, sorted.
    """

    def __init__(self, directory: Path) -> None:
        """Read the headers of all safetensors files.

        Raises:
            FormatError: No tensor is quantized, one is stored twice, or a file is damaged.
            CheckpointError: A file leads outside the directory.
        """
        self.directory = directory
        self.files = _headers(directory)
        self.entries: dict[str, HeaderEntry] = {}
        self._holders: dict[str, str] = {}
        for file, header in self.files.items():
            for name, entry in header.entries.items():
                if name in self._holders:
                    raise FormatError(
                        f"{directory}: tensor {name!r} is stored twice. Got {self._holders[name]} and {file}. Expected "
                        "one file. Remove the file that does not belong to the model."
                    )
                self._holders[name], self.entries[name] = file, entry
        self.linears = tuple(sorted(name.removesuffix(MARK) for name in self.entries if name.endswith(MARK)))
        if not self.linears:
            raise FormatError(
                f"{directory}: not an EXL2 model. Got {len(self.entries)} tensors. Expected some named *{MARK}. Check "
                "the path."
            )

    def entry(self, name: str) -> HeaderEntry:
        """Return what the header says of a tensor.

        Raises:
            FormatError: There is no tensor of that name.
        """
        if name not in self.entries:
            raise FormatError(f"{self.directory}: {name} is missing. The model is incomplete.")
        return self.entries[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU, in memory of its own.

        Raises:
            FormatError: There is no tensor of that name, or its file has changed.
        """
        entry = self.entry(name)
        return read_entry(confined_file(self.directory, self._holders[name]), entry, FormatError)

    def linear_bits(self, linear: str) -> int:
        """Return the size of a quantized linear in bits, padding and overheads included, bias excluded.

        Raises:
            FormatError: A part of it is missing.
        """
        return 8 * sum(self.entry(f"{linear}.{suffix}").size_bytes for suffix in QUANTIZED_SUFFIXES)


def _headers(directory: Path) -> dict[str, SafetensorsHeader]:
    names = sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    return {name: read_header(confined_file(directory, name), FormatError) for name in names}

"""Hessians of a measurement and its calibration rows, as files that exllamav3's converter reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...checkpoint.equalized.view import column_factors
from ...checkpoint.files.partials import clear_partials
from ...checkpoint.files.safetensors_file import load_metadata, save_tensors
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import language_model
from ...checkpoint.source.linears import Linear, model_linears
from ...errors import FormatError, UnsupportedModelError, WorkDirectoryError
from ...measure.curves import CurveInputs, InputsKeeper, LinearCurves, TableInputs
from ...measure.text.calibration import CalibrationSet

__all__ = ["ROWS_FILE", "HessianFiles", "packed_hessian"]

ROWS_FILE = "rows.safetensors"
"""Calibration rows, for ``-cd``. Its name is that of no linear, and without ``layers.``, by which exllamav3 looks."""

_MULTIPLE = 128
"""exllamav3 pads numbers of inputs to multiples of it."""

_LEAST_MEAN = 1e-20
"""Mean of a diagonal that exllamav3 takes for more than zero."""

_SIGN = "bpwise_hessians"


class HessianFiles(InputsKeeper):
    """A directory for exllamav3's ``-hess``: ``KEY.safetensors`` for each linear, KEY being its name in the checkpoint.

    ``hin`` is the weighted Hessian of its inputs, float32, the upper triangle row by row; inputs that exllamav3 pads
    are zero. Source: exllamav3 1.6.5, ``conversion/convert_model.py``.

    Attributes:
        folder: The directory.
    """

    name = "hessians"
    version = 1
    header: Mapping[str, Any] = {}

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Map names; writes nothing.

        Args:
            folder: The directory; it need not exist.
            checkpoint: The model that will be measured.

        Raises:
            UnsupportedModelError: Names of its linears are not those in the checkpoint.
        """
        self.folder = folder
        self._model = language_model(checkpoint)
        linears, head = model_linears(self._model)
        self._linears = [*linears, head]
        self._keys = _keys(checkpoint, self._linears)
        self._checkpoint = checkpoint
        self._identity = ""

    @property
    def missing_bytes(self) -> int:
        """Size of the files that are not there yet, roughly."""
        missing = (linear for linear in self._linears if not self._file(linear.name).exists())
        return sum(4 * _padded(each.in_features) * (_padded(each.in_features) + 1) // 2 for each in missing)

    def begin(self, provenance: Mapping[str, Any], rows: CalibrationSet) -> None:
        """See ``InputsKeeper``. The rows are written at once."""
        known = {key: value for key, value in provenance.items() if key != "curves"}  # formats do not change Hessians
        self._identity = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
        clear_partials(self.folder)
        for path in sorted(self.folder.glob("*")):
            if not self._is_own(path):
                raise WorkDirectoryError(
                    f"{path}: in the way. Got what is not of this measurement. Expected an empty directory, or one "
                    "with its Hessians. Choose another directory."
                )
        self._save(self.folder / ROWS_FILE, {"input_ids": rows.tokens.int()})

    def has(self, linear: str) -> bool:
        """See ``InputsKeeper``."""
        return self._is_own(self._file(linear))

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        """Write the Hessian of an input group for each of its linears, and measure nothing."""
        gram, factors = inputs.gram.cpu(), column_factors(self._checkpoint, self._model, inputs.names[0])
        if factors is not None:  # exllamav3 sees the model as it is
            gram = gram * factors[:, None] * factors
        packed = packed_hessian(gram)
        for name in inputs.names:
            self._save(self._file(name), {"hin": packed})
        return [LinearCurves(tensors={}, damping=inputs.damping) for _ in inputs.names]

    def table(self, inputs: TableInputs) -> Mapping[str, Tensor]:
        """Do nothing: embeddings have no Hessian."""
        return {}

    def _file(self, linear: str) -> Path:
        return self.folder / f"{self._keys[linear]}.safetensors"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        save_tensors(path, tensors, {_SIGN: self._identity})

    def _is_own(self, path: Path) -> bool:
        try:
            return load_metadata(path).get(_SIGN) == self._identity
        except FormatError:
            return False


def packed_hessian(gram: Tensor) -> Tensor:
    """Return a Hessian as exllamav3 reads it.

    Args:
        gram: Shape (K, K), symmetric; zero for an expert that no token reached, whose inputs then count alike.

    Returns:
        Shape (n (n + 1) / 2,) with n the padded number of inputs: the upper triangle, row by row.
    """
    if not float(gram.diagonal().mean()) > _LEAST_MEAN:
        gram = torch.eye(len(gram))
    more = _padded(len(gram)) - len(gram)
    rows = [pad(row[index:], (0, more)) for index, row in enumerate(gram)]
    return torch.cat([*rows, gram.new_zeros(more * (more + 1) // 2)])


def _padded(inputs: int) -> int:
    return -(-inputs // _MULTIPLE) * _MULTIPLE


def _keys(checkpoint: Checkpoint, linears: Iterable[Linear]) -> dict[str, str]:
    # exllamav3 calls modules as the checkpoint does; parts of a tensor get the prefix that the others have there.
    model = language_model(checkpoint)
    stored = {each.name: (model.stored_name(f"{each.name}.weight") or "").removesuffix(".weight") for each in linears}
    inside = {name: key for name, key in stored.items() if key and name.startswith(f"{model.blocks}.")}
    prefixes = {key.removesuffix(name.removeprefix("model.")) for name, key in inside.items()}
    if len(prefixes) != 1:
        odd = next((key for name, key in inside.items() if not key.endswith(name.removeprefix("model."))), "none")
        raise UnsupportedModelError(
            f"{checkpoint.directory}: names of linears cannot be mapped to exllamav3's. Got {odd} in the checkpoint. "
            "Expected the names of Transformers' modules behind one prefix. Leave --keep-hessians out."
        )
    prefix = prefixes.pop()
    return {
        name: key or (name if name == model.head_name else prefix + name.removeprefix("model."))
        for name, key in stored.items()
    }

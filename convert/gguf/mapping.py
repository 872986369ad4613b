"""The row map of an unquantized GGUF file: found block by block, and kept beside the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...checkpoint.model.names import model_order
from ...checkpoint.source.language import LanguageModel
from ...checkpoint.source.linears import model_linears
from ...errors import VerificationError
from ...progress import Progress, silent
from .file.header import GgufHeader, GgufTensor
from .file.reader import read_values
from .file.roles import Role, layer_of, role_of
from .rows.matching import LEAST_COLUMNS, LinearOutputs
from .rows.rowmap import RowMap, TensorRows

__all__ = ["build_map", "matrices_of", "require_held"]

_HALVES = ("F16", "BF16")

_OUTSIDE = -1
"""Number of the block, as ``layer_of`` gives it, of what belongs to none."""


def matrices_of(header: GgufHeader) -> dict[str, GgufTensor]:
    """Return the tensors of an unquantized file that may be quantized, as far as their types tell.

    llama.cpp's converter leaves what must not be quantized (routers, convolutions) in F32 if it may write 16 bits. In a
    file that is F32 throughout any matrix may be one.

    Args:
        header: The file's.

    Returns:
        Those with rows that are worth it, by name.
    """
    tensors = header.tensors
    kinds = _HALVES if any(each.type.name in _HALVES for each in tensors.values()) else ("F32",)
    return {
        name: each
        for name, each in tensors.items()
        if len(each.shape) > 1 and each.shape[-1] >= LEAST_COLUMNS and each.type.name in kinds
    }


def build_map(source: LanguageModel, header: GgufHeader, progress: Progress = silent) -> RowMap:
    """Find where the matrices of an unquantized file come from. In memory is one block of either side at a time.

    Args:
        source: The model that the file was made of.
        header: The file's.
        progress: Wraps the blocks.

    Raises:
        FormatError: A tensor cannot be read.
    """
    tensors = matrices_of(header)
    names: dict[int, list[str]] = {}
    for name in tensors:
        names.setdefault(layer_of(name), []).append(name)
    linears = _linears_by_block(source)
    found: dict[str, TensorRows] = {}
    unexplained: dict[str, str] = {}
    for block in progress(sorted(names), "convert: rows"):
        if block not in linears:
            unexplained |= dict.fromkeys(names[block], f"block {block} is none of the model's {source.block_count}")
            continue
        outputs = LinearOutputs({name: source.tensor(f"{name}.weight") for name in linears[block]})
        # A head that equals the table of embeddings is told from it by its place.
        ordered = sorted(names[block], key=lambda name: role_of(name) is not Role.EMBEDDING)
        held = _held(outputs, header, {name: tensors[name] for name in ordered})
        found |= held
        unexplained |= dict.fromkeys((x for x in names[block] if x not in held), "its rows are no linear's")
    return RowMap({name: found[name] for name in header.tensors if name in found}, unexplained)


def require_held(rows: RowMap, header: GgufHeader, linears: Mapping[str, int]) -> None:
    """Refuse a file that lacks outputs of linears.

    Args:
        rows: The file's map.
        header: The file's.
        linears: Number of outputs of every linear that it must hold, by full name.

    Raises:
        VerificationError: It lacks some.
    """
    lacking = rows.missing(linears)
    if lacking:
        name = next(iter(lacking))
        raise VerificationError(
            f"{header.path}: {len(lacking)} linears are not in the file, or not whole. Got {lacking[name]} of "
            f"{linears[name]} outputs of {name} nowhere. Expected all. Convert the model again, or choose EXL2."
        )


def _linears_by_block(source: LanguageModel) -> dict[int, list[str]]:
    # All matrices of the model, by block: those that are measured in their order, then the others.
    linears, head = model_linears(source)
    measured = {each.name: place for place, each in enumerate((*linears, head))}
    matrices = [name.removesuffix(".weight") for name in source.names if name.endswith(".weight")]
    matrices = [name for name in matrices if len(source.shape(f"{name}.weight")) == 2]
    last = len(measured)
    blocks: dict[int, list[str]] = {_OUTSIDE: []}
    for name in sorted(matrices, key=lambda name: (measured.get(name, last), model_order(name))):
        rest = name.removeprefix(f"{source.family.blocks}.")
        block = _OUTSIDE if rest == name else int(rest.partition(".")[0])
        blocks.setdefault(block, []).append(name)
    blocks[_OUTSIDE].sort(key=model_order)
    return blocks


def _held(outputs: LinearOutputs, header: GgufHeader, tensors: Mapping[str, GgufTensor]) -> dict[str, TensorRows]:
    found: dict[str, TensorRows] = {}

    def look(names: Iterable[str], *, reordered: bool) -> None:
        for name in names:
            values = read_values(header.path, tensors[name])
            rows = outputs.find_reordered(values) if reordered else outputs.find(values)
            if rows is not None:
                found[name] = rows

    look(tensors, reordered=False)
    look([name for name in tensors if name not in found], reordered=True)
    return found

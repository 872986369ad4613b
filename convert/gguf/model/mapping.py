"""The row map of a GGUF file: found block by block, and kept in the work directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from ....checkpoint.files.resume import ResumeStore
from ....checkpoint.model.names import model_order
from ....checkpoint.source.language import LanguageModel
from ....checkpoint.source.linears import model_linears
from ....errors import VerificationError
from ....progress import Progress, silent
from ..file.header import GgufHeader
from ..file.roles import Role, layer_of, matrices_of, role_of, trimmed
from ..file.values import read_values
from ..rows.foreign import LikeOutputs
from ..rows.matching import LinearOutputs
from ..rows.rowmap import LEAST_COLUMNS, RowMap, TensorRows
from ..rows.text import map_from_text, map_to_text

__all__ = ["ROWS", "build_map", "guess_map", "kept_map", "require_held"]

ROWS = "rows"
"""Name of the step in the work directory that holds the map."""

_OUTSIDE = -1
"""Number of the block, as ``layer_of`` gives it, of what belongs to none."""

Find = Callable[[Mapping[str, Tensor], Mapping[str, Callable[[], Tensor]]], dict[str, TensorRows]]
"""Finds tensors, which are read by name, among the outputs of linears."""


def kept_map(store: ResumeStore | None, source: LanguageModel, header: GgufHeader, progress: Progress) -> RowMap:
    """Return the map of an unquantized file, from a resume store if it is there, and kept there otherwise.

    Args:
        store: Where it is kept; None for nowhere.
        source: As for ``build_map``.
        header: As for ``build_map``.
        progress: As for ``build_map``.
    """
    if store is not None and store.has(ROWS):
        return map_from_text(bytes(store.load(ROWS)["text"].tolist()).decode("ascii"), str(store.path))
    rows = build_map(source, header, progress)
    if store is not None:
        store.save(ROWS, {"text": torch.tensor(list(map_to_text(rows).encode("ascii")), dtype=torch.uint8)})
    return rows


def build_map(source: LanguageModel, header: GgufHeader, progress: Progress = silent) -> RowMap:
    """Find where the matrices of an unquantized file come from. In memory is one block of either side at a time.

    Args:
        source: The model that the file was made of.
        header: The file's.
        progress: Wraps the blocks.

    Raises:
        FormatError: A tensor cannot be read.
    """
    return _mapped(source, header, matrices_of(header.tensors), _exactly, progress)


def guess_map(source: LanguageModel, header: GgufHeader, progress: Progress = silent) -> RowMap:
    """Find the same of a file that may be quantized, by likeness.

    Args:
        source: As for ``build_map``.
        header: The file's.
        progress: As for ``build_map``.

    Raises:
        FormatError: A tensor cannot be read.
    """
    return _mapped(source, header, _wide(header), _alike, progress)


def require_held(rows: RowMap, source: LanguageModel, header: GgufHeader, *, unquantized: bool = True) -> None:
    """Refuse a file that lacks linears of a model, or outputs of one.

    Outputs may lack in a block with matrices that are not explained: MLA's keys are stored turned. So may tokens: some
    converters leave out those that the tokenizer does not know. Whole linears may lack in a block of an unquantized
    file that holds quantized tensors all the same, as they were in the original.

    Args:
        rows: The file's map.
        source: The model.
        header: The file's.
        unquantized: Whether it is an unquantized file.

    Raises:
        VerificationError: It lacks some.
    """
    linears, head = model_linears(source)
    wide = [each for each in linears if each.in_features >= LEAST_COLUMNS]
    features = {each.name: each.out_features for each in (*wide, *([] if source.tied_embeddings else [head]))}
    unsure = {_OUTSIDE, *(layer_of(name) for name in rows.unexplained)}
    ready = {layer_of(name) for name, each in header.tensors.items() if unquantized and each.type.quantized}
    blocks = {name: block for block, names in _linears_by_block(source).items() for name in names}
    for name, count in rows.missing(features).items():
        if blocks[name] not in (ready if count == features[name] else unsure | ready):
            raise VerificationError(
                f"{header.path}: {name} is not in the file, or not whole. Got {features[name] - count} of its "
                f"{features[name]} outputs. Expected all. Convert the model again, or name the one it was made of."
            )


def _mapped(
    source: LanguageModel, header: GgufHeader, tensors: Iterable[str], find: Find, progress: Progress
) -> RowMap:
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
        # A head that equals the table of embeddings is told from it by its place.
        ordered = sorted(names[block], key=lambda name: role_of(name) is not Role.EMBEDDING)
        weights = {name: source.tensor(f"{name}.weight") for name in linears[block]}
        held = find(weights, _readers(header, ordered))
        left = {x: weights[x] for x in weights.keys() - {linear for own in held.values() for linear in own.linears}}
        unexplained |= dict.fromkeys((x for x in names[block] if x not in held), "its rows are no linear's")
        # What the converter keeps in F32 whatever it is asked for is no candidate, but may be a linear all the same.
        others = [x for x in _wide(header) if layer_of(x) == block and x not in ordered] if left else []
        held |= find(left, _readers(header, others))
        found |= held
    return RowMap({name: found[name] for name in header.tensors if name in found}, unexplained)


def _readers(header: GgufHeader, names: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    return {name: partial(read_values, header.tensors[name]) for name in names}


def _wide(header: GgufHeader) -> list[str]:
    # All matrices of floating-point numbers, or quantized ones, with rows that tell themselves apart.
    wide = (x for x in header.tensors.values() if len(trimmed(x.shape)) > 1 and x.shape[-1] >= LEAST_COLUMNS)
    return [tensor.name for tensor in wide]


def _exactly(weights: Mapping[str, Tensor], tensors: Mapping[str, Callable[[], Tensor]]) -> dict[str, TensorRows]:
    outputs = LinearOutputs(weights)
    found = {name: outputs.find(read()) for name, read in tensors.items()}
    for find in (outputs.find_reordered, outputs.find_scaled):
        found |= {name: find(tensors[name]()) for name, rows in found.items() if rows is None}
    return {name: rows for name, rows in found.items() if rows is not None}


def _alike(weights: Mapping[str, Tensor], tensors: Mapping[str, Callable[[], Tensor]]) -> dict[str, TensorRows]:
    outputs = LikeOutputs(weights)
    found = {name: outputs.find(read()) for name, read in tensors.items()}
    return {name: rows for name, rows in found.items() if rows is not None}


def _linears_by_block(source: LanguageModel) -> dict[int, list[str]]:
    # All matrices of the model, by block: those that are measured in their order, then the others.
    linears, head = model_linears(source)
    measured = {each.name: place for place, each in enumerate((*linears, head))}
    matrices = [name.removesuffix(".weight") for name in source.names if name.endswith(".weight")]
    matrices = [name for name in matrices if len(source.shape(f"{name}.weight")) == 2]
    last = len(measured)
    blocks: dict[int, list[str]] = {_OUTSIDE: []}
    for name in sorted(matrices, key=lambda name: (measured.get(name, last), model_order(name))):
        rest = name.removeprefix(f"{source.blocks}.")
        block = _OUTSIDE if rest == name else int(rest.partition(".")[0])
        blocks.setdefault(block, []).append(name)
    blocks[_OUTSIDE].sort(key=model_order)
    return blocks

"""Pairs of what writes channels and what reads them, between which factors can be moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..loading.listed import StoredRows
from ..model.families import Family
from ..source.checkpoint import Checkpoint
from ..source.language import LanguageModel
from ..source.mxfp4 import Mxfp4View
from ..source.views import CheckpointView

__all__ = ["Pair", "find_pairs"]

_FINAL_NORM = "model.norm"

_GATED = 2
"""Linears of an input group that make the neurons of a gated MLP: the gate, and what it is multiplied with."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Channels that are written once and read by one linear or several.

    Attributes:
        norm: The stored tensors of a norm that writes them, weight first; empty for linears.
        offset: What is added to the norm's stored weight when it runs.
        writers: Rows of stored tensors that write them: a linear's weight and its bias.
        readers: Rows of stored tensors whose columns read them.
        copies: How many heads read every head of values; 1 where a column reads the channel of its own number.
        head: Channels of a head, with ``copies``.
    """

    readers: tuple[StoredRows, ...]
    norm: tuple[str, ...] = ()
    offset: float = 0.0
    writers: tuple[StoredRows, ...] = ()
    copies: int = 1
    head: int = 1

    def spread(self, factors: Tensor) -> Tensor:
        """Return the factor of every column of a reader, given those of the channels."""
        return factors.view(-1, 1, self.head).expand(-1, self.copies, -1).reshape(-1)

    def gathered(self, squares: Tensor) -> Tensor:
        """Return the mean over the columns that read the same channel."""
        return squares.view(-1, self.copies, self.head).mean(dim=1).reshape(-1)


def find_pairs(base: Checkpoint) -> tuple[Pair, ...]:
    """Return the pairs of a model; reads no weights.

    Weights that a format can hold without error, as those published in MXFP4, are in no pair.

    Args:
        base: The model.

    Raises:
        UnsupportedModelError: Transformers does not run it as a decoder.
        CheckpointError: The stored tensors are not those of the sizes in config.json.
    """
    exact = _on_grid(base)
    found = _pairs(LanguageModel(base))
    return tuple(pair for pair in found if not any(place.name in exact for place in pair.readers))


def _on_grid(checkpoint: Checkpoint) -> frozenset[str]:
    if isinstance(checkpoint, Mxfp4View):
        return checkpoint.dequantized
    return _on_grid(checkpoint.base) if isinstance(checkpoint, CheckpointView) else frozenset()


def _pairs(model: LanguageModel) -> Iterator[Pair]:
    family = model.listed
    if family is None:
        for index in range(model.block_count):
            yield from _discovered_pairs(model, index)
        return
    for index in range(model.block_count):
        yield from _norm_pairs(model, family, index)
        yield from _linear_pairs(model, family, index)
    head = f"{model.head_name}.weight"
    if not model.tied_embeddings and head in model.names:
        yield from _norm_pair(model, family, _FINAL_NORM, (head,))


def _discovered_pairs(model: LanguageModel, index: int) -> Iterator[Pair]:
    for norm, offset, readers in model.norm_pairs(index):
        names = [f"{norm}.{kind}" for kind in ("weight", "bias") if model.has_parameter(f"{norm}.{kind}")]
        stored = [model.stored_name(name) for name in names]
        if None not in stored:
            yield Pair(readers, norm=tuple(name for name in stored if name is not None), offset=offset)


def _norm_pairs(model: LanguageModel, family: Family, index: int) -> Iterator[Pair]:
    groups = [group for group in family.input_groups(index, model.names) if group.reads_stream]
    linears = [name for group in groups for name in family.linear_names(index, group)]
    block = f"{family.blocks}.{index}."
    linears += [family.file_name(block + name) for name in family.routers]
    readers: dict[str, list[str]] = {}
    for name in (f"{linear}.weight" for linear in linears):
        if name in model.names:
            norm = family.norms[0 if ".self_attn." in name else 1]
            readers.setdefault(norm, []).append(name)
    for norm, names in readers.items():
        yield from _norm_pair(model, family, block + norm, tuple(names))


def _norm_pair(model: LanguageModel, family: Family, norm: str, readers: tuple[str, ...]) -> Iterator[Pair]:
    stored = [model.stored_rows(name) for name in (f"{norm}.weight", f"{norm}.bias") if name in model.names]
    places = [model.stored_rows(name) for name in readers]
    if stored and None not in places:
        names = tuple(place.name for place in stored if place is not None)
        yield Pair(tuple(place for place in places if place is not None), norm=names, offset=family.norm_offset)


def _linear_pairs(model: LanguageModel, family: Family, index: int) -> Iterator[Pair]:
    block = f"{family.blocks}.{index}."
    values, output = block + "self_attn.v_proj", block + "self_attn.o_proj"
    if f"{values}.weight" in model.names and f"{output}.weight" in model.names:
        columns, rows = model.shape(f"{output}.weight")[1], model.shape(f"{values}.weight")[0]
        head, left = divmod(columns, int(model.config["num_attention_heads"]))
        if not left and not rows % head and not columns % rows:
            yield from _linear_pair(model, values, output, copies=columns // rows, head=head)
    for group in family.input_groups(index, model.names):
        if len(group.linears) == _GATED and group.reads_stream:
            up = group.linears[1]
            last = "down_proj" if group.expert is None or family.experts is None else family.experts.down
            down = f"{up.rpartition('.')[0]}.{last}"
            yield from _linear_pair(model, family.file_name(block + up), family.file_name(block + down))


def _linear_pair(model: LanguageModel, writer: str, reader: str, *, copies: int = 1, head: int = 1) -> Iterator[Pair]:
    written = [model.stored_rows(name) for name in (f"{writer}.weight", f"{writer}.bias") if name in model.names]
    read = model.stored_rows(f"{reader}.weight")
    places = tuple(place for place in written if place is not None)
    if read is not None and len(places) == len(written):
        yield Pair((read,), writers=places, copies=copies, head=head)

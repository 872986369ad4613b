"""The first blocks of a model as a model of its own.

A large model is compared with llama.cpp on as many blocks as show every kind of them that it has.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ....checkpoint.model.config import parse_config
from ....checkpoint.model.names import text_config
from ....checkpoint.source.checkpoint import Checkpoint, TensorInfo
from ....checkpoint.source.views import CheckpointView
from ....errors import CheckpointError

__all__ = ["FirstBlocks", "block_count", "period"]

_MOST_KINDS = 4
"""Different values that a list with an entry for every block may have, to say of which kind a block is."""

_NUMBERED = re.compile(r"(.+?)\.(\d+)\.")

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

_LAST = ("num_kv_shared_layers",)
"""Numbers of blocks at the end that are special."""

_FOR_ALL_BLOCKS = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""What Gemma 3n and 4 hold for all blocks together, and along which dimension."""


def block_count(checkpoint: Checkpoint) -> int:
    """Return the number of a model's decoder blocks.

    Raises:
        BpwiseError: Transformers does not accept its config.
    """
    return int(_parsed(checkpoint).num_hidden_layers)


def period(checkpoint: Checkpoint, contents: Sequence[Hashable]) -> int:
    """Return how many first blocks show all that blocks of a model can be, two at least.

    That is the first period of all lists in its config that have an entry for every block, such as ``layer_types``, and
    of what blocks hold. Of a list that has none (dense blocks before those with experts), every kind is shown.

    Args:
        checkpoint: The model.
        contents: What each block holds.

    Raises:
        BpwiseError: Transformers does not accept its config.
    """
    values = _parsed(checkpoint).to_dict().values()
    lists = [list(map(str, value)) for value in values if isinstance(value, list) and len(value) == len(contents)]
    kinds = [contents, *(each for each in lists if len(set(each)) <= _MOST_KINDS)]
    whole = math.lcm(*(_period(each) or 1 for each in kinds))
    shown = max(2, *(max(each.index(kind) for kind in set(each)) + 1 for each in kinds))
    return min(len(contents), whole * -(-shown // whole))


def _parsed(checkpoint: Checkpoint) -> Any:
    return parse_config(checkpoint.config, checkpoint.directory / "config.json").get_text_config()


def _period(kinds: Sequence[Hashable]) -> int | None:
    lengths = range(1, len(kinds) // 2 + 1)
    return next((n for n in lengths if all(kind == kinds[index % n] for index, kind in enumerate(kinds))), None)


class FirstBlocks(CheckpointView):
    """A checkpoint cut to its first decoder blocks; all else stays, the vocabulary whole."""

    def __init__(self, base: Checkpoint, blocks: int) -> None:
        """Look at a checkpoint; reads no weights.

        Args:
            base: The model.
            blocks: Number of blocks to keep.

        Raises:
            CheckpointError: No tensors are those of the blocks that its config tells of.
            BpwiseError: Transformers does not accept its config.
        """
        super().__init__(base)
        self._blocks = blocks
        self._count = block_count(base)
        stack = _stack(base, self._count)
        places = {name: _NUMBERED.match(name) for name in base.names}
        self._names = frozenset(
            name for name, place in places.items() if place is None or place[1] != stack or int(place[2]) < blocks
        )

    @property
    def config(self) -> dict[str, Any]:
        """The base's config with that many blocks, and lists as long where it has an entry for every block."""
        config = dict(self._base.config)
        text = text_config(config)
        cut = {key: self._cut(key, value) for key, value in text.items()}
        if not any(key in cut for key in _COUNTS):
            cut["num_hidden_layers"] = self._blocks
        return cut if text is config else {**config, "text_config": cut}

    @property
    def names(self) -> frozenset[str]:
        """Full names of all tensors but those of later blocks."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and size of a tensor as it is read, and the file that holds it."""
        info, dimension = self._base.info(name), _shared_along(name)
        if dimension is None:
            return info
        shape = list(info.shape)
        shape[dimension] = shape[dimension] // self._count * self._blocks
        return TensorInfo(tuple(shape), info.dtype, info.file, info.size_bytes // self._count * self._blocks)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor; see ``Checkpoint.tensor``."""
        tensor, dimension = self._base.tensor(name), _shared_along(name)
        return tensor if dimension is None else tensor.narrow(dimension, 0, self.shape(name)[dimension]).clone()

    def _cut(self, key: str, value: Any) -> Any:
        if key in _COUNTS:
            return self._blocks
        if key in _LAST:
            return max(0, (value or 0) - (self._count - self._blocks))
        if isinstance(value, dict) and value and all(map(str.isdecimal, value)):
            return {index: item for index, item in value.items() if int(index) < self._blocks}
        per_block = isinstance(value, list) or (isinstance(value, str) and key.endswith("pattern"))
        return value[: self._blocks] if per_block and len(value) == self._count else value


def _stack(checkpoint: Checkpoint, blocks: int) -> str:
    # What the names of decoder blocks begin with: of vision there are others, with fewer weights.
    found = [(name, _NUMBERED.match(name)) for name in checkpoint.names]
    weights: Counter[str] = Counter()
    for name, place in found:
        if place is not None:
            weights[place[1]] += checkpoint.info(name).size_bytes
    numbers = {stack: {int(place[2]) for _, place in found if place and place[1] == stack} for stack in weights}
    for stack, _ in weights.most_common():
        if numbers[stack] >= set(range(blocks)):
            return stack
    raise CheckpointError(
        f"{checkpoint.directory}: no decoder blocks found. Expected tensors of {blocks} numbered blocks. "
        "Get the model again."
    )


def _shared_along(name: str) -> int | None:
    return next((dimension for end, dimension in _FOR_ALL_BLOCKS.items() if name.endswith(end)), None)

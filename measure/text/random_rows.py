"""Rows of random tokens among calibration rows, as in ExLlamaV2's standard set."""

import torch

from ...errors import CalibrationError
from .tokenizer import Tokenizer, ordinary_ids

__all__ = ["RANDOM_ORIGIN", "n_random_rows", "random_ids"]

RANDOM_ORIGIN = "random token ids"

# ExLlamaV2's standard calibration set has about this share of rows of random tokens. They reach embedding
# rows and channels that its text leaves unused; more of them would pull the statistics away from real text.
_ROWS_PER_RANDOM_ROW = 16
# With fewer rows than this every one is needed for text.
_MIN_ROWS_FOR_RANDOM = 8


def n_random_rows(rows: int) -> int:
    """Return how many of some rows hold random tokens."""
    return 0 if rows < _MIN_ROWS_FOR_RANDOM else max(1, rows // _ROWS_PER_RANDOM_ROW)


def random_ids(
    tokenizer: Tokenizer, vocab_size: int, shape: tuple[int, int], generator: torch.Generator
) -> list[list[int]]:
    """Draw rows of ordinary tokens.

    Args:
        tokenizer: Names its special tokens.
        vocab_size: Rows of the model's token embedding.
        shape: Number of rows, and of tokens in each.
        generator: Draws them.

    Raises:
        CalibrationError: The tokenizer has no ordinary tokens that the model knows.
    """
    allowed = torch.tensor(ordinary_ids(tokenizer, vocab_size))
    if not len(allowed):
        raise CalibrationError(
            f"tokenizer: no ordinary token has an id below the vocabulary size {vocab_size}. Expected some. "
            "Use the tokenizer that belongs to the model."
        )
    ids: list[list[int]] = allowed[torch.randint(len(allowed), shape, generator=generator)].tolist()
    return ids

"""Calibration rows that the model writes itself, for languages and subjects that no text is at hand for.

Every row begins with an ordinary token chosen at random (after BOS where the tokenizer puts one) and goes on with what
the model makes of it, sampled from its own distribution as it is: tokens that the model finds likely come often, and
rows differ. Sources: Williams et al., Self-calibration for language model quantization and pruning (arXiv 2410.17170);
the random first token is that of LLM-QAT (Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import Checkpoint
from ...errors import CalibrationError, reason
from ..model.whole import whole_model
from .calibration import CalibrationConfig, CalibrationSet, require_ids_below
from .tokenizer import Tokenizer, leading_ids, ordinary_ids, token_fingerprint

__all__ = ["sample_rows", "write_rows"]

_ROWS_TOGETHER = 32
"""Rows that are written side by side: nearly as fast as one, and their keys and values have to be kept."""


def write_rows(
    checkpoint: Checkpoint, tokenizer: Tokenizer, config: CalibrationConfig, *, vocab_size: int, device: torch.device
) -> CalibrationSet:
    """Have a model write its calibration rows.

    The whole model is in memory meanwhile: in float32 on a CPU, else in bfloat16.

    Args:
        checkpoint: The model.
        tokenizer: The model's tokenizer.
        config: How many rows, how long, and the seed.
        vocab_size: Rows of the model's token embedding.
        device: Where to run the model.

    Returns:
        The rows; the same seed on the same device gives the same.

    Raises:
        CalibrationError: There is too little memory for the whole model, or BOS or all ordinary tokens do not fit it.
    """
    ordinary = torch.tensor(ordinary_ids(tokenizer, vocab_size))
    bos, eos = leading_ids(tokenizer), tokenizer.eos_token_id
    require_ids_below(torch.tensor(bos), vocab_size, tokenizer)
    if not len(ordinary) or config.tokens_each < len(bos) + 2:
        raise CalibrationError(
            f"self-calibration: {len(ordinary)} ordinary tokens and rows of {config.tokens_each}. Expected some tokens "
            "and at least one to be sampled. Use the model's own tokenizer, and longer rows."
        )
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = whole_model(checkpoint, device=device, dtype=dtype)
    except RuntimeError as error:  # too little memory
        raise CalibrationError(
            f"{checkpoint.directory}: the model cannot be loaded as a whole to write its calibration text "
            f"({reason(error)}). Name a text for --calibration."
        ) from error
    allowed = torch.cat([ordinary, torch.tensor([eos])]) if eos is not None and eos < vocab_size else ordinary
    rng = torch.Generator(device).manual_seed(config.seed)
    rows = []
    for first in range(0, config.rows, _ROWS_TOGETHER):
        count = min(_ROWS_TOGETHER, config.rows - first)
        drawn = torch.randint(len(ordinary), (count, 1), generator=rng, device=device)
        before = torch.tensor([bos] * count, dtype=torch.int64).view(count, -1)
        begun = torch.cat([before, ordinary[drawn.cpu()]], dim=1)
        rows.append(sample_rows(model, begun, config.tokens_each, allowed.tolist(), rng))
    begin = "beginning with BOS" if bos else "without BOS"
    tokens = torch.cat(rows)
    return CalibrationSet(
        tokens=tokens,
        origins=("written by the model",) * config.rows,
        description=f"written by the model itself (seed {config.seed}): {config.rows} rows, each of "
        f"{config.tokens_each} tokens {begin}",
        adds_bos=bool(bos),
        vocabulary=token_fingerprint(tokenizer, tokens),
    )


@torch.no_grad()
def sample_rows(model: Any, begun: Tensor, row_tokens: int, allowed: Sequence[int], rng: torch.Generator) -> Tensor:
    """Go on with rows token by token, each sampled from the model's distribution over the allowed tokens.

    Args:
        model: A causal language model of Transformers, on the generator's device.
        begun: What rows begin with, int64, shape (rows, tokens), on the CPU.
        row_tokens: Length of the whole rows.
        allowed: Ids that may be sampled.
        rng: Source of randomness.

    Returns:
        The rows, int64, shape (rows, row_tokens), on the CPU.
    """
    device = model.device
    latest = begun.to(device)
    choices = torch.tensor(allowed, device=device)
    written, cache = [latest], None
    for _ in range(row_tokens - begun.shape[1]):
        seen = model(input_ids=latest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = seen.past_key_values
        probabilities = seen.logits[:, -1].float()[:, choices].softmax(dim=-1)
        # The least of exponential variables over their rates is a sample; much faster than torch.multinomial on a CPU.
        waits = torch.empty_like(probabilities).exponential_(generator=rng)
        latest = choices[(probabilities / waits).argmax(dim=-1, keepdim=True)]
        written.append(latest)
    return torch.cat(written, dim=1).cpu()

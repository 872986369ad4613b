"""Calibration rows that the model writes itself: what it will be used for, in its own words.

A chat model answers chats (see ``chats``), one after another until a row is full. Other rows, and all rows of a model
without a chat template, begin with an ordinary token chosen at random (after BOS where the tokenizer puts one) and go
on with what the model makes of it. All is sampled from the model's own distribution as it is: tokens that the model
finds likely come often, and rows differ. Sources: Williams et al., Self-calibration for language model quantization and
pruning (arXiv 2410.17170); the random first token is that of LLM-QAT (Liu et al., arXiv 2305.17888).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import Checkpoint
from ...errors import CalibrationError, reason
from ...linalg.products import float32_products
from ...progress import Progress, silent
from ..model.whole import whole_model
from .calibration import CalibrationConfig, CalibrationSet, require_ids_below
from .chats import Prompt, chat_prompts
from .tokenizer import Tokenizer, end_ids, leading_ids, ordinary_ids, token_fingerprint

__all__ = ["ROWS_TOGETHER", "WRITING", "WrittenRow", "sample_rows", "write_rows", "written_together"]

WRITING = "self-calibration: tokens"
"""What ``Progress`` is called with."""

ROWS_TOGETHER = 32
"""Rows that are written side by side: nearly as fast as one, and their keys and values have to be kept."""

_CHAT_SHARE = 0.75
"""Share of the rows that are chats, where the model has a chat template."""

_ALONE = "written by the model"
"""Origin of a row that is no chat."""

_LONGEST_ANSWER = 512
"""Tokens after which another chat begins, whether the answer has ended or not."""


class WrittenRow:
    """One row while it is written.

    Attributes:
        given: Tokens to come that are not sampled.
        ids: Those that are written.
        kinds: What its chats are about.
    """

    def __init__(self, given: Sequence[int], prompts: Iterator[Prompt] | None = None) -> None:
        """Begin a row.

        Args:
            given: Its first tokens.
            prompts: Chats to answer one after another; None leaves the row to the model.
        """
        self.given = deque(given)
        self.ids: list[int] = []
        self.kinds: list[str] = []
        self._answered = 0
        self._prompts = prompts
        self._begin_chat()

    def _begin_chat(self) -> None:
        if self._prompts is not None:
            prompt = next(self._prompts)
            self.given.extend(prompt.ids)
            self.kinds.append(prompt.kind)
            self._answered = 0

    def write(self, sampled: int, ends: Collection[int]) -> int:
        """Add a token, the sampled one unless one is given, and return it."""
        if self.given:
            token = self.given.popleft()
        else:
            token = sampled
            self._answered += 1
            if token in ends or self._answered == _LONGEST_ANSWER:
                self._begin_chat()
        self.ids.append(token)
        return token

    def take(self, count: int) -> list[int]:
        """Add tokens that are given, and return them."""
        return [self.write(-1, ()) for _ in range(count)]


def write_rows(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    config: CalibrationConfig,
    *,
    vocab_size: int,
    device: torch.device,
    progress: Progress = silent,
) -> CalibrationSet:
    """Have a model write its calibration rows.

    The whole model is in memory meanwhile: in float32 on a CPU, else in bfloat16.

    Args:
        checkpoint: The model.
        tokenizer: The model's tokenizer.
        config: How many rows, how long, and the seed.
        vocab_size: Rows of the model's token embedding.
        device: Where to run the model.
        progress: Wraps the places of a row, which are written one after another.

    Returns:
        The rows; the same seed on the same device gives the same.

    Raises:
        CalibrationError: There is too little memory for the whole model, BOS or all ordinary tokens do not fit it, or
            its chat template is not usable.
    """
    ordinary = torch.tensor(ordinary_ids(tokenizer, vocab_size))
    bos = leading_ids(tokenizer)
    require_ids_below(torch.tensor(bos), vocab_size, tokenizer)
    if not len(ordinary) or config.tokens_each < len(bos) + 2:
        raise CalibrationError(
            f"self-calibration: {len(ordinary)} ordinary tokens and rows of {config.tokens_each}. Expected some tokens "
            "and at least one to be sampled. Use the model's own tokenizer, and longer rows."
        )
    prompts = chat_prompts(tokenizer, seed=config.seed) if tokenizer.chat_template else []
    require_ids_below(torch.tensor([token for prompt in prompts for token in prompt.ids]), vocab_size, tokenizer)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = whole_model(checkpoint, device=device, dtype=dtype)
    except RuntimeError as error:  # too little memory
        raise CalibrationError(
            f"{checkpoint.directory}: the model cannot be loaded as a whole to write its calibration text "
            f"({reason(error)}). Name a text for --calibration."
        ) from error
    ends = {each for each in end_ids(checkpoint.directory, tokenizer) if each < vocab_size}
    allowed = sorted({*ordinary.tolist(), *ends})
    rng = torch.Generator(device).manual_seed(config.seed)
    chats = round(_CHAT_SHARE * config.rows) if prompts else 0
    drawn = torch.randint(len(ordinary), (config.rows - chats,), generator=rng, device=device).cpu()
    shared = itertools.cycle(prompts)
    rows = [WrittenRow(bos, shared) for _ in range(chats)]
    rows += [WrittenRow([*bos, int(token)]) for token in ordinary[drawn]]
    with float32_products(device):
        for first in range(0, config.rows, ROWS_TOGETHER):
            sample_rows(model, rows[first : first + ROWS_TOGETHER], config.tokens_each, allowed, ends, rng, progress)
    tokens = torch.tensor([row.ids for row in rows])
    begin = "beginning with BOS" if bos else "without BOS"
    what = f"{chats} of them answers to chats, " if chats else ""
    return CalibrationSet(
        tokens=tokens,
        origins=tuple(f"chat: {'; '.join(row.kinds)}" if row.kinds else _ALONE for row in rows),
        description=f"written by the model itself (seed {config.seed}): {config.rows} rows, {what}each of "
        f"{config.tokens_each} tokens {begin}",
        adds_bos=bool(bos),
        vocabulary=token_fingerprint(tokenizer, tokens),
    )


@torch.no_grad()
def sample_rows(
    model: Any,
    rows: Sequence[WrittenRow],
    row_tokens: int,
    allowed: Sequence[int],
    ends: Collection[int],
    rng: torch.Generator,
    progress: Progress = silent,
) -> None:
    """Write rows side by side, token by token: those that are given, else sampled from the model's distribution.

    Args:
        model: A causal language model of Transformers.
        rows: The rows, nothing written of them.
        row_tokens: Length of the whole rows.
        allowed: Ids that may be sampled.
        ends: Ids that end an answer.
        rng: Source of randomness, on the model's device.
        progress: Wraps the places.
    """
    choices = torch.tensor(allowed, device=model.device)

    def sampled(logits: Tensor) -> Tensor:
        probabilities = logits.float()[:, choices].softmax(dim=-1)
        # The least of exponential variables over their rates is a sample; much faster than torch.multinomial on a CPU.
        waits = torch.empty_like(probabilities).exponential_(generator=rng)
        return choices[(probabilities / waits).argmax(dim=-1)]

    given = min(*(len(row.given) for row in rows), row_tokens)
    first = torch.tensor([row.take(given) for row in rows], device=model.device)
    steps = written_together(model, rows, first, sampled, ends)
    for _ in progress(range(row_tokens - given), WRITING):
        next(steps)


@torch.no_grad()
def written_together(
    model: Any, rows: Sequence[WrittenRow], first: Tensor, choose: Callable[[Tensor], Tensor], ends: Collection[int]
) -> Iterator[None]:
    """Write rows side by side, without end: every step adds a token to each of them.

    Rows need not be padded, whatever the lengths of what is given: at every place each has a token of either kind.

    Args:
        model: A causal language model of Transformers.
        rows: The rows, the first tokens of each written.
        first: Those, as many of each row, int64, shape (rows, tokens), on the model's device.
        choose: Chooses the next tokens, int64, shape (rows,), from logits of shape (rows, vocabulary).
        ends: Ids that end an answer.
    """
    latest, cache = first, None
    while True:
        seen = model(input_ids=latest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = seen.past_key_values
        chosen = choose(seen.logits[:, -1]).tolist()
        written = [[row.write(token, ends)] for row, token in zip(rows, chosen, strict=True)]
        latest = torch.tensor(written, device=model.device)
        yield

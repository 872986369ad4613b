"""The same prompt answered by the original and by quantized models: what the numbers of a comparison look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.source.checkpoint import TensorSource
from ..errors import CalibrationError
from ..linalg.products import float32_products
from ..measure.device import free_memory
from ..measure.model.whole import whole_model
from ..measure.text.calibration import require_ids_below
from ..measure.text.tokenizer import Tokenizer, chat_template, end_ids, leading_ids

__all__ = ["Answers", "Question", "ask", "question_of"]

_PROMPT = "Why is the sky blue? Answer in two sentences."
_ANSWER_TOKENS = 80

_MOST_MEMORY_SHARE = 0.5
"""Of the memory that is free: a larger model is not loaded as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What two models make of the same prompt, by greedy decoding.

    Attributes:
        prompt: The prompt, as a user writes it.
        original: The original's answer.
        quantized: The quantized model's.
    """

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Question:
    """A prompt as token ids.

    Attributes:
        prompt: The prompt, as a user writes it.
        ids: Its tokens, those of the chat template included.
        ends: Tokens that end an answer.
        tokenizer: Decodes answers.
    """

    prompt: str
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    tokenizer: Tokenizer


def question_of(source: TensorSource, tokenizer: Tokenizer, prompt: str | None, *, vocab_size: int) -> Question | None:
    """Return what a model is asked.

    Args:
        source: The original.
        tokenizer: Its tokenizer.
        prompt: The prompt, which a model without a chat template continues; None asks chat models one of our own,
            and others nothing.
        vocab_size: Rows of the models' token embeddings.

    Returns:
        None where nothing is asked.

    Raises:
        CalibrationError: A prompt is given, and the chat template fails on it, or its tokens do not fit the model.
    """
    if prompt is None and not tokenizer.chat_template:
        return None
    text = _PROMPT if prompt is None else prompt
    try:
        ids = _prompt_ids(tokenizer, text)
        require_ids_below(torch.tensor(ids), vocab_size, tokenizer)
        ends = end_ids(source.directory, tokenizer)
    except CalibrationError:
        if prompt is None:  # nobody asked: such a model can be compared all the same
            return None
        raise
    return Question(prompt=text, ids=tuple(ids), ends=tuple(sorted(ends)), tokenizer=tokenizer)


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return [*leading_ids(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    with chat_template(tokenizer) as template:
        seen = {"enable_thinking": False} if "enable_thinking" in template.source else {}
        turns = [{"role": "user", "content": prompt}]
        text = template.render(turns, "prompt", add_generation_prompt=True, **seen)
    ids: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = leading_ids(tokenizer)
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def ask(source: TensorSource, question: Question, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return a model's answer by greedy decoding, at most 80 tokens of it.

    Args:
        source: The model, which is loaded as a whole.
        question: What to ask.
        device: Where to run it.
        dtype: Dtype to run it in.

    Returns:
        None where its weights would take more than half of the memory that is free.
    """
    weights = sum(torch.Size(source.shape(name)).numel() for name in source.names)
    if weights * dtype.itemsize > _MOST_MEMORY_SHARE * free_memory(device):
        return None
    model = whole_model(source, device=device, dtype=dtype)
    ids = torch.tensor([question.ids], device=device)
    with torch.no_grad(), float32_products(device):
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=list(question.ends),
            pad_token_id=question.ends[0] if question.ends else 0,
        )
    return _decoded(written[0, ids.shape[1] :].tolist(), question)


def _decoded(ids: Sequence[int], question: Question) -> str:
    count = next((n for n, token in enumerate(ids) if token in question.ends), len(ids))
    return question.tokenizer.decode(list(ids[:count])).strip()

"""How far the answers of two models to the same prompts agree, and how long they are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..measure.text.tokenizer import Tokenizer
from .domains.masks import shared_length
from .metrics.bootstrap import Bootstrapped, bootstrapped_mean

__all__ = ["AnswerAgreement", "ThoughtMarks", "answer_agreement", "thinking_tokens", "thought_marks"]

ThoughtMarks = tuple[str, str]
"""What begins and what ends a model's thoughts."""

_MARKS: tuple[ThoughtMarks, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
"""Of Qwen, DeepSeek and many others; Magistral; Seed-OSS; Command A; gpt-oss: as their chat templates have them."""

_CUE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerAgreement:
    """Answers to the same prompts by greedy decoding. Intervals are bootstrapped over the prompts, in pairs.

    Attributes:
        prompts: Number of prompts.
        most_tokens: Tokens after which an answer is cut.
        same: Share of answers that are the same, token by token, 0 to 1.
        shared_tokens: Mean number of tokens that two answers begin with alike; all of them where they are the same.
        original_tokens: Mean length of the original's answers, thoughts included.
        quantized_tokens: The same of the quantized model's.
        length_change: Quantized minus original, mean tokens.
        original_ended: Share of the original's answers that ended before they were cut, 0 to 1.
        quantized_ended: The same of the quantized model's.
        original_thinking: Mean tokens of the original's thoughts; 0 for a model that writes none.
        quantized_thinking: The same of the quantized model's.
        thinking_change: Quantized minus original, mean tokens.
    """

    prompts: int
    most_tokens: int
    same: Bootstrapped
    shared_tokens: Bootstrapped
    original_tokens: Bootstrapped
    quantized_tokens: Bootstrapped
    length_change: Bootstrapped
    original_ended: float
    quantized_ended: float
    original_thinking: Bootstrapped
    quantized_thinking: Bootstrapped
    thinking_change: Bootstrapped


def answer_agreement(
    original: Sequence[Sequence[int]],
    quantized: Sequence[Sequence[int]],
    *,
    most_tokens: int,
    original_thinking: Sequence[int],
    quantized_thinking: Sequence[int],
) -> AnswerAgreement:
    """Compare answers in pairs.

    Args:
        original: Token ids of the original's answers, without the token that ends them.
        quantized: The quantized model's to the same prompts.
        most_tokens: Tokens after which an answer is cut; one so long has not ended.
        original_thinking: Tokens of the thoughts in each of the original's.
        quantized_thinking: The same of the quantized model's.
    """
    pairs = [(list(before), list(after)) for before, after in zip(original, quantized, strict=True)]

    def mean(values: Sequence[float]) -> Bootstrapped:
        return bootstrapped_mean(torch.tensor(values, dtype=torch.float64), [1] * len(values))

    def ended(answers: Sequence[Sequence[int]]) -> float:
        return sum(len(answer) < most_tokens for answer in answers) / len(answers)

    return AnswerAgreement(
        prompts=len(pairs),
        most_tokens=most_tokens,
        same=mean([before == after for before, after in pairs]),
        shared_tokens=mean([shared_length(before, after) for before, after in pairs]),
        original_tokens=mean([len(before) for before, _ in pairs]),
        quantized_tokens=mean([len(after) for _, after in pairs]),
        length_change=mean([len(after) - len(before) for before, after in pairs]),
        original_ended=ended(original),
        quantized_ended=ended(quantized),
        original_thinking=mean(original_thinking),
        quantized_thinking=mean(quantized_thinking),
        thinking_change=mean([b - a for a, b in zip(original_thinking, quantized_thinking, strict=True)]),
    )


def thought_marks(template: str) -> ThoughtMarks | None:
    """Return what begins and ends a model's thoughts: the marks that its chat template has; None if it has none."""
    return next((marks for marks in _MARKS if marks[0] in template or marks[1] in template), None)


def thinking_tokens(
    prompt: Sequence[int], answer: Sequence[int], marks: ThoughtMarks | None, tokenizer: Tokenizer
) -> int:
    """Return how many tokens an answer's thoughts take, with their marks; all of them where they do not end.

    Args:
        prompt: Token ids of the prompt; a chat template may have begun the thoughts in it.
        answer: Token ids of the answer.
        marks: What begins and what ends thoughts; None for a model that writes none.
        tokenizer: Decodes both.
    """
    if marks is None:
        return 0
    begin, end = marks
    begun = tokenizer.decode(list(prompt[-_CUE_TOKENS:])).rstrip().endswith(begin)
    if not begun and not tokenizer.decode(list(answer)).lstrip().startswith(begin):
        return 0
    # The number of tokens from which on the end is among them.
    counts = range(len(answer))
    return bisect_left(counts, True, key=lambda count: end in tokenizer.decode(list(answer[:count])))

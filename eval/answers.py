"""The same prompts answered by the original and by quantized models: what the numbers of a comparison look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.source.checkpoint import TensorSource
from ..errors import CalibrationError, ConfigError
from ..linalg.products import float32_products
from ..measure.device import free_memory
from ..measure.model.whole import whole_model
from ..measure.text.calibration import require_ids_below
from ..measure.text.chat_template import RefusedChatError
from ..measure.text.generation import WrittenRow, written_together
from ..measure.text.mixture import BUILT_IN
from ..measure.text.tokenizer import Tokenizer, chat_template, end_ids, leading_ids
from .agreement import AnswerAgreement, ThoughtMarks, answer_agreement, thinking_tokens, thought_marks
from .domains.sets import DOMAINS, chat_of, documents_of

__all__ = ["Answers", "Question", "Questions", "answers_of", "ask", "questions_of"]

_PROMPT = "Why is the sky blue? Answer in two sentences."
_SHOWN_TOKENS = 80

_MOST_TOKENS, _MOST_THINKING_TOKENS = 256, 2048
"""Tokens after which the answers are cut that are only counted, of models without thoughts and with them."""

_MOST_MEMORY_SHARE = 0.5
"""Of the memory that is free: a larger model is not loaded as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What two models make of the same prompts, by greedy decoding.

    Attributes:
        prompt: The prompt that is shown, as a user writes it.
        original: The original's answer to it.
        quantized: The quantized model's.
        agreement: Of the answers to many other prompts; None where they were not asked for.
    """

    prompt: str
    original: str
    quantized: str
    agreement: AnswerAgreement | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as token ids.

    Attributes:
        ids: Its tokens, those of the chat template included.
        most_tokens: Tokens after which an answer is cut.
    """

    ids: tuple[int, ...]
    most_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Questions:
    """What both models are asked.

    Attributes:
        prompt: The prompt that is shown, as a user writes it.
        asked: The same as token ids, then prompts whose answers are only counted.
        ends: Tokens that end an answer.
        marks: What begins and what ends thoughts; None for a model that writes none.
        tokenizer: Decodes answers.
    """

    prompt: str
    asked: tuple[Question, ...]
    ends: tuple[int, ...]
    marks: ThoughtMarks | None
    tokenizer: Tokenizer


def questions_of(
    source: TensorSource, tokenizer: Tokenizer, prompt: str | None, *, vocab_size: int, many: bool = False
) -> Questions | None:
    """Return what a model is asked.

    Args:
        source: The original.
        tokenizer: Its tokenizer.
        prompt: The prompt to show, which a model without a chat template continues; None asks chat models one of our
            own, and others nothing.
        vocab_size: Rows of the models' token embeddings.
        many: Whether the chats of our own are asked as well, as the template renders them by default.

    Returns:
        None where nothing is asked.

    Raises:
        CalibrationError: Something is asked for, and the chat template fails on it, or its tokens do not fit the model.
        ConfigError: Many prompts are asked for, and the model has no chat template.
    """
    if many and not tokenizer.chat_template:
        raise ConfigError(
            f"{source.directory}: has no chat template. Got a model that answers no chats. Expected a chat model to "
            "compare answers of. Leave --answers (answers) out."
        )
    if prompt is None and not tokenizer.chat_template:
        return None
    text = _PROMPT if prompt is None else prompt
    marks = thought_marks(str(tokenizer.chat_template or ""))
    most = _MOST_TOKENS if marks is None else _MOST_THINKING_TOKENS
    try:
        asked = [Question(tuple(_prompt_ids(tokenizer, text)), _SHOWN_TOKENS)]
        asked += [Question(tuple(ids), most) for ids in _chat_ids(tokenizer)] if many else []
        require_ids_below(torch.tensor([token for each in asked for token in each.ids]), vocab_size, tokenizer)
        ends = end_ids(source.directory, tokenizer)
    except CalibrationError:
        if prompt is None and not many:  # nobody asked: such a model can be compared all the same
            return None
        raise
    return Questions(prompt=text, asked=tuple(asked), ends=tuple(sorted(ends)), marks=marks, tokenizer=tokenizer)


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if not tokenizer.chat_template:
        return [*leading_ids(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    with chat_template(tokenizer) as template:
        seen = {"enable_thinking": False} if "enable_thinking" in template.source else {}
        turns = [{"role": "user", "content": prompt}]
        return _ids(tokenizer, template.render(turns, "prompt", add_generation_prompt=True, **seen))


def _chat_ids(tokenizer: Tokenizer) -> Iterator[list[int]]:
    # Chats up to their last answer, as far as the template takes them.
    (chats,) = (domain for domain in DOMAINS if domain.name == "chat")
    with chat_template(tokenizer) as template:
        for document in documents_of(chats, BUILT_IN)[1]:
            turns = chat_of(document)["messages"][:-1]
            try:
                yield _ids(tokenizer, template.render(turns, document.origin, add_generation_prompt=True))
            except RefusedChatError:
                continue


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = leading_ids(tokenizer)
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def ask(
    source: TensorSource, questions: Questions, *, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[int, ...], ...] | None:
    """Return a model's answers by greedy decoding, as token ids without the one that ends each.

    Args:
        source: The model, which is loaded as a whole.
        questions: What to ask.
        device: Where to run it.
        dtype: Dtype to run it in.

    Returns:
        None where its weights would take more than half of the memory that is free.
    """
    weights = sum(torch.Size(source.shape(name)).numel() for name in source.names)
    if weights * dtype.itemsize > _MOST_MEMORY_SHARE * free_memory(device):
        return None
    model = whole_model(source, device=device, dtype=dtype)
    rows = [WrittenRow(each.ids) for each in questions.asked]
    given = min(len(each.ids) for each in questions.asked)
    first = torch.tensor([row.take(given) for row in rows], device=device)

    def written(row: WrittenRow, each: Question) -> tuple[tuple[int, ...], bool]:
        # The answer so far, and whether it is finished.
        ids = row.ids[len(each.ids) :][: each.most_tokens]
        length = next((n for n, token in enumerate(ids) if token in questions.ends), len(ids))
        return tuple(ids[:length]), length < len(ids) or length == each.most_tokens

    with torch.no_grad(), float32_products(device):
        for _ in written_together(model, rows, first, lambda logits: logits.argmax(dim=-1), questions.ends):
            answers = [written(row, each) for row, each in zip(rows, questions.asked, strict=True)]
            if all(finished for _, finished in answers):
                break
    return tuple(ids for ids, _ in answers)


def answers_of(
    quantized: TensorSource,
    questions: Questions | None,
    original: Sequence[Sequence[int]] | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Answers | None:
    """Ask a quantized model what its original was asked.

    Args:
        quantized: The model.
        questions: What to ask; None for nothing.
        original: What ``ask`` returned of the original.
        device: Where to run it.
        dtype: Dtype to run it in.

    Returns:
        None where nothing is asked, or one of the models did not fit into memory.
    """
    answers = None if questions is None or original is None else ask(quantized, questions, device=device, dtype=dtype)
    if questions is None or original is None or answers is None:
        return None
    before, after = (questions.tokenizer.decode(list(each[0])).strip() for each in (original, answers))
    return Answers(
        prompt=questions.prompt, original=before, quantized=after, agreement=_agreement(questions, original, answers)
    )


def _agreement(
    questions: Questions, original: Sequence[Sequence[int]], quantized: Sequence[Sequence[int]]
) -> AnswerAgreement | None:
    counted = questions.asked[1:]
    if not counted:
        return None

    def thinking(answers: Sequence[Sequence[int]]) -> list[int]:
        return [
            thinking_tokens(each.ids, answer, questions.marks, questions.tokenizer)
            for each, answer in zip(counted, answers, strict=True)
        ]

    return answer_agreement(
        original[1:],
        quantized[1:],
        most_tokens=counted[0].most_tokens,
        original_thinking=thinking(original[1:]),
        quantized_thinking=thinking(quantized[1:]),
    )

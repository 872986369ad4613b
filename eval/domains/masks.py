"""Texts and chats as token ids, with a mask: which of them count, in chats only what the assistant answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...measure.text.chat_rows import turns_as_templates_read
from ...measure.text.chat_template import ChatTemplate, RefusedChatError
from ...measure.text.tokenizer import Tokenizer, leading_ids

__all__ = ["MarkedText", "MaskedTokens", "answers_mask", "marked_chat", "masked_tokens", "shared_length"]

_MOST_CUE = 64
"""Characters that a template may put after the assistant's name where it asks for an answer: an empty thought."""

_TOOLS = "You can call these functions, by answering with <tool_call>{...}</tool_call>:"

_Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A text, and what of it counts.

    Attributes:
        text: The text.
        spans: First character, and the one after the last, of every part that counts, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """A text as token ids.

    Attributes:
        ids: The ids, BOS included where the tokenizer puts it.
        counted: For each whether its prediction counts; never of the first.
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


def answers_mask(template: ChatTemplate | None, *, tools: bool) -> str:
    """Return in words which tokens of chats count, and how they are found.

    Args:
        template: The model's chat template; None if it has none.
        tools: Whether the chats have tools.
    """
    if template is None:
        return "the assistant's answers, in turns that begin with User: and Assistant:, as there is no chat template"
    how = "marked by {% generation %} in the chat template"
    if not template.marks_answers:
        how = "told apart by rendering the turns before each with the chat template"
    as_text = "; tools and calls are written as text, as the template has no place for them"
    return f"the assistant's answers, {how}{as_text if tools and not _takes_tools(template) else ''}"


def marked_chat(template: ChatTemplate | None, chat: Mapping[str, Any], where: str) -> MarkedText | None:
    """Render a chat and mark its answers.

    Args:
        template: The model's chat template; None writes turns as plain text.
        chat: Its ``messages`` and perhaps ``tools``, as OpenAI has them, calls with arguments as objects.
        where: Begins the message of an error.

    Returns:
        None where the template does not take the chat, or no answer can be told apart.

    Raises:
        CalibrationError: The template is not valid or takes too much time or memory, or a turn has no role or text.
    """
    turns, tools = chat["messages"], chat.get("tools")
    if tools and not _takes_tools(template):
        turns, tools = _calls_as_text(turns, tools), None
    if template is None:
        return _plain(next(turns_as_templates_read(turns, "", where)))
    seen = {"tools": tools} if tools else {}
    for attempt in turns_as_templates_read(turns, template.source, where):
        try:
            marked = _rendered(template, attempt, where, seen)
        except RefusedChatError:
            continue
        return marked if marked.spans else None
    return None


def masked_tokens(tokenizer: Tokenizer, marked: MarkedText, most: int) -> MaskedTokens:
    """Return a text's tokens, and which of them count.

    A token that begins before a part that counts does so too if it reaches into it.

    Args:
        tokenizer: The model's.
        marked: The text.
        most: Tokens after which it is cut.
    """

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def token_at(place: int) -> int:
        return len(ids) if place == len(marked.text) else shared_length(ids_of(marked.text[:place]), ids)

    ids, lead = ids_of(marked.text), leading_ids(tokenizer)
    counted = [False] * len(ids)
    for span in marked.spans:
        first, end = map(token_at, span)
        counted[first:end] = [True] * (end - first)
    if ids[: len(lead)] != lead:
        ids, counted = lead + ids, [False] * len(lead) + counted
    counted[:1] = [False] * len(ids[:1])  # what comes first is never predicted
    return MaskedTokens(tuple(ids[:most]), tuple(counted[:most]))


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many letters or tokens two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _takes_tools(template: ChatTemplate | None) -> bool:
    return template is not None and "tools" in template.source


def _rendered(template: ChatTemplate, turns: list[dict[str, Any]], where: str, seen: dict[str, Any]) -> MarkedText:
    if template.marks_answers:
        text, marked = template.render_marked(turns, where, **seen)
        return MarkedText(text, tuple(span for span in marked if span[0] < span[1]))
    text, spans = template.render(turns, where, **seen), []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = template.render(turns[:number], where, add_generation_prompt=True, **seen)
        after = template.render(turns[: number + 1], where, **seen) if number + 1 < len(turns) else text
        first, end = shared_length(before, text), len(after.rstrip())
        # A template may write a turn otherwise once others follow it, as those that drop thoughts: it is left out then.
        if len(before) - first <= _MOST_CUE and text.startswith(after.rstrip()) and first < end:
            spans.append((first, end))
    return MarkedText(text, tuple(spans))


def _plain(turns: _Turns) -> MarkedText | None:
    text, spans = "", []
    for turn in turns:
        said = str(turn["content"]).strip()
        text += f"{str(turn['role']).capitalize()}: "
        if turn["role"] == "assistant":
            spans.append((len(text), len(text) + len(said)))
        text += f"{said}\n\n"
    return MarkedText(text, tuple(spans)) if spans else None


def _calls_as_text(turns: _Turns, tools: Sequence[Any]) -> list[dict[str, Any]]:
    # User and assistant alone, which all templates know; the form of calls is that of Hermes and of Qwen.
    written: list[dict[str, Any]] = []
    for turn in turns:
        role, said = turn["role"], str(turn.get("content") or "")
        if role == "tool":
            role, said = "user", f"<tool_response>\n{said}\n</tool_response>"
        for call in turn.get("tool_calls") or ():
            function = {key: call["function"][key] for key in ("name", "arguments")}
            said = f"{said}\n<tool_call>\n{_json(function)}\n</tool_call>".strip()
        if written and written[-1]["role"] == role:  # results of several calls
            written[-1]["content"] += f"\n{said}"
        else:
            written.append({"role": role, "content": said})
    first = next(turn for turn in written if turn["role"] == "user")
    first["content"] = "\n".join([_TOOLS, *map(_json, tools), "", first["content"]])
    return written


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

"""Chats in the shapes that data sets have them in, made into text that holds all of their turns.

Templates read ``role`` and ``content``. They see nothing of other names, and may leave out turns of a role that they do
not know, without a word. So names are changed to those that templates know, and each turn is looked for in the text.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import CalibrationError
from .chat_template import ChatTemplate, RefusedChatError

__all__ = ["CHAT_COLUMNS", "chat_turns", "render_turns", "turns_as_templates_read"]

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of chat turns, in the order in which they are looked for when the user names none."""

_PAIRS = (("prompt", "completion"), ("instruction", "output"))
"""Columns of a question and its answer in TRL and in Alpaca, whose ``input`` belongs to the question."""

_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "text")
"""Names in Transformers and TRL, then in ShareGPT (FastChat, Axolotl, LLaMA-Factory), then elsewhere."""

_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "system": "system",
    "developer": "system",
}
"""Roles in Transformers, ShareGPT, LLaMA-Factory, Gemini and OpenAI, and what templates call them."""

_END_CHARACTERS = 32
"""What of a turn is looked for: its first and its last line, so much of them. Templates strip turns."""

_END_OF_THOUGHT = "</think>"
"""Templates of reasoning models leave out what is before it."""

_Turn = dict[str, Any]


def chat_turns(row: Mapping[str, Any], column: str | None) -> list[Mapping[str, Any]] | None:
    """Return the chat turns of a row, or None if there are none.

    Args:
        row: A row of a data set. Its ``system`` becomes the first turn, where there is none.
        column: The column of the turns: a list of objects, JSON text of such a list, or an object of lists. None looks
            for `CHAT_COLUMNS`, then for columns of questions and answers.
    """
    if column is None:
        column = next((name for name in CHAT_COLUMNS if name in row), None)
    turns = _pair(row) if column is None else _turns(row.get(column))
    system = row.get("system")
    if turns and isinstance(system, str) and system.strip() and turns[0].get(_key(turns[0], _ROLE_KEYS)) != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _turns(value: Any) -> list[Mapping[str, Any]] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # a text that only begins so
            return None
    if isinstance(value, Mapping) and value and all(isinstance(entries, list) for entries in value.values()):
        lengths = {len(entries) for entries in value.values()}
        if len(lengths) == 1:  # how the datasets library gives a sequence of objects
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        return list(value)
    return None


def _pair(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    names = next((names for names in _PAIRS if all(name in row for name in names)), None)
    if names is None:
        return None
    question, answer = (row[name] for name in names)
    more = row.get("input") if names[0] == "instruction" else None
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        question = f"{question}\n{more}"
    turns: list[Mapping[str, Any]] = []
    for role, value in (("user", question), ("assistant", answer)):
        turns += _turns(value) or [{"role": role, "content": value}]
    return turns


def render_turns(template: ChatTemplate, turns: Sequence[Mapping[str, Any]], where: str) -> str:
    """Return the text of one chat; empty if its turns have no text.

    Args:
        template: Renders it.
        turns: Objects with a role and a text, by any of the names that are in use; a text may be a list of parts.
        where: Begins the message of an error.

    Raises:
        CalibrationError: A turn has no role or no text by a known name, the template cannot render the turns, or it
            leaves out what a turn says.
    """
    named = _all_named(turns, where)
    if not any(text.strip() for turn in named for text in _texts(turn)):
        return ""
    problem: RefusedChatError | None = None
    for attempt in _attempts(named, template.source):
        try:
            text = template.render(attempt, where)
            _require_all(attempt, turns, text, where)
        except RefusedChatError as error:
            problem = problem or error
        else:
            return text
    assert problem is not None
    raise problem


def turns_as_templates_read(
    turns: Sequence[Mapping[str, Any]], template: str, where: str
) -> Iterator[list[dict[str, Any]]]:
    """Yield turns by the names that templates read, in all forms that one may take.

    Args:
        turns: As for ``render_turns``.
        template: The template's source; may be empty.
        where: As for ``render_turns``.

    Raises:
        CalibrationError: A turn has no role or no text by a known name.
    """
    yield from _attempts(_all_named(turns, where), template)


def _all_named(turns: Sequence[Mapping[str, Any]], where: str) -> list[_Turn]:
    return [_named(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]


def _attempts(turns: Sequence[_Turn], template: str) -> Iterator[list[_Turn]]:
    # Roles that the template names itself are kept at first. Most templates want strings; some of those for images want
    # lists of parts only.
    named = {role for turn in turns if any(f"{mark}{(role := turn['role'])}{mark}" in template for mark in "'\"")}
    renamed = {role for role in named if _role(role) != role}
    for kept in (named, named - renamed) if renamed else (named,):
        roles = [turn["role"] if turn["role"] in kept else _role(turn["role"]) for turn in turns]
        for form in (_joined, _parts):
            yield [
                {**turn, "role": role, **({"content": form(turn["content"])} if "content" in turn else {})}
                for turn, role in zip(turns, roles, strict=True)
            ]


def _role(role: str) -> str:
    return _ROLES.get(role.lower(), role)


def _joined(content: Any) -> Any:
    """Return a list of parts as one string, if all of them are text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else content


def _parts(content: Any) -> Any:
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _named(turn: Mapping[str, Any], where: str) -> _Turn:
    """Return a turn with its role and its text by the names that templates read."""
    role_key, text_key = _key(turn, _ROLE_KEYS), _key(turn, _TEXT_KEYS)
    role, content = turn.get(role_key), turn.get(text_key)
    rest = {key: value for key, value in turn.items() if value is not None and key not in (role_key, text_key)}
    if not isinstance(role, str) or not ({*_TEXT_KEYS, "tool_calls"} & turn.keys()):
        raise CalibrationError(
            f"{where}: no role or no text. Got the keys {', '.join(map(repr, turn)) or 'none'}. Expected 'role' and "
            "'content', or 'from' and 'value'. Rename the keys, or name another column."
        )
    if content is not None and not isinstance(content, str | list | Mapping):
        raise CalibrationError(
            f"{where}: the text is of the wrong type. Got {type(content).__name__}. Expected a string, or a list of "
            "parts. Repair or remove the row."
        )
    return {"role": role, **({} if content is None else {"content": content}), **rest}


def _key(turn: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((key for key in keys if turn.get(key) is not None), keys[0])


def _texts(turn: _Turn) -> Iterator[str]:
    """Yield what a turn says: its text, the text of its parts, the names of the tools that it calls."""
    content = turn.get("content")
    if isinstance(content, list):
        yield from _strings([part.get("text") if isinstance(part, Mapping) else part for part in content])
    else:
        yield from _strings(content)
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        yield from _strings(function.get("name") if isinstance(function, Mapping) else None)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | Mapping):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(entry)


def _require_all(turns: Sequence[_Turn], original: Sequence[Mapping[str, Any]], text: str, where: str) -> None:
    for number, (turn, found) in enumerate(zip(turns, original, strict=True), start=1):
        content = turn.get("content")
        if isinstance(content, list | dict) and str(content) in text:
            raise RefusedChatError(
                f"{where}, turn {number}: the chat template writes the content as Python shows it. Got a "
                f"{type(content).__name__}. Expected a string. Remove all parts but text, or the row."
            )
        missing = next((said for said in _texts(turn) if not _holds(text, said)), None)
        if missing is not None:
            raise RefusedChatError(
                f"{where}, turn {number}: the chat template leaves out {missing.strip()[:_END_CHARACTERS]!r}. Got the "
                f"role {found.get(_key(found, _ROLE_KEYS))!r}, with the keys {', '.join(map(repr, found))}. Expected "
                "the text of every turn. Rename the role, or remove the row."
            )


def _holds(text: str, said: str) -> bool:
    lines = said.rpartition(_END_OF_THOUGHT)[2].strip().splitlines() or said.strip().splitlines()
    ends = [lines[0][:_END_CHARACTERS], lines[-1][-_END_CHARACTERS:]] if lines else [""]
    return any(
        form in text
        for end in map(str.strip, ends)
        for form in (end, json.dumps(end, ensure_ascii=False)[1:-1], html.escape(end))
    )

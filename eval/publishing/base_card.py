"""The original model's own card: a README.md from outside, of which little is believed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...checkpoint.files.disk_errors import explained_reading
from ...checkpoint.files.side_files import CARD_NAME
from ...checkpoint.source.hub import confined_file
from ...errors import CheckpointError

__all__ = ["BaseCard", "parse_base_card", "read_base_card", "split_front"]

_MOST_CARD_BYTES = 1 << 20
_MOST_FRONT_CHARACTERS = 1 << 16
_MOST_BRACKETS = 1000
"""Of front matter: the time that YAML's parser takes grows with the square of their depth."""

_MOST_BODY_CHARACTERS = 1 << 18
_MOST_VALUE_CHARACTERS = 500
_MOST_ITEMS = 200

_SINGLE = ("license", "license_name", "license_link", "pipeline_tag")
_LISTS = ("language", "tags")

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseCard:
    """What a quantized model's card takes over.

    Attributes:
        values: Of ``license``, ``license_name``, ``license_link`` and ``pipeline_tag`` what is there.
        lists: Of ``language`` and ``tags`` what is there.
        body: The card itself, Markdown, front matter excluded; empty if there is none.
        notes: What could not be taken over, and why, as sentences.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    body: str = ""
    notes: tuple[str, ...] = ()


def read_base_card(directory: Path) -> BaseCard:
    """Read the card of a model directory; whatever is wrong with it becomes a note.

    Args:
        directory: The original model's directory.

    Raises:
        CheckpointError: The card is a link that leads outside the model directory.
    """
    path = directory / CARD_NAME
    if not path.is_symlink() and not path.exists():
        return BaseCard(notes=("The original model has no card: licence and language are not known here.",))
    path = confined_file(directory, CARD_NAME)
    with explained_reading(path, CheckpointError), path.open("rb") as file:
        data = file.read(_MOST_CARD_BYTES + 1)
    if len(data) > _MOST_CARD_BYTES:
        return BaseCard(notes=(f"The original model's card is larger than {_MOST_CARD_BYTES >> 20} MiB: left out.",))
    return parse_base_card(data.decode("utf-8", errors="replace"))


def split_front(text: str) -> tuple[str, str]:
    """Return a card's front matter, its lines of hyphens included, and the card itself."""
    found = _FRONT.match(text)
    return ("", text) if found is None else (text[: found.end()], text[found.end() :])


def parse_base_card(text: str) -> BaseCard:
    """Take a card apart.

    YAML is read without any types: every value is a string, a list or a mapping, and nothing is constructed, merged or
    resolved.

    Args:
        text: The whole of ``README.md``.
    """
    found = _FRONT.match(text)
    body = _CONTROL.sub("", text[found.end() :] if found else text).strip()
    notes: list[str] = []
    entries: Mapping[str, Any] = {}
    if found is not None:
        entries = _front_matter(found[1], notes)
    elif text.lstrip("\ufeff").startswith("---"):
        notes.append("The original card's front matter has no end: licence and language are not carried over.")
    if len(body) > _MOST_BODY_CHARACTERS:
        body = body[:_MOST_BODY_CHARACTERS]
        notes.append(f"The original card is cut after {_MOST_BODY_CHARACTERS} characters.")
    return BaseCard(
        values={key: value for key in _SINGLE if (value := _value(entries, key, notes)) is not None},
        lists={key: values for key in _LISTS if (values := _values(entries, key, notes))},
        body=body,
        notes=tuple(notes),
    )


def _front_matter(text: str, notes: list[str]) -> Mapping[str, Any]:
    problem = "is not a mapping"
    if len(text) > _MOST_FRONT_CHARACTERS:
        problem = "is too long"
    elif text.count("[") + text.count("{") > _MOST_BRACKETS:
        problem = "has too many brackets"
    else:
        try:
            entries = yaml.load(text, Loader=yaml.BaseLoader)  # strings, lists and mappings only
        except (yaml.YAMLError, RecursionError, ValueError):
            problem = "is not valid YAML"
        else:
            if entries is None or entries == "":
                return {}
            if isinstance(entries, dict):
                return entries
    notes.append(f"The original card's front matter {problem}: licence and language are not carried over.")
    return {}


def _value(entries: Mapping[str, Any], key: str, notes: list[str]) -> str | None:
    value = entries.get(key)
    if isinstance(value, list) and len(value) == 1:  # as some licences are written
        value = value[0]
    if value is None or value == "":
        return None
    if _is_short(value):
        return str(value)
    notes.append(f"The original card's `{key}` cannot be read: not carried over.")
    return None


def _values(entries: Mapping[str, Any], key: str, notes: list[str]) -> tuple[str, ...]:
    value = entries.get(key)
    items = [value] if isinstance(value, str) else value
    if not items:
        return ()
    if isinstance(items, list) and len(items) <= _MOST_ITEMS and all(map(_is_short, items)):
        return tuple(dict.fromkeys(item for item in items if item))
    notes.append(f"The original card's `{key}` cannot be read: not carried over.")
    return ()


def _is_short(value: object) -> bool:
    if not isinstance(value, str) or len(value) > _MOST_VALUE_CHARACTERS:
        return False
    return _CONTROL.search(value) is None and len(value.splitlines()) <= 1

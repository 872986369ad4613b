"""The prompt format of a chat model, as its own chat template writes it."""

from __future__ import annotations

import re

from ...convert.model import QuantizedModel
from ...errors import CalibrationError, printable
from ...measure.text.chat_template import ChatTemplate, RefusedChatError

__all__ = ["prompt_format", "prompt_sections"]

_TURNS = ({"role": "system", "content": "{system_prompt}"}, {"role": "user", "content": "{prompt}"})

_DATE = "{% macro strftime_now(format) %}{date}{% endmacro +%}"
"""Goes before a template: takes the place of what Transformers gives to templates that write today's date."""

_MOST_CHARACTERS = 4000
"""Longer ones are rules for tools and the like, which help no reader of a card."""


def prompt_format(model: QuantizedModel) -> str:
    """Return the text that a chat model continues, with ``{system_prompt}``, ``{prompt}`` and ``{date}`` to fill in.

    Returns:
        Lines that a terminal or a page only shows; empty if the model has no template, or one that fails, leaves the
        prompt out, or makes more than 4000 characters of it.
    """
    template = model.chat_template()
    if template is None:
        return ""
    template.source = _DATE + template.source
    with template:
        text = _rendered(template)
    if _TURNS[1]["content"] not in text or len(text) > _MOST_CHARACTERS:
        return ""
    return "\n".join(printable(line, _MOST_CHARACTERS) for line in text.split("\n"))


def prompt_sections(prompt: str) -> list[str]:
    """Return the section of a card as Markdown: the prompt format, fenced so that nothing in it ends the fence."""
    if not prompt:
        return []
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", prompt)), default=0))
    return ["## Prompt format", f"{fence}text\n{prompt}\n{fence}"]


def _rendered(template: ChatTemplate) -> str:
    for turns in (_TURNS, _TURNS[1:]):  # some refuse a system prompt
        try:
            return template.render(turns, "prompt format", add_generation_prompt=True)
        except RefusedChatError:
            continue
        except CalibrationError:
            break
    return ""

"""Chats for a model to answer: what people ask of chat models, in many languages, rendered with its own template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...errors import CalibrationError
from .chat_template import ChatTemplate, RefusedChatError
from .tokenizer import Tokenizer, chat_template, leading_ids

__all__ = ["Prompt", "chat_prompts", "seed_chats"]

_SEEDS = Path(__file__).with_name("chats.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A chat up to where the model goes on.

    Attributes:
        kind: What it is about, and its language, as ``code, de``.
        ids: Its tokens, those of the template included, without the BOS that rows begin with.
    """

    kind: str
    ids: tuple[int, ...]


@cache
def seed_chats() -> tuple[Mapping[str, Any], ...]:
    """Return the chats, each with ``kind``, ``language``, ``messages`` and perhaps ``tools``, as OpenAI has them."""
    return tuple(map(json.loads, _SEEDS.read_text(encoding="utf-8").splitlines()))


def chat_prompts(tokenizer: Tokenizer, *, seed: int) -> list[Prompt]:
    """Render all chats that a model's template takes, in a random order.

    Every second one asks for thinking where the template lets one choose. Chats with tools are left out where the
    template does not mention tools, and so is whatever it refuses.

    Args:
        tokenizer: The model's, with a chat template.
        seed: Of the order.

    Raises:
        CalibrationError: There is no chat template, it is not valid, or it takes none of the chats.
    """
    order = torch.randperm(len(seed_chats()), generator=torch.Generator().manual_seed(seed)).tolist()
    with chat_template(tokenizer) as template:
        prompts = list(_rendered(tokenizer, template, [seed_chats()[number] for number in order]))
    if not prompts:
        raise CalibrationError(
            "self-calibration: the chat template takes none of the chats. Got refusals. Expected a template for user "
            "and assistant. Repair it, or name a text for --calibration."
        )
    return prompts


def _rendered(tokenizer: Tokenizer, template: ChatTemplate, chats: list[Mapping[str, Any]]) -> Iterator[Prompt]:
    bos = leading_ids(tokenizer)
    for number, chat in enumerate(chats):
        seen: dict[str, Any] = {}
        if "tools" in chat:
            if "tools" not in template.source:
                continue
            seen["tools"] = chat["tools"]
        if "enable_thinking" in template.source:
            seen["enable_thinking"] = bool(number % 2)
        try:
            text = template.render(chat["messages"], "self-calibration", add_generation_prompt=True, **seen)
        except RefusedChatError:
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        begin = len(bos) if ids[: len(bos)] == bos else 0
        yield Prompt(kind=f"{chat['kind']}, {chat['language']}", ids=tuple(ids[begin:]))

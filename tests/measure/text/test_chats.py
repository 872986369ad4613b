"""The chats that a model answers for its own calibration, and how templates take them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bpwise.errors import CalibrationError
from bpwise.measure.text.chats import chat_prompts, seed_chats

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Letters:
    """A tokenizer of single characters with a chat template, and no BOS."""

    bos_token_id = eos_token_id = None
    special_tokens_map: dict[str, Any] = {}  # noqa: RUF012 - as tokenizers have it

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}


def texts(template: str, seed: int = 0) -> list[str]:
    return ["".join(map(chr, prompt.ids)) for prompt in chat_prompts(Letters(template), seed=seed)]  # type: ignore[arg-type]


def test_seeds_are_many_and_of_many_kinds() -> None:
    chats = seed_chats()
    assert len(chats) == 200
    assert len({chat["language"] for chat in chats}) >= 20
    kinds = Counter(chat["kind"] for chat in chats)
    assert set(kinds) == {
        *("chat", "code", "maths", "extraction", "summary", "roleplay", "writing", "tools", "translation")
    }
    for chat in chats:
        assert chat["messages"][-1]["role"] in ("user", "tool")
        assert ("tools" in chat) == (chat["kind"] == "tools")
    asked = [str(chat["messages"]) for chat in chats]
    assert len(set(asked)) == len(asked)


def test_prompts_end_where_the_model_goes_on() -> None:
    rendered = texts(PLAIN)
    plain = [chat for chat in seed_chats() if "tools" not in chat]
    assert len(rendered) == len(plain)  # the template does not mention tools
    assert all(text.endswith("<assistant>") for text in rendered)
    assert sorted(rendered) == sorted(
        "".join(f"<{turn['role']}>{turn['content']}" for turn in chat["messages"]) + "<assistant>" for chat in plain
    )
    assert rendered != texts(PLAIN, seed=1)
    assert rendered == texts(PLAIN)


def test_tools_and_thinking_where_the_template_has_them() -> None:
    template = (
        "{{ enable_thinking }}{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}" + PLAIN
    )
    rendered = texts(template)
    assert len(rendered) == len(seed_chats())
    named = [chat["tools"][0]["function"]["name"] for chat in seed_chats() if "tools" in chat]
    for name in named:
        assert any(f"[{name}]" in text for text in rendered)
    assert {text.split("[")[0].split("<")[0] for text in rendered} == {"True", "False"}


def test_what_a_template_refuses_is_left_out() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    without = [chat for chat in seed_chats() if "tools" not in chat and chat["messages"][0]["role"] != "system"]
    assert len(texts(refusing)) == len(without)
    with pytest.raises(CalibrationError, match="takes none of the chats"):
        texts("{{ raise_exception('never') }}")

"""Which tokens of chats count, against the mask that Transformers itself makes."""

import json
from typing import Any

import pytest
from bpwise.eval.domains.masks import MarkedText, answers_mask, marked_chat, masked_tokens
from bpwise.measure.text.chat_template import ChatTemplate
from transformers import PreTrainedTokenizerFast

MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As templates of reasoning models do it: an empty thought is asked for, and dropped from all answers but the last.
DROPPING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
TURNS = [
    {"role": role, "content": text}
    for role, text in (("user", "Hi?"), ("assistant", "Hé!"), ("user", "And?"), ("assistant", "Bye."))
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}
TOOL_TURNS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "{}"},
    {"role": "assistant", "content": "No."},
]


def marked(template: str | None, chat: dict[str, Any]) -> tuple[str, list[str]]:
    """The text of a chat, and what of it counts."""
    if template is None:
        found = marked_chat(None, chat, "w")
    else:
        with ChatTemplate(template, {"bos_token": "<bos>", "eos_token": "<eos>"}) as opened:
            found = marked_chat(opened, chat, "w")
    assert found is not None
    return found.text, [found.text[first:end] for first, end in found.spans]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked-by-the-template", "by-the-turns-before"])
def test_the_mask_is_that_of_transformers(byte_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    expected = byte_tokenizer.apply_chat_template(
        TURNS, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    with ChatTemplate(template, {"bos_token": "<bos>", "eos_token": "<eos>"}) as opened:
        found = marked_chat(opened, {"messages": TURNS}, "w")
        assert ("generation" in answers_mask(opened, tools=False)) is opened.marks_answers
    assert found is not None
    tokens = masked_tokens(byte_tokenizer, found, 1000)
    assert list(tokens.ids) == expected["input_ids"]
    assert list(map(int, tokens.counted)) == expected["assistant_masks"]
    cut = masked_tokens(byte_tokenizer, found, 12)
    assert (cut.ids, cut.counted) == (tokens.ids[:12], tokens.counted[:12])


def test_answers_that_are_written_otherwise_later_do_not_count() -> None:
    assert marked(DROPPING, {"messages": TURNS})[1] == ["</think>Bye."]


def test_without_a_template() -> None:
    text, spans = marked(None, {"messages": TURNS})
    assert text == "User: Hi?\n\nAssistant: Hé!\n\nUser: And?\n\nAssistant: Bye.\n\n"
    assert spans == ["Hé!", "Bye."]


@pytest.mark.parametrize("template", [None, UNMARKED], ids=["no-template", "no-place-for-tools"])
def test_calls_as_text(template: str | None) -> None:
    text, spans = marked(template, {"messages": TOOL_TURNS, "tools": [WEATHER]})
    assert json.dumps(WEATHER) in text
    assert "<tool_response>\n{}\n</tool_response>" in text
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
    end = "" if template is None else "<eos>"
    assert spans == [f"{call}{end}", f"No.{end}"]


def test_calls_as_the_template_writes_them() -> None:
    template = UNMARKED.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}")
    _, spans = marked("{{ tools | length }}" + template, {"messages": TOOL_TURNS, "tools": [WEATHER]})
    assert [json.loads(spans[0].removesuffix("<eos>")), spans[1]] == [[CALL], "No.<eos>"]


def test_a_chat_that_the_template_refuses_is_left_out() -> None:
    with ChatTemplate("{{ raise_exception('no') }}", {}) as opened:
        assert marked_chat(opened, {"messages": TURNS}, "w") is None
    assert marked_chat(None, {"messages": TURNS[:1]}, "w") is None


def test_a_token_that_reaches_into_an_answer_counts() -> None:
    class Pairs:
        """Two letters a token, whatever they are."""

        bos_token_id = None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [hash(text[n : n + 2]) for n in range(0, len(text), 2)]}

    tokens = masked_tokens(Pairs(), MarkedText("user: yes", ((5, 9),)), 100)  # type: ignore[arg-type]
    assert tokens.counted == (False, False, True, True, True)

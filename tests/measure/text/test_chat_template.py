import time
from collections.abc import Iterator
from typing import Any

import pytest
from bpwise.errors import CalibrationError
from bpwise.measure.text.chat_template import ChatTemplate, RefusedChatError
from bpwise.measure.text.tokenizer import chat_template
from transformers import PreTrainedTokenizerFast

# Sizes are products with something that is not constant, as Jinja computes constants while it reads a template.
TEMPLATE = """
{{- bos_token }}{% set state = namespace(turns=0) %}
{%- macro written(turn) %}<|{{ turn.role }}|>{{ turn['content'] | trim | default('nothing', true) }}{% endmacro %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('System role ' ~ m.content ~ ' not supported') }}{% endif %}
    {%- if m.content == 'skip' %}{% continue %}{% endif %}
    {%- if m.content == 'divide' %}{{ 1 / 0 }}{% endif %}
    {%- if m.content == 'range' %}{% for i in range(100000000) %}x{% endfor %}{% endif %}
    {%- if m.content == 'memory' %}{{ 'x' * (m.role | length * 200000000) }}{% endif %}
    {%- if m.content == 'long' %}{{ 'x' * (m.role | length * 5000000) }}{% endif %}
    {%- if m.content == 'recursion' %}{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}{% endif %}
    {%- if m.content == 'for ever' %}
        {%- for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- generation %}{{ written(m) }}{% endgeneration %}
    {%- if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}
    {{- eos_token }}
{% endfor %}
{{ state.turns }}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    made.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    return made


@pytest.fixture(scope="module")
def template(tokenizer: PreTrainedTokenizerFast) -> Iterator[ChatTemplate]:
    """One process for all tests: it takes a second to start."""
    with chat_template(tokenizer) as opened:
        yield opened


@pytest.mark.parametrize(
    "chat",
    [
        turns(" Hi ", "skip", "naïve 日本 \U0001f600 <b> \"quoted\" 'so' \\ \n end"),
        turns("half a pair: \ud83d"),
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"ä": [1, 2.5, None]}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "part"}]}],
    ],
    ids=["text", "surrogate", "tool-call", "parts"],
)
def test_gives_what_transformers_gives(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, chat: list[dict[str, Any]]
) -> None:
    assert template.render(chat, "w") == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("flags", [{"add_generation_prompt": True}, {"continue_final_message": True}], ids=str)
def test_prompts_and_continuations(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, flags: dict[str, bool]
) -> None:
    chat = turns("Question", "Begun")
    assert template.render(chat, "w", **flags) == tokenizer.apply_chat_template(chat, tokenize=False, **flags)


def test_objects_that_are_no_json_are_placeholders(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> None:
    chat = turns([{"type": "image", "image": object()}])
    assert template.render(chat, "w") == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("divide", r"f: line 3: the chat template fails .*ZeroDivisionError"),
        ("range", r"f: line 3: the chat template fails .*OverflowError.*range"),
        ("recursion", r"f: line 3: the chat template fails .*RecursionError"),
    ],
)
def test_failing_templates(template: ChatTemplate, content: str, message: str) -> None:
    with pytest.raises(RefusedChatError, match=message):
        template.render(turns(content), "f: line 3")
    assert template.render(turns("again"), "w").startswith("<bos>")  # the process goes on


def test_a_template_that_raises(template: ChatTemplate) -> None:
    with pytest.raises(RefusedChatError, match=r"f: line 3: .*refuses the chat \(System role x y € not supported\)"):
        template.render([{"role": "system", "content": "x\ny €"}], "f: line 3")


def test_a_text_out_of_proportion(template: ChatTemplate) -> None:
    with pytest.raises(CalibrationError, match=r"f: .*makes 200000\d\d characters"):
        template.render(turns("long"), "f")


@pytest.mark.skipif("sys.platform != 'linux'", reason="only Linux limits it")
def test_too_much_memory(template: ChatTemplate) -> None:
    with pytest.raises(CalibrationError, match=r"f: the chat template takes more than 512 MiB"):
        template.render(turns("memory"), "f")


def test_an_endless_template(template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpwise.measure.text.chat_template._WAIT_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(CalibrationError, match=r"f: the chat template takes more than 2 s"):
        template.render(turns("for ever"), "f")
    assert time.monotonic() - start < 30
    monkeypatch.undo()
    assert template.render(turns("again"), "w").startswith("<bos>")  # in a new process


def test_a_template_that_cannot_be_read() -> None:
    with ChatTemplate("{% for m in messages %}", {}) as opened:
        with pytest.raises(CalibrationError, match=r"^f: the chat template is not valid .*endfor"):
            opened.render(turns("x"), "f")
        assert opened._process is None


def test_thousands_of_chats_are_fast(template: ChatTemplate) -> None:
    chat = turns("question " * 100, "answer " * 100)
    template.render(chat, "w")
    start = time.monotonic()
    for _ in range(500):
        template.render(chat, "w")
    # 0.2 ms each on an idle machine; a process for each chat would take 500 s.
    assert time.monotonic() - start < 20


def test_closing_ends_the_process(tokenizer: PreTrainedTokenizerFast) -> None:
    opened = chat_template(tokenizer)
    opened.close()  # nothing runs yet
    opened.render(turns("x"), "w")
    process = opened._process
    assert process is not None
    assert process.poll() is None
    opened.close()
    assert process.poll() is not None


@pytest.mark.parametrize("value", [None, "", {}, {"tool_use": "x"}, 5], ids=str)
def test_no_template(byte_tokenizer: PreTrainedTokenizerFast, value: object) -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    made.chat_template = value
    with pytest.raises(CalibrationError, match="has no chat template"):
        chat_template(made)

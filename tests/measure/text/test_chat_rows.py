import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import pytest
from bpwise.errors import CalibrationError
from bpwise.measure.text.chat_rows import chat_turns, render_turns
from bpwise.measure.text.chat_template import RefusedChatError

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
KNOWN_ROLES = """
{%- for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
LISTS_ONLY = """
{%- for m in messages %}<{{ m.role }}>{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}[image]{% endif %}{% endfor %}{% endfor %}"""
OBSERVES = """
{%- for m in messages %}{% if m.role == 'observation' %}<seen>{{ m.content }}
{%- elif m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
FUNCTIONS = """
{%- for m in messages %}{% if m.role == 'tool' %}<{{ 'function' | length }}>{{ m.content }}{% endif %}{% endfor %}"""
AS_JSON = """
{%- for m in messages %}<{{ m.role }}>{{ (m.tool_calls if m.tool_calls else m.content) | tojson }}{% endfor %}"""
NO_THOUGHTS = """
{%- for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"""

HI, HELLO = "Hi there, fox.", "Hello yourself."
ASKED = f"<user>{HI}<assistant>{HELLO}"


class Template:
    """Jinja itself, in this process."""

    def __init__(self, source: str) -> None:
        self.source = source
        environment = jinja2.Environment()
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(source)

    def render(self, turns: Sequence[Mapping[str, Any]], where: str) -> str:
        try:
            return self._template.render(messages=turns)
        except jinja2.TemplateError as error:
            raise RefusedChatError(f"{where}: {error}") from error


def rendered(row: dict[str, Any], template: str = PLAIN, column: str | None = None) -> str:
    turns = chat_turns(row, column)
    assert turns is not None
    return render_turns(Template(template), turns, "f: line 7")  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [PLAIN, KNOWN_ROLES, LISTS_ONLY, OBSERVES])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": HI}, {"role": "assistant", "content": HELLO}]},
        {"conversations": [{"from": "human", "value": HI}, {"from": "gpt", "value": HELLO}]},
        {"conversations": [{"from": "Human", "value": HI}, {"from": "GPT", "value": HELLO}]},
        {"conversations": [{"role": "user", "value": HI}, {"role": "assistant", "value": HELLO}]},
        {"conversations": [{"role": "human", "content": HI}, {"role": "gpt", "content": HELLO}]},
        {"conversation": [{"speaker": "human", "text": HI}, {"speaker": "bot", "text": HELLO}]},
        {"messages": [{"role": "user", "content": HI}, {"role": "model", "content": HELLO}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HI}]}, {"role": "gpt", "value": [HELLO]}]},
        {"conversations": {"from": ["human", "gpt"], "value": [HI, HELLO]}},
        {"messages": json.dumps([{"role": "user", "content": HI}, {"role": "assistant", "content": HELLO}])},
        {"prompt": [{"role": "user", "content": HI}], "completion": [{"role": "assistant", "content": HELLO}]},
        {"prompt": HI, "completion": HELLO, "text": "not this"},
        {"instruction": HI, "input": "", "output": HELLO, "text": "not this"},
        {"messages": [{"from": None, "role": "user", "content": HI}, {"role": "assistant", "content": HELLO}]},
    ],
    ids=lambda row: json.dumps(row)[:60],
)
def test_shapes_in_use(row: dict[str, Any], template: str) -> None:
    assert rendered(row, template) == ASKED


def test_a_named_column_and_a_system_column() -> None:
    row = {"text": "no", "system": "Be kind.", "talk": [{"from": "human", "value": HI}]}
    assert rendered(row, column="talk") == f"<system>Be kind.<user>{HI}"
    row["talk"].insert(0, {"from": "system", "value": "Be short."})
    assert rendered(row, column="talk") == f"<system>Be short.<user>{HI}"


def test_the_input_of_an_instruction() -> None:
    assert rendered({"instruction": "Translate.", "input": "cat", "output": "Katze"}) == (
        "<user>Translate.\ncat<assistant>Katze"
    )


@pytest.mark.parametrize("value", [None, [], "plain text", "[1] cited", "[" * 5000, [1], 3], ids=lambda v: str(v)[:12])
def test_no_chat(value: object) -> None:
    assert chat_turns({"messages": value}, None) is None
    assert chat_turns({"text": "x"}, None) is None


TOOL_TALK = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather"}'},
    {"from": "observation", "value": "sunny"},
    {"from": "gpt", "value": "Sunny."},
]


def test_tools_by_the_names_of_the_template() -> None:
    call = '<user>Weather?<assistant>{"name": "weather"}'
    assert rendered({"conversations": TOOL_TALK}) == f"{call}<tool>sunny<assistant>Sunny."
    assert rendered({"conversations": TOOL_TALK}, OBSERVES) == f"{call}<seen>sunny<assistant>Sunny."


def test_a_name_that_the_template_holds_for_another_reason() -> None:
    assert rendered({"messages": [{"role": "function", "content": "sunny"}]}, FUNCTIONS) == "<8>sunny"


def test_tool_calls_without_content() -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Köln"}}}]
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": HI}]}
    assert json.dumps(calls, ensure_ascii=False) in rendered(row, AS_JSON)
    with pytest.raises(CalibrationError, match=r"line 7, turn 1: the chat template leaves out 'weather'"):
        rendered(row)


def test_text_that_the_template_escapes() -> None:
    assert rendered({"messages": [{"role": "tool", "content": 'a "b"\nc'}]}, AS_JSON) == '<tool>"a \\"b\\"\\nc"'


@pytest.mark.parametrize("answer", ["42", "A long answer, after which nothing comes, on one line."])
def test_thoughts_may_be_left_out(answer: str) -> None:
    turn = {"role": "assistant", "content": f"<think>\nFirst.\nSecond.</think>\n\n{answer}\n"}
    assert rendered({"messages": [turn]}, NO_THOUGHTS) == f"<assistant>{answer}"


def test_images_between_text_only_for_templates_that_know_them() -> None:
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": HI}]}]}
    assert rendered(row, LISTS_ONLY) == f"<user>[image]{HI}"
    with pytest.raises(CalibrationError, match=r"line 7, turn 1: .* as Python shows it\. Got a list\."):
        rendered(row)


def test_a_result_that_is_an_object() -> None:
    row = {"messages": [{"role": "tool", "content": {"sky": ["blue"]}}]}
    assert rendered(row, AS_JSON) == '<tool>{"sky": ["blue"]}'
    with pytest.raises(CalibrationError, match="Got a dict"):
        rendered(row)


@pytest.mark.parametrize("turns", [[{"role": "user", "content": " "}], [{"from": "human", "value": None}]], ids=str)
def test_no_text_at_all(turns: list[dict[str, Any]]) -> None:
    assert rendered({"messages": turns}) == ""


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"speakr": "a", "utterance": "b"}], r"turn 1: no role or no text\. Got the keys 'speakr', 'utterance'\."),
        ([{"role": "user"}], r"turn 1: no role or no text\. Got the keys 'role'\."),
        ([{"role": 3, "content": "x"}], "turn 1: no role or no text"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], r"turn 2: .* wrong type\. Got int\."),
        (
            [{"from": "human", "value": "Once"}, {"from": "narrator", "value": "upon a time, in a land far far away"}],
            r"turn 2: the chat template leaves out 'upon a time, in a land far far a'\. Got the role 'narrator', with "
            r"the keys 'from', 'value'\.",
        ),
    ],
    ids=["keys", "no-text", "role", "type", "left-out"],
)
def test_refused(turns: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^f: line 7, {message}"):
        rendered({"conversations": turns}, KNOWN_ROLES)

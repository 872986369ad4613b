"""Models asked the same prompt, against Transformers' own loop without a cache."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bpwise.convert.opening import open_any
from bpwise.errors import CalibrationError, ConfigError
from bpwise.eval import answers
from bpwise.eval.agreement import thinking_tokens, thought_marks
from bpwise.eval.answers import Questions, ask, questions_of
from bpwise.eval.comparison import EvalConfig, evaluate_each
from bpwise.measure.text.sources import Document
from bpwise.measure.text.tokenizer import load_tokenizer
from transformers import AutoModelForCausalLM

from ..conftest import MakeModel

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"
DEVICE = torch.device("cpu")


def with_template(directory: Path, template: str = TEMPLATE) -> Path:
    (directory / "chat_template.jinja").write_text(template)
    return directory


def asked(directory: Path, prompt: str | None, *, many: bool = False) -> Questions | None:
    return questions_of(open_any(directory), load_tokenizer(directory), prompt, vocab_size=264, many=many)


def test_greedy_answers_are_those_of_transformers(make_model: MakeModel) -> None:
    directory = with_template(make_model("m"))
    questions = asked(directory, "Hi?")
    assert questions is not None
    (question,) = questions.asked
    ids = [256, *b"user: Hi?\nassistant:"]  # BOS, as the tokenizer adds it
    assert [token if token == 256 else ord(questions.tokenizer.decode([token])) for token in question.ids] == ids
    answers = ask(open_any(directory), questions, device=DEVICE, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen = list(question.ids)
    with torch.no_grad():
        while len(seen) < len(ids) + 80 and (len(seen) == len(ids) or seen[-1] != 257):
            seen.append(int(model(torch.tensor([seen])).logits[0, -1].argmax()))
    written = seen[len(ids) :]
    assert answers == (tuple(written[:-1] if written[-1] == 257 else written),)


def test_chat_models_are_asked_and_others_continue(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("m")
    assert asked(directory, None) is None
    given = asked(directory, "Once")
    assert given is not None
    assert given.asked[0].ids[0] == 256 and given.tokenizer.decode(list(given.asked[0].ids[1:])) == "Once"
    built_in = asked(with_template(directory), None)
    assert built_in is not None
    assert "sky" in built_in.prompt
    # A template that fails: only who has a prompt of his own hears of it.
    with_template(directory, "{{ raise_exception('no') }}")
    assert asked(directory, None) is None
    with pytest.raises(CalibrationError, match="chat template"):
        asked(directory, "Hi?")


def test_comparisons_have_both_answers(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = with_template(make_model("first")), make_model("second", noise=0.1)
    config = EvalConfig(rows=2, row_tokens=32, device="cpu", prompt="Hi?")
    (got,) = evaluate_each(first, [second], config)
    assert got.answers is not None
    questions = asked(first, "Hi?")
    assert questions is not None
    assert got.answers.prompt == "Hi?"
    for source, answer in ((first, got.answers.original), (second, got.answers.quantized)):
        answers_ids = ask(open_any(source), questions, device=DEVICE, dtype=torch.float32)
        assert answers_ids is not None
        assert questions.tokenizer.decode(list(answers_ids[0])).strip() == answer
    assert got.answers.agreement is None
    monkeypatch.setattr(answers, "free_memory", lambda _: 1000)
    (without,) = evaluate_each(first, [second], config)
    assert without.answers is None


def greedy(model: Any, prompt: Sequence[int], ends: Sequence[int], most: int) -> list[int]:
    """Transformers without a cache, one prompt at a time."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < most:
            written.append(int(model(torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
            if written[-1] in ends:
                return written[:-1]
    return written


def test_many_answers_are_compared_in_pairs(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_MOST_TOKENS", 6)
    asked_of = ("Hi?", "And what of it?", "Why?", "Say no more, please.", "A", "So?")
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "!"}]} for text in asked_of
    ]
    documents = [Document("chats", json.dumps(chat)) for chat in chats]
    monkeypatch.setattr(answers, "documents_of", lambda *_: ("", iter(documents)))
    first, second = with_template(make_model("first")), make_model("second", noise=0.05)
    config = EvalConfig(rows=2, row_tokens=32, device="cpu", answers=True)
    (got,) = evaluate_each(first, [second], config)
    assert got.answers is not None
    found = got.answers.agreement
    assert found is not None
    pairs, tokenizer = [], load_tokenizer(first)
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (first, second)]
    for text in asked_of:
        ids = tokenizer(f"user: {text}\nassistant:", add_special_tokens=False)["input_ids"]
        pairs.append([greedy(model, [256, *ids], [257], 6) for model in models])
    assert (found.prompts, found.most_tokens) == (len(pairs), 6) == (6, 6)
    assert found.same.value == pytest.approx(np.mean([before == after for before, after in pairs]))
    alike = [next((n for n in range(len(a)) if a[: n + 1] != b[: n + 1]), len(a)) for a, b in pairs]
    assert 0 < np.mean(alike) < 6
    assert found.shared_tokens.value == pytest.approx(np.mean(alike))
    assert found.length_change.value == pytest.approx(np.mean([len(b) - len(a) for a, b in pairs]))
    assert found.original_tokens.value == pytest.approx(np.mean([len(a) for a, _ in pairs]))
    assert found.original_ended == np.mean([len(a) < 6 for a, _ in pairs])
    assert found.same.interval is not None
    assert found.same.interval.low <= found.same.value <= found.same.interval.high
    assert found.original_thinking.value == 0


def test_base_models_answer_no_chats(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        asked(make_model("m"), "Hi?", many=True)


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("assistant:", "<think>ab</think>c", 17),
        ("assistant:", "plain <think>a</think>", 0),
        ("assistant:<think>\n", "ab</think>c", 10),
        ("assistant:<think>\n", "never ends", 10),
        ("assistant:", "  <think>never ends", 19),
    ],
    ids=["closed", "not-first", "begun-by-the-template", "unended", "begun-and-unended"],
)
def test_thoughts_are_counted(byte_tokenizer: Any, prompt: str, answer: str, expected: int) -> None:
    ids = [byte_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    assert thinking_tokens(*ids, ("<think>", "</think>"), byte_tokenizer) == expected


def test_marks_of_thoughts_are_the_templates_own() -> None:
    assert thought_marks("{{ '[THINK]' }}") == ("[THINK]", "[/THINK]")
    assert thought_marks(TEMPLATE) is None

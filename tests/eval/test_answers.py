"""Models asked the same prompt, against Transformers' own loop without a cache."""

from pathlib import Path

import pytest
import torch
from bpwise.convert.opening import open_any
from bpwise.errors import CalibrationError
from bpwise.eval import answers
from bpwise.eval.answers import Question, ask, question_of
from bpwise.eval.comparison import EvalConfig, evaluate_each
from bpwise.measure.text.tokenizer import load_tokenizer
from transformers import AutoModelForCausalLM

from ..conftest import MakeModel

TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"
DEVICE = torch.device("cpu")


def with_template(directory: Path, template: str = TEMPLATE) -> Path:
    (directory / "chat_template.jinja").write_text(template)
    return directory


def asked(directory: Path, prompt: str | None) -> Question | None:
    return question_of(open_any(directory), load_tokenizer(directory), prompt, vocab_size=264)


def test_greedy_answers_are_those_of_transformers(make_model: MakeModel) -> None:
    directory = with_template(make_model("m"))
    question = asked(directory, "Hi?")
    assert question is not None
    ids = [256, *b"user: Hi?\nassistant:"]  # BOS, as the tokenizer adds it
    assert [token if token == 256 else ord(question.tokenizer.decode([token])) for token in question.ids] == ids
    answer = ask(open_any(directory), question, device=DEVICE, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    seen = list(question.ids)
    with torch.no_grad():
        while len(seen) < len(ids) + 80 and (len(seen) == len(ids) or seen[-1] != 257):
            seen.append(int(model(torch.tensor([seen])).logits[0, -1].argmax()))
    written = seen[len(ids) :]
    assert answer == question.tokenizer.decode(written[:-1] if written[-1] == 257 else written).strip()


def test_chat_models_are_asked_and_others_continue(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("m")
    assert asked(directory, None) is None
    given = asked(directory, "Once")
    assert given is not None
    assert given.ids[0] == 256 and given.tokenizer.decode(list(given.ids[1:])) == "Once"
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
    question = asked(first, "Hi?")
    assert question is not None
    assert got.answers.prompt == "Hi?"
    for source, answer in ((first, got.answers.original), (second, got.answers.quantized)):
        assert ask(open_any(source), question, device=DEVICE, dtype=torch.float32) == answer
    monkeypatch.setattr(answers, "free_memory", lambda _: 1000)
    (without,) = evaluate_each(first, [second], config)
    assert without.answers is None

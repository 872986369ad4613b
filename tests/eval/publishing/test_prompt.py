"""The prompt format in cards: as Transformers renders it, and left out where a template fails."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bpwise.convert.model import QuantizedModel
from bpwise.convert.registry import format_named
from bpwise.eval.publishing.prompt import prompt_format, prompt_sections
from bpwise.measure.text.chat_template import ChatTemplate
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
)
CHATML_SHOWN = (
    "<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


def model_of(source: str) -> Any:
    return SimpleNamespace(chat_template=lambda: ChatTemplate(source, {}))


def model_in(directory: Path) -> Any:
    return SimpleNamespace(chat_template=lambda: QuantizedModel.chat_template(SimpleNamespace(directory=directory)))  # type: ignore[arg-type]


def test_of_a_directory(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    assert prompt_format(model_in(tmp_path)) == ""
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert prompt_format(model_in(tmp_path)) == CHATML_SHOWN
    (tmp_path / "chat_template.jinja").write_text(NO_SYSTEM)
    user = [{"role": "user", "content": "{prompt}"}]
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(user, tokenize=False)
    assert prompt_format(model_in(tmp_path)) == expected == "<bos>[user] {prompt}<eos>"
    (tmp_path / "tokenizer.json").write_text("{")
    assert prompt_format(model_in(tmp_path)) == ""


def test_of_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install '.[gguf]'")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test")
    writer.add_chat_template(NO_SYSTEM)
    writer.add_token_list(["<a>", "<s>", "</s>"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(7)  # none of its tokens
    writer.add_tensor("a.weight", np.ones((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert prompt_format(format_named("gguf").open(tmp_path / "m.gguf")) == "<s>[user] {prompt}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.missing.more }}",
        "{% for a in range(99999999) %}{% for b in range(99999999) %}{% endfor %}{% endfor %}",
        "{{ messages[-1].content * 1000 }}",
        "{{ 'no prompt in it' }}",
    ],
    ids=["damaged", "refuses", "fails", "for-ever", "long", "without"],
)
def test_templates_that_help_nobody_are_left_out(source: str) -> None:
    assert prompt_format(model_of(source)) == ""


def test_nothing_ends_the_fence() -> None:
    template = r"{{ '````\n<img src=x>\r\u202e\ud800 ```` [x](javascript:y)\n{prompt}' }}"
    heading, block = prompt_sections(prompt_format(model_of(template)))
    assert heading == "## Prompt format"
    assert block.split("\n") == [
        "`````text",
        "````",
        r"<img src=x>\r\u202e\ud800 ```` [x](javascript:y)",
        "{prompt}",
        "`````",
    ]
    assert prompt_sections("") == []


def test_a_template_that_writes_the_date_shows_where() -> None:
    # As Llama 3.2's does.
    source = (
        "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}"
        "{% else %}{% set today = '26 Jul 2024' %}{% endif %}Today Date: {{ today }}\n{{ messages[-1].content }}"
    )
    assert prompt_format(model_of(source)) == "Today Date: {date}\n{prompt}"

"""llama.cpp's programs: its converter, made to take small vocabularies, and llama-quantize, where it was built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bpwise.convert.gguf.llama_cpp.converter import find_converter
from bpwise.errors import BpwiseError

LLAMA_QUANTIZE = Path(__file__).parents[2] / "build" / "llama.cpp" / "bin" / "llama-quantize"

_UNKNOWN = 'raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")'


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the converter that takes vocabularies of no released model."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs sentencepiece")
    try:
        source = find_converter().parent
    except BpwiseError as cause:
        pytest.skip(str(cause))
    copy = tmp_path_factory.mktemp("converter") / "llama.cpp"
    shutil.copytree(source, copy)
    base = copy / "conversion" / "base.py"
    text = base.read_text(encoding="utf-8")
    assert text.count(_UNKNOWN) == 1
    base.write_text(text.replace(_UNKNOWN, 'res = "gpt-2"'), encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def llama_quantize() -> Path | None:
    """The program that `make test-families` builds; None where it was not built."""
    return LLAMA_QUANTIZE if LLAMA_QUANTIZE.exists() else None

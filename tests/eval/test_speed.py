"""Tokens per second of a file, where llama.cpp is there and runs it."""

from pathlib import Path
from typing import Any

import pytest
from bpwise.convert.opening import open_any
from bpwise.errors import ConfigError
from bpwise.eval import speed
from bpwise.eval.speed import tokens_per_second


@pytest.mark.usefixtures("timed")
def test_files_have_one_where_the_engine_is(converted: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="the engine is not installed: pip install '.[engine]'")
    file = open_any(converted["llama"].file)
    found = tokens_per_second(file)
    assert found is not None
    assert found > 0
    assert tokens_per_second(open_any(tiny_model)) is None

    def missing(_: object) -> None:
        raise ConfigError("not installed")

    monkeypatch.setattr(speed, "load_library", missing)
    assert tokens_per_second(file) is None

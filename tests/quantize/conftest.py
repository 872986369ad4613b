"""What tests of whole runs share."""

import pytest


@pytest.fixture(autouse=True)
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No comparison of every base with llama.cpp, which has tests of its own and takes seconds."""
    monkeypatch.setattr("bpwise.convert.gguf.engine.gate._library", lambda: None)

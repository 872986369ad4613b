"""The two exact models, once for all tests."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from .models import TEXT, save_exact_model


@dataclass(frozen=True)
class Pair:
    """Directories of the original and of what stands for a quantized model, and a file with the text."""

    original: Path
    quantized: Path
    text: Path


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("exact")
    text = folder / "wiki.test.raw"
    text.write_text(TEXT, encoding="utf-8")
    return Pair(save_exact_model(folder / "original"), save_exact_model(folder / "quantized", quantized=True), text)

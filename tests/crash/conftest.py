"""What the crash tests share: one model, one disk, and runs that cost as little as they can."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from bpwise.checkpoint.files import digests, partials
from bpwise.convert.gguf.engine import gate
from bpwise.convert.gguf.llama_cpp import converter
from transformers import LlamaConfig

from ..byte_converter import convert_with_bytes
from ..conftest import SaveModel
from ..mlx_stand_in import play_mlx_lm
from .commands import Stage


@pytest.fixture(scope="session")
def stage(save_model: SaveModel, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    root = tmp_path_factory.mktemp("crash")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = save_model(root / "llama", kind=LlamaConfig, num_hidden_layers=1, **sizes)
    return Stage(root, model)


@pytest.fixture(scope="session")
def base(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What llama.cpp's converter makes of the model."""
    file = tmp_path_factory.mktemp("base") / "base.gguf"
    convert_with_bytes([(stage.model, file)], "--outtype", "f32")
    return file


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter's process copies what it made once; digests are remembered at once, on the disk."""

    def converted(_script: Path, _changes: Sequence[str], _options: Sequence[str], output: Path, *_: object) -> None:
        shutil.copyfile(request.getfixturevalue("base"), output)

    monkeypatch.setattr(converter, "_run", converted)
    play_mlx_lm(monkeypatch)
    monkeypatch.setattr(gate, "_library", lambda: None)
    monkeypatch.setattr(partials, "_ABANDONED_SECONDS", -1.0)
    monkeypatch.setattr(digests, "_SETTLED_NANOSECONDS", -(10**18))
    monkeypatch.setenv("XDG_CACHE_HOME", str(stage.disk / "cache"))

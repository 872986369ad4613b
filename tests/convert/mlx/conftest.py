"""mlx-lm's part played by the test: every tensor as the original has it, modules as they are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bpwise.convert.mlx.mlx_lm import loading
from safetensors.torch import load_file, save_file

MakeTensors = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[MakeTensors], None]:
    """Have tensors changed as mlx-lm might; every matrix called ``weight`` can be quantized, but routers' cannot."""

    def play(change: MakeTensors) -> None:
        def run(_: Any, staged: Path, converted: Path) -> tuple[str, ...]:
            tensors: dict[str, Any] = {}
            for path in sorted(staged.glob("model*.safetensors")):
                tensors |= load_file(path)
            if json.loads((staged / "config.json").read_text())["tie_word_embeddings"]:
                tensors.pop("lm_head.weight", None)
            converted.mkdir()
            changed = {name: tensor.contiguous() for name, tensor in change(tensors).items()}
            save_file(changed, converted / "model.safetensors", {"format": "mlx"})
            matrices = (name for name in changed if name.endswith(".weight") and changed[name].ndim > 1)
            return tuple(sorted(name.removesuffix(".weight") for name in matrices if ".gate." not in name))

        monkeypatch.setattr(loading, "_run", run)
        monkeypatch.setattr(loading, "_versions", lambda: ["0.32.2", "0.32.4"])

    play(lambda tensors: tensors)
    return play

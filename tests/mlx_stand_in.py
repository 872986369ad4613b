"""mlx-lm's part played by the tests: every tensor as the original has it, modules as they are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bpwise.convert.mlx.mlx_lm import loading
from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, Any]], dict[str, Any]]


def play_mlx_lm(patch: pytest.MonkeyPatch, change: Change = lambda tensors: tensors) -> None:
    """Have MLX's models loaded without mlx-lm.

    Args:
        patch: Undoes it.
        change: Changes tensors as mlx-lm might. Every matrix ``weight`` can be quantized then, but those of routers.
    """

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

    patch.setattr(loading, "_run", run)
    patch.setattr(loading, "_versions", lambda: ["0.32.2", "0.32.4"])

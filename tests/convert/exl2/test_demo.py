"""The demo's output, every weight of it, read by the naive decoder: minutes of plain Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bpwise.convert.exl2.file.reader import Exl2Model
from safetensors.torch import load_file

DEMO = Path(__file__).parents[3] / "models" / "demo" / "SmolLM2-135M-8.0bpw-8hb-exl2"


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO / "output.safetensors").exists(), reason="needs the output of `make demo`")
def test_naive_decoder_agrees_on_every_tensor(naive_decode: Callable[..., Any]) -> None:
    tensors = load_file(DEMO / "output.safetensors")
    model = Exl2Model.open(DEMO)
    assert len(model.linears) == 30 * 7 + 1
    for name in model.linears:
        _, weight = naive_decode(name, tensors)
        decoded = model.tensor(f"{name}.weight")
        assert torch.equal(decoded, torch.from_numpy(weight[: decoded.shape[0]])), name

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner


@pytest.fixture
def coherence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("coherence")


def test_damages_are_what_random_errors_do(coherence: ModuleType) -> None:
    rng = torch.Generator().manual_seed(0)
    x, g = torch.randn(5, 4, generator=rng).double(), torch.randn(5, 3, generator=rng).double()
    mixing = torch.randn(4, 4, generator=rng).double()
    alone, together = coherence.tokens_alone_and_together(x, g, mixing)
    # Errors dW = M^T e, one entry of e at a time: white noise does the sum of their damages.
    units = [torch.eye(12, dtype=torch.float64)[unit].view(4, 3) for unit in range(12)]
    damages = [[(x[t] @ mixing.T @ unit * g[t]).sum() for t in range(5)] for unit in units]
    assert alone == pytest.approx(float(sum(each**2 for tokens in damages for each in tokens)))
    assert together == pytest.approx(float(sum(sum(tokens) ** 2 for tokens in damages)))


def test_feedback_leaves_errors_that_the_gram_matrix_sees_as_white(coherence: ModuleType) -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double() * torch.arange(1, 7)
    torch.set_default_dtype(torch.float64)
    try:
        factor = coherence.feedback_factor(x.T @ x, 0.0)
    finally:
        torch.set_default_dtype(torch.float32)
    seen = factor @ x.T @ x @ factor.T
    assert torch.allclose(seen, torch.diag(seen.diagonal()), atol=1e-8)
    assert torch.allclose(factor.diagonal(), torch.ones(6, dtype=torch.float64))


def test_command(coherence: ModuleType, make_model: Any, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("Some words, and more of them. " * 60)
    run = CliRunner().invoke(
        coherence.main, [str(make_model("m")), "--text", str(text), "--rows", "3", "--row-tokens", "32"]
    )
    assert run.exit_code == 0, run.output
    kinds = [line.split(" | ")[0] for line in run.stdout.splitlines()[2:]]
    assert kinds == [f"| {each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")]

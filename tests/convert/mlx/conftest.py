"""MLX without mlx-lm."""

import pytest

from ...mlx_stand_in import play_mlx_lm


@pytest.fixture(autouse=True)
def without_mlx_lm(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Have the tests play mlx-lm's part, but those that have it itself."""
    if request.node.get_closest_marker("readers") is None:
        play_mlx_lm(monkeypatch)

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from bpwise.measure.measurement import Measurement
from click.testing import CliRunner

from ..measured import EXL2, WIDTHS, bare_measurement, exl2_of


@pytest.fixture
def stability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("stability")


def measurement(first: float, second: float) -> Measurement:
    scales = {"a": first, "b": second, "lm_head": 1.0}
    damages = {name: np.tile(scale * 4.0 ** -np.array(WIDTHS), (4, 1)) for name, scale in scales.items()}
    orders = dict.fromkeys(scales, np.arange(128, dtype=np.int32))
    curves = {EXL2: exl2_of(damages, orders, 32)}
    return bare_measurement(dict.fromkeys(scales, (128, 64)), curves, provenance={"first": first})


def test_equal_measurements_agree(stability: ModuleType) -> None:
    found = stability.compare([measurement(1.0, 3.0), measurement(1.0, 3.0)], 4.5)
    assert found.excess == pytest.approx(0.0, abs=1e-9)
    assert found.size_difference == 0.0
    assert found.predicted_nats[0] == found.predicted_nats[1]


def test_damage_by_another_measurements_sizes(stability: ModuleType) -> None:
    # Overheads of so small a linear take 0.65 bpw, and one more bit for a group 0.125. So the groups have 4 bits on
    # average: 5 for the linear whose damage is 16 times the other's, and 3 for the other.
    one, other = measurement(16.0, 1.0), measurement(1.0, 16.0)
    found = stability.compare([one, other], 4.7)
    own = 4 * 16 * 4.0**-5 + 4 * 4.0**-3
    swapped = 4 * 16 * 4.0**-3 + 4 * 4.0**-5
    assert found.predicted_nats == pytest.approx((own, own))
    assert found.excess == pytest.approx(swapped / own - 1)
    assert found.size_difference == pytest.approx(2.0)


def test_command(stability: ModuleType, make_model: Any, tmp_path: Path) -> None:
    model = make_model("m")
    options = ["--rows", "2", "--row-tokens", "64", "--device", "cpu", "--work-dir", str(tmp_path / "work")]
    result = CliRunner().invoke(stability.main, [str(model), *options], catch_exceptions=False)
    assert result.exit_code == 0
    (line,) = re.findall(r"\| 2 \| .*", result.stdout)
    again = CliRunner().invoke(stability.main, [str(model), *options], catch_exceptions=False)
    assert line in again.stdout
    assert "measure" not in again.stderr  # measurements are read, not made again

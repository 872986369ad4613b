from __future__ import annotations

import torch
from bpwise.linalg.precision import in_float64


def test_values_are_kept() -> None:
    # Where there is no float64: tests/device.
    values = torch.tensor([0.1, 3.0], dtype=torch.float32)
    assert in_float64(values).dtype == torch.float64
    assert torch.equal(in_float64(values).float(), values)

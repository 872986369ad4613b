from __future__ import annotations

import torch
from bpwise.linalg.precision import in_float64
from torch._subclasses.fake_tensor import FakeTensorMode


def test_double_precision_where_there_is_none() -> None:
    with FakeTensorMode():  # tensors of devices that this machine may lack, without values
        assert in_float64(torch.ones(3, device="mps")).device.type == "cpu"
        assert in_float64(torch.ones(3, device="cuda")).device.type == "cuda"


def test_values_are_kept() -> None:
    values = torch.tensor([0.1, 3.0], dtype=torch.float32)
    assert in_float64(values).dtype == torch.float64
    assert torch.equal(in_float64(values).float(), values)

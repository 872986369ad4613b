"""The pretend device itself: what it refuses, what it counts, and that it holds wherever PyTorch runs."""

from __future__ import annotations

import threading

import pytest
import torch
from bpwise.errors import ConfigError
from bpwise.linalg.precision import in_float64
from bpwise.measure.device import resolve_device

from .pretend import NAME, counted, without_float64


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_options_take_its_name() -> None:
    assert resolve_device(NAME).type == NAME
    with pytest.raises(ConfigError, match="cannot be used here"):
        resolve_device("pretended")


def test_values_are_the_cpus(pretend: torch.device) -> None:
    values = random(40, 30)
    there = values.to(pretend)
    assert there.device == pretend
    assert torch.equal((there @ there.T).cpu(), values @ values.T)
    assert torch.equal(there[3:7].T.reshape(-1)[2:9].cpu(), values[3:7].T.reshape(-1)[2:9])
    assert torch.equal(torch.arange(5, device=pretend).cpu(), torch.arange(5))


def test_views_share_memory(pretend: torch.device) -> None:
    values = random(6, 4).to(pretend)
    values[2:4, 1:].mul_(0)
    values.T[0].fill_(1)
    expected = random(6, 4)
    expected[2:4, 1:], expected[:, 0] = 0, 1
    assert torch.equal(values.cpu(), expected)


def test_complex_views(pretend: torch.device) -> None:
    values = torch.view_as_complex(random(5, 3, 2))
    there = values.to(pretend)
    assert torch.equal(there.conj().clone().cpu(), values.conj())
    assert torch.equal((there.conj().imag * 2).cpu(), values.conj().imag * 2)
    weight, other = values.clone().requires_grad_(), values.to(pretend).requires_grad_()
    for each in (weight, other):
        torch.view_as_real(each * each.detach().flip(0)).square().sum().backward()
    assert weight.grad is not None
    assert other.grad is not None
    assert torch.equal(other.grad.cpu(), weight.grad)


@pytest.mark.parametrize("thread", [False, True], ids=["here", "in-a-thread"])
def test_gradients(thread: bool, pretend: torch.device) -> None:
    values = random(6, 4)
    found: list[torch.Tensor] = []

    def backward() -> None:
        weight = values.to(pretend).requires_grad_()
        moved = weight * 1
        moved[1:3, 2:].mul_(3)  # in place, in a view of what has a gradient
        with counted() as counts:
            (moved @ moved.T).sum().backward()
        assert counts.launches["aten::mm"] + counts.launches["aten::mm.out"] >= 2
        assert weight.grad is not None
        found.append(weight.grad)

    if thread:
        worker = threading.Thread(target=backward)
        worker.start()
        worker.join()
    else:
        backward()
    weight = values.clone().requires_grad_()
    moved = weight * 1
    moved[1:3, 2:].mul_(3)
    (moved @ moved.T).sum().backward()
    assert found[0].device == pretend
    assert torch.equal(found[0].cpu(), weight.grad)


@pytest.mark.parametrize("turn", [False, True], ids=["device-first", "cpu-first"])
def test_tensors_of_the_cpu_do_not_mix(turn: bool, pretend: torch.device) -> None:
    here, there = random(4, 4), random(4, 4).to(pretend)
    first, second = (here, there) if turn else (there, here)
    for mix in (torch.add, torch.matmul, torch.minimum):
        with pytest.raises(RuntimeError, match="same device"):
            mix(first, second)
    with pytest.raises(RuntimeError, match="same device"):
        there[torch.tensor([1, 2])]
    assert torch.equal((there + torch.tensor(2.0)).cpu(), here + 2)  # a number


def test_waits_are_counted(pretend: torch.device) -> None:
    values = random(8, 8).to(pretend)
    mask = values > 0
    with counted() as counts:
        for _ in range(3):
            values.mul_(2).add_(1)
        values[0], values[:, 2:].sum(), values @ values
    assert not counts.waits
    with counted() as counts:
        float(values.sum()), bool(mask.any()), values.tolist(), values.cpu(), random(2).to(pretend)
        mask.nonzero(), values[mask], values.masked_select(mask)
        values[mask] = 0
    assert counts.waits.total() == 9
    assert counts.waits["upload"] == 1


def test_work_is_counted(pretend: torch.device) -> None:
    left, right = random(8, 16).to(pretend), random(16, 4).to(pretend)
    with counted() as counts:
        product = left @ right
        del product
        torch.zeros(1000, device=pretend)
    assert counts.launches.total() == 2
    assert counts.flops == 2 * 8 * 16 * 4
    assert counts.written_bytes == 4 * (8 * 4 + 1000)
    assert counts.peak_bytes - counts.start_bytes == 4000
    with counted() as counts:
        pass
    assert counts.start_bytes <= counts.peak_bytes


def test_float64_can_be_missing(pretend: torch.device) -> None:
    values = random(3).to(pretend)
    assert values.double().device == in_float64(values).device == pretend
    with without_float64():
        with pytest.raises(TypeError, match="float64"):
            values.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, dtype=torch.float64, device=pretend)
        exact = in_float64(values)
    assert exact.device.type == "cpu"
    assert torch.equal(exact, random(3).double())

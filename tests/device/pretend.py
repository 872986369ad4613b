"""A pretend accelerator: it computes on the CPU, calls itself another device, and counts what a real one would pay for.

PyTorch keeps a place for devices of others (``PrivateUse1``). Its tensors lie here in memory of the CPU: DLPack hands a
CPU tensor over under the other device's name and back, without a copy. Every operator that PyTorch does not take apart
itself ends in ``_run``, which looks at its arguments, counts, and has the CPU compute. Kernels are found by the device
of tensors, not by a mode of the thread: so this holds in all threads and in backward passes.

As on a CUDA device tensors of the CPU do not mix with those of the device, numbers (tensors without dimensions) apart;
and what the host has to wait for is counted: values that it reads, sizes that hang on values, copies from and to
memory that is not pinned. Stricter than CUDA: indices must lie on the device too, as otherwise each use copies them.

The name is registered for the whole process by ``register``, which must come before any backward pass.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

__all__ = ["NAME", "Counts", "counted", "one_launch", "register", "without_float64"]

NAME = "pretend"

_DLPACK_CPU, _DLPACK_OTHER = 1, 12
_CPU = torch.device("cpu")
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

_WAITS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",  # unless it is told the size
    "aten::unique_consecutive",
    "aten::unique_dim",
}
"""Operators after which the host knows a value, or a size that hangs on values."""

_WHOLE = ("_stack", "_stack.out", "native_group_norm", "native_layer_norm", "silu_backward")
"""Operators that devices have kernels of, and that PyTorch would take apart for this one."""

_MASKING = ("aten::index_put", "aten::_index_put_impl")
"""Operators that wait if an index is a mask; where values are read so, PyTorch calls ``nonzero`` by itself."""

_MAKING = ("aten::empty", "aten::new_empty", "aten::resize_", "aten::set_")
"""Operators that launch nothing."""


@dataclass(eq=False)
class Counts:
    """What ran on the device.

    Attributes:
        launches: Operators that computed something, by name.
        waits: Points at which the host waits for the device, by name; of copies ``upload`` and ``download``.
        read_bytes: Bytes of all arguments of these operators, each operator's counted anew.
        written_bytes: Bytes of all results.
        copied_bytes: Bytes that went between the device and the CPU.
        flops: Multiplications and additions of matrix products, triangular solutions and factorizations.
        start_bytes: Memory that tensors of the device took at the beginning.
        peak_bytes: Most memory that they took.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    read_bytes: int = 0
    written_bytes: int = 0
    copied_bytes: int = 0
    flops: int = 0
    start_bytes: int = 0
    peak_bytes: int = 0


class _Device:
    """What is known of the one device of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # memory may be let go in the middle of anything
        self.counting: list[Counts] = []
        self.float64 = True
        self.live_bytes = 0
        self.libraries: list[torch.library.Library] = []

    def took(self, count: int) -> None:
        with self.lock:
            self.live_bytes += count
            for counts in self.counting:
                counts.peak_bytes = max(counts.peak_bytes, self.live_bytes)


_device = _Device()


@contextmanager
def counted() -> Iterator[Counts]:
    """Count what runs on the device in this context, in all threads."""
    counts = Counts(start_bytes=_device.live_bytes, peak_bytes=_device.live_bytes)
    with _device.lock:
        _device.counting.append(counts)
    try:
        yield counts
    finally:
        with _device.lock:
            _device.counting = [each for each in _device.counting if each is not counts]


@contextmanager
def without_float64() -> Iterator[None]:
    """Refuse tensors of float64 on the device, as MPS does."""
    _device.float64 = False
    try:
        yield
    finally:
        _device.float64 = True


def one_launch(name: str, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Have the CPU compute a tensor of the device, and count one launch: in the place of a kernel of the package."""
    result = _to_device(function(*(_to_cpu(each) for each in tensors)))
    _count(name, list(tensors), [result])
    return result


class _Module(backend_registration._DummyBackendModule):
    # Nothing that looks around for a device takes this one: it is there for those who name it.
    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


@cache
def register() -> torch.device:
    """Make the device known to PyTorch, once a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    # What PyTorch would do by itself for any device, and not for this one.
    own = torch.library.Library("aten", "IMPL")
    own.impl("copy_", _copy_, "PrivateUse1")
    own.impl("empty.memory_format", _empty, "PrivateUse1")
    own.impl("empty_strided", _empty_strided, "PrivateUse1")
    for name in _WHOLE:
        operator, _, overload = name.partition(".")
        own.impl(name, partial(_run, getattr(getattr(torch.ops.aten, operator), overload or "default")), "PrivateUse1")
    own.impl("convolution_overrideable", partial(_run, torch.ops.aten.convolution.default), "PrivateUse1")
    own.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    _device.libraries += [everything, own]
    return torch.device(NAME, 0)


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _handed_over(tensor: Tensor, kind: int) -> Tensor:
    # The same memory under another device's name: that stands behind the pointer to the values.
    capsule = torch._C._to_dlpack(tensor)
    device = _pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    ctypes.c_int32.from_address(device).value = kind
    handed: Tensor = torch._C._from_dlpack(capsule)
    return handed


def _to_cpu(tensor: Tensor) -> Tensor:
    handed = _handed_over(tensor, _DLPACK_CPU)
    # Which DLPack knows nothing of: PyTorch conjugates and negates some views only as they are read.
    handed = handed.conj() if tensor.is_conj() else handed
    return torch._neg_view(handed) if tensor.is_neg() else handed


def _to_device(tensor: Tensor) -> Tensor:
    # A new tensor of the device; its memory is counted until PyTorch lets it go.
    if tensor.dtype == torch.float64 and not _device.float64:
        raise TypeError("cannot convert to float64: the device does not support it")
    count = tensor.untyped_storage().nbytes()
    _device.took(count)
    weakref.finalize(tensor, _device.took, -count).atexit = False
    return _handed_over(tensor, _DLPACK_OTHER)


def _empty(size: Any, **kwargs: Any) -> Tensor:
    return _to_device(torch.empty(size, **_for_cpu(kwargs)))


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
    return _to_device(torch.empty_strided(size, stride, **_for_cpu(kwargs)))


def _convolution_backward(gradient: Tensor, inputs: Tensor, weight: Tensor, *options: Any) -> Any:
    return _run(torch.ops.aten.convolution_backward.default, gradient, inputs, weight, None, *options)


def _for_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _mapped(kwargs, _to_cpu).items() if key != "pin_memory"}


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    kinds = {tensor.device.type for tensor in (target, source)}
    if kinds == {NAME}:
        _count("aten::copy_", [source], [target])
    else:
        name = "download" if source.device.type == NAME else "upload"
        count = source.nbytes
        with _device.lock:
            for counts in _device.counting:
                counts.copied_bytes += count
                if not non_blocking:
                    counts.waits[name] += 1
    own, other = (_to_cpu(each) if each.device.type == NAME else each for each in (target, source))
    own.copy_(other)
    return target


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    # Any operator: have the CPU compute, in the memory of the arguments.
    name, schema = op.name(), op._schema
    if any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns):
        return op.redispatch(_CPU_KERNELS, *args, **kwargs)  # a view: kernels of the CPU look at no value
    writes = any(each.alias_info is not None for each in schema.returns)
    given: list[tuple[Tensor, Tensor]] = []

    def taken(tensor: Tensor) -> Tensor:
        if tensor.device.type == NAME:
            # Memory for results may be empty, and is then made as large as it has to be.
            resized = not tensor.numel() and writes
            given.append((tensor, torch.empty_like(tensor, device="cpu") if resized else _to_cpu(tensor)))
            return given[-1][1]
        if tensor.ndim:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, {NAME}:0, but one is on {tensor.device}"
            )
        return tensor

    def returned(tensor: Tensor) -> Tensor:
        for own, as_given in given:
            if as_given is tensor:
                return own if own.shape == tensor.shape else _set_(own, _to_device(tensor))
        return _to_device(tensor)

    results = op(*_mapped(args, taken), **_mapped(kwargs, taken))
    outputs: list[Tensor] = []

    def handed(tensor: Tensor) -> Tensor:
        outputs.append(returned(tensor))
        return outputs[-1]

    made = _mapped(results, handed)
    _count(name if kwargs.get("output_size") is None else f"{name}, sized", [own for own, _ in given], outputs)
    return made


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    # The same with all tensors changed, and the CPU in the place of the device.
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, list | tuple):
        return type(values)([_mapped(each, change) for each in values])
    if isinstance(values, dict):
        return {key: _mapped(each, change) for key, each in values.items()}
    return _CPU if isinstance(values, torch.device) else values


def _set_(tensor: Tensor, other: Tensor) -> Tensor:
    storage, place = other.untyped_storage(), (other.storage_offset(), other.size(), other.stride())
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNELS, tensor, storage, *place)
    return tensor


def _count(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    if name.startswith(_MAKING):
        return
    masked = name.startswith(_MASKING) and any(each.dtype == torch.bool for each in inputs[1:])
    flops = _flops(name.partition(".")[0].removeprefix("aten::").rstrip("_"), inputs, outputs)
    with _device.lock:
        for counts in _device.counting:
            counts.launches[name] += 1
            if name in _WAITS or masked:
                counts.waits[name] += 1
            counts.read_bytes += sum(each.nbytes for each in inputs)
            counts.written_bytes += sum(each.nbytes for each in outputs)
            counts.flops += flops


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    shapes: list[Any] = [each.shape for each in inputs]
    formula = _FLOPS.get(name)
    return 0 if formula is None or not outputs else int(formula(shapes, outputs[0].numel()))


_FLOPS: dict[str, Callable[[list[Any], int], float]] = {
    "mm": lambda shapes, count: 2 * count * shapes[0][-1],
    "bmm": lambda shapes, count: 2 * count * shapes[0][-1],
    "mv": lambda shapes, count: 2 * count * shapes[0][-1],
    "addmm": lambda shapes, count: 2 * count * shapes[1][-1],
    "addmv": lambda shapes, count: 2 * count * shapes[1][-1],
    "baddbmm": lambda shapes, count: 2 * count * shapes[1][-1],
    "linalg_solve_triangular": lambda shapes, count: count * shapes[0][-1],
    "linalg_cholesky_ex": lambda shapes, count: count * shapes[0][-1] / 3,
    "round_rows": lambda shapes, count: 2 * count * (shapes[1][-1] + shapes[3][-1]),  # of error feedback to EXL2
}

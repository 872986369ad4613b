"""Recording what a module computes: operations on numbered values, and which of its modules did them.

Everything runs on the meta device, where tensors have shapes but no values: a block of a model of any size takes
milliseconds and no memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Call", "Operation", "Recording", "WithoutValues", "record"]

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of ATen, by which values are made from others.

    Attributes:
        name: Its name without namespace, overload and the underscore of in-place variants, for example ``addmm``.
        inputs: Numbers of the values it takes, in the order of its arguments.
        outputs: Numbers of the values it makes. What works in place makes a new value, too.
        numbers: Python numbers among its arguments, in their order.
        pointwise: Whether each element of its output comes from one element of every input.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    numbers: tuple[float, ...] = ()
    pointwise: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        module: Path of the module.
        inputs: Numbers of the values among its arguments, in their order.
        outputs: Numbers of the values that it returned.
        operations: Indices of the operations between start and end.
    """

    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operations: range


@dataclass(frozen=True, slots=True)
class Recording:
    """What a module computed in one call.

    Attributes:
        operations: In the order of computation.
        calls: Of the modules inside, in the order in which they ended.
        shapes: Shape of every value, by its number.
        parameters: Number of a value -> name of the parameter that it is.
        constants: Number of a value -> what it holds, of single numbers in tensors.
        input: Number of the first tensor that the module was called with.
        output: Number of the first tensor that it returned.
        result: What it returned, on the meta device.
    """

    operations: Sequence[Operation]
    calls: Sequence[Call]
    shapes: Sequence[torch.Size]
    parameters: Mapping[int, str]
    constants: Mapping[int, float]
    input: int
    output: int
    result: Any = field(compare=False)


class WithoutValues(TorchDispatchMode):
    """Lets code run on the meta device that was not written for it.

    Tensors elsewhere are taken to the meta device where they meet one that is there. Code that asks for values gets an
    answer: a number is zero, a condition is false, and one place of a tensor is not zero. So of the experts one works,
    on one token.
    """

    def __init__(self) -> None:
        """Become active in a ``with`` statement, not before."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not say what it returns

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or answer in its place."""
        kwargs = kwargs or {}
        on_meta = [leaf.is_meta for leaf in _leaves([*args, *kwargs.values()]) if isinstance(leaf, Tensor)]
        if any(on_meta):
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.zeros((), dtype=args[0].dtype).item()
            if func is torch.ops.aten.nonzero.default:
                return args[0].new_empty((1, args[0].ndim), dtype=torch.int64)
            if not all(on_meta):
                args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(_META), (args, kwargs))
        return func(*args, **kwargs)


def record(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """Run a module once, on the meta device, and record it.

    Args:
        module: A module in evaluation mode; its weights may be on the meta device.
        forward: Its own forward method.
        args: Positional arguments of the call; tensors are on the meta device.
        kwargs: Named ones.
    """
    recorder = _Recorder(module)
    with ExitStack() as stack:
        for path, inner in module.named_modules():
            if path:
                before, after = recorder.hooks(path)
                stack.enter_context(inner.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(inner.register_forward_hook(after, with_kwargs=True))
        first = recorder.numbers_of((args, kwargs))[0]
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        result = forward(*args, **kwargs)
    return Recording(
        operations=recorder.operations,
        calls=recorder.calls,
        shapes=[tensor.shape for tensor in recorder.tensors],
        parameters=recorder.parameters,
        constants=recorder.constants,
        input=first,
        output=recorder.numbers_of(result)[0],
        result=result,
    )


class _Recorder(WithoutValues):
    """Numbers tensors and lists operations.

    Attributes:
        operations: As in ``Recording``, as the others are.
        calls: Of modules.
        tensors: By number; held, so that none takes the identity of another.
        parameters: Number -> name.
        constants: Number -> value.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.tensors: list[Tensor] = []
        self.parameters: dict[int, str] = {}
        self.constants: dict[int, float] = {}
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._numbers: dict[int, int] = {}
        self._sharing: defaultdict[int, list[Tensor]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves([*args, *kwargs.values()])
        inputs = tuple(self._number(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        numbers = tuple(float(leaf) for leaf in leaves if type(leaf) in (int, float))
        changed = _changed(func, args, kwargs)
        made = super().__torch_dispatch__(func, types, args, kwargs)
        results = [leaf for leaf in _leaves([made]) if isinstance(leaf, Tensor)]
        others = [other for tensor in changed for other in self._sharing[_storage(tensor)]]
        outputs = tuple(self._new(tensor) for tensor in [*changed, *_without(results, changed)])
        name = func._schema.name.rpartition("::")[2].removesuffix("_")
        self.operations.append(Operation(name, inputs, outputs, numbers, torch.Tag.pointwise in func.tags))
        for other in _without(others, changed):  # views of what has changed
            old = self._numbers[id(other)]
            self.operations.append(Operation("changed", (old, *outputs[: len(changed)]), (self._new(other),)))
        return made

    def numbers_of(self, tree: Any) -> tuple[int, ...]:
        """Return the numbers of all tensors in arguments or results, in their order."""
        return tuple(self._number(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

    def hooks(self, path: str) -> tuple[Any, Any]:
        """Return what is to be called before and after a module's forward; a module may be inside itself."""
        started: list[tuple[int, tuple[int, ...]]] = []

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            started.append((len(self.operations), self.numbers_of((args, kwargs))))

        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            first, inputs = started.pop()
            self.calls.append(Call(path, inputs, self.numbers_of(output), range(first, len(self.operations))))

        return before, after

    def _number(self, tensor: Tensor) -> int:
        number = self._numbers.get(id(tensor))
        if number is not None:
            return number
        number = self._new(tensor)
        if id(tensor) in self._names:
            self.parameters[number] = self._names[id(tensor)]
        elif tensor.numel() == 1 and not tensor.is_meta:
            self.constants[number] = float(tensor)
        return number

    def _new(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._sharing[_storage(tensor)].append(tensor)
        self._numbers[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        return self._numbers[id(tensor)]


def _leaves(values: Iterable[Any]) -> list[Any]:
    # Of what operations take and return, which is nested in lists and tuples alone: many times as fast as a pytree.
    found: list[Any] = []
    for value in values:
        found += _leaves(value) if isinstance(value, list | tuple) else [value]
    return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    # Tensors that an operation writes into.
    if not func._schema.is_mutable:
        return []
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | {**kwargs}
    written = [named.get(argument.name) for argument in func._schema.arguments if argument.is_write]
    return [leaf for leaf in _leaves(written) if isinstance(leaf, Tensor)]


def _without(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    left_out = {id(other) for other in others}
    return [tensor for tensor in tensors if id(tensor) not in left_out]

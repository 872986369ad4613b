"""What joins the residual stream of a block, at which scale and through which norm, and what is read from it.

Every value of a recording is one of four things: the stream, what a norm makes of it, outputs of linears on their way
to it, or anything else. What each operation makes of them is a small table, gone through once in the order of
computation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .flow import Flow
from .recording import Call, Operation, Recording

__all__ = ["Join", "StreamReading", "is_norm", "read_stream"]

_MEANS = {"mean", "native_layer_norm", "_fused_rms_norm", "rms_norm", "var_mean", "var", "linalg_vector_norm"}
"""Operations of which a norm holds one at least."""


@dataclass(frozen=True, slots=True)
class Join:
    """The output of a linear on its way to the residual stream.

    Attributes:
        linear: Path of the linear.
        scale: What it was multiplied by.
        norm: Path of the norm that it went through; None if through none.
    """

    linear: str
    scale: float = 1.0
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class _Stream:
    """The block's input and what was added to it.

    Attributes:
        joins: Those outputs of linears among it that are known.
        whole: Whether it is the whole sum as it is, neither a part of it nor scaled: only then what is added joins.
    """

    joins: tuple[Join, ...] = ()
    whole: bool = True


@dataclass(frozen=True, slots=True)
class _Normed:
    """What a norm makes of the stream."""


@dataclass(frozen=True, slots=True)
class _Outputs:
    """A sum of outputs of linears.

    Attributes:
        joins: One each.
        alone: Whether nothing else is in the sum.
    """

    joins: tuple[Join, ...]
    alone: bool = True


_State = _Stream | _Normed | _Outputs


@dataclass(frozen=True, slots=True)
class StreamReading:
    """How a block reads its residual stream, and what it adds to it.

    Attributes:
        joins: By the path of the linear whose output joins.
        normed: Numbers of the values that a norm makes of the stream.
    """

    joins: Mapping[str, Join]
    normed: frozenset[int]


def read_stream(flow: Flow, linears: Mapping[int, str]) -> StreamReading:
    """Follow the residual stream through a recording.

    Args:
        flow: The recording's values.
        linears: Number of the value that a linear returned -> path of the linear.
    """
    recording = flow.recording
    norms = {call.outputs[0]: call for call in recording.calls if is_norm(call, flow)}
    states: dict[int, _State] = {recording.input: _Stream()}
    for operation in recording.operations:
        found = _state_after(operation, states, flow)
        for value in operation.outputs:
            state = found
            if value in linears:
                state = _Outputs((Join(linears[value]),))
            elif value in norms:
                state = _normed(norms[value], states, recording)
            if state is not None:
                states[value] = state
    end = states.get(recording.output)
    joins = end.joins if isinstance(end, _Stream) else ()
    counts = Counter(join.linear for join in joins)
    return StreamReading(
        joins={join.linear: join for join in joins if counts[join.linear] == 1},
        normed=frozenset(value for value, state in states.items() if isinstance(state, _Normed)),
    )


def is_norm(call: Call, flow: Flow) -> bool:
    """Return whether a call of a module is that of a norm: of one value, with a mean in it and no product."""
    operations = [flow.recording.operations[index] for index in call.operations]
    inputs = [value for value in call.inputs if flow.depends(value)]
    shapes = flow.recording.shapes
    return (
        any(operation.name in _MEANS for operation in operations)
        and not any(flow.multiplies(operation) for operation in operations)
        and len(inputs) == len(call.outputs) == 1
        and inputs != list(call.outputs)
        and shapes[inputs[0]] == shapes[call.outputs[0]]
    )


def _normed(call: Call, states: Mapping[int, _State], recording: Recording) -> _State | None:
    state = next((states[value] for value in call.inputs if value in states), None)
    if isinstance(state, _Stream):
        return _Normed()
    shapes = recording.shapes
    whole = shapes[call.outputs[0]][-1] == shapes[recording.input][-1]  # not one for each head
    if isinstance(state, _Outputs) and state.alone and len(state.joins) == 1 and whole:
        (join,) = state.joins
        if join.norm is None and join.scale == 1:
            return _Outputs((replace(join, norm=call.module),))
    return None


def _state_after(operation: Operation, states: Mapping[int, _State], flow: Flow) -> _State | None:
    taken = flow.depending(operation)
    first = next((states[value] for value in taken if value in states), None)
    if first is None or not operation.outputs:
        return None
    if flow.looks_at(operation):
        own = states.get(operation.inputs[0])
        return own if flow.keeps(operation) else _part(own)
    if any(flow.size(value) != flow.size(operation.outputs[0]) for value in taken):
        return None
    if operation.name == "mul" or (operation.name == "div" and taken[0] == operation.inputs[0]):
        return _scaled(first, _factor(operation, flow)) if len(taken) == 1 else None
    if operation.name == "add" and not (len(operation.inputs) > 1 and operation.numbers):
        return _sum([states.get(value) for value in taken], constant=len(taken) == 1)
    return None


def _part(state: _State | None) -> _State | None:
    if isinstance(state, _Stream):
        return _Stream(whole=False)
    return state if isinstance(state, _Normed) else None


def _factor(operation: Operation, flow: Flow) -> float | None:
    # What a value is multiplied by, if that is one number, and a known one.
    others = [flow.recording.constants.get(value) for value in operation.inputs if not flow.depends(value)]
    factor = next(iter([*others, *operation.numbers]), None)
    if factor is None or operation.name == "mul":
        return factor
    return 1 / factor if factor else None


def _scaled(state: _State, factor: float | None) -> _State | None:
    if factor == 1 or isinstance(state, _Normed):
        return state
    if isinstance(state, _Stream):
        return replace(state, whole=False)
    if factor is None:
        return None
    return replace(state, joins=tuple(replace(join, scale=join.scale * factor) for join in state.joins))


def _sum(states: list[_State | None], *, constant: bool) -> _State | None:
    # Of one value and a constant, or of two values.
    streams = [state for state in states if isinstance(state, _Stream)]
    outputs = [state for state in states if isinstance(state, _Outputs)]
    joins = tuple(join for state in outputs for join in state.joins)
    if len(streams) == 1:
        stream = streams[0]
        return replace(stream, joins=(*stream.joins, *joins)) if stream.whole else stream
    if streams or not outputs:
        return None
    return _Outputs(joins, alone=not constant and len(outputs) == len(states) and all(state.alone for state in outputs))

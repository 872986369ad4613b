import pytest
import torch
from bpwise.checkpoint.trace.recording import Operation, Recording, WithoutValues, record
from torch import Tensor, nn


def recorded(module: nn.Module, *inputs: Tensor) -> Recording:
    return record(module, module.forward, inputs, {})


def values(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, device="meta")
        self.second = nn.Linear(6, 4, bias=False, device="meta")

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return self.second(self.first(hidden).relu() * 0.5), None


def test_operations_and_calls() -> None:
    recording = recorded(Both(), values(3, 4))
    assert [operation.name for operation in recording.operations] == ["t", "addmm", "relu", "mul", "t", "mm"]
    assert [operation.pointwise for operation in recording.operations] == [False, False, True, True, False, False]
    relu, scaled = recording.operations[2:4]
    assert scaled.inputs == relu.outputs
    assert scaled.numbers == (0.5,)
    first, second = recording.calls
    assert (first.module, second.module) == ("first", "second")
    assert (list(first.operations), list(second.operations)) == ([0, 1], [4, 5])
    assert first.inputs == (recording.input,)
    assert second.outputs == (recording.output,)
    assert {*recording.parameters.values()} == {"first.weight", "first.bias", "second.weight"}
    assert recording.shapes[recording.output] == (3, 4)
    assert recording.result[0].is_meta


def test_equal_modules_have_equal_recordings() -> None:
    first, second = (recorded(Both(), values(3, 4)) for _ in range(2))
    assert first == second
    assert first.result[0] is not second.result[0]
    assert first != recorded(Both(), values(5, 4))


class InPlace(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        doubled = hidden + hidden
        part = doubled[1:]
        part += 1
        return doubled


def test_what_changes_a_view_makes_a_new_value_of_the_whole() -> None:
    doubled, sliced, added, changed = recorded(InPlace(), values(3, 4)).operations
    assert (doubled.name, sliced.name, added.name, changed.name) == ("add", "slice", "add", "changed")
    assert added.inputs == sliced.outputs
    assert changed == Operation("changed", (*doubled.outputs, *added.outputs), changed.outputs)


def test_the_output_is_what_was_changed() -> None:
    recording = recorded(InPlace(), values(3, 4))
    assert (recording.output,) == recording.operations[-1].outputs


def test_constants_are_kept() -> None:
    class Scaled(nn.Module):
        factor = torch.tensor(0.25)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * self.factor

    recording = recorded(Scaled(), values(3, 4))
    assert [recording.constants.get(value) for value in recording.operations[0].inputs] == [None, 0.25]


def test_hooks_go_even_after_an_error() -> None:
    module = Both()
    with pytest.raises(RuntimeError):
        recorded(module, values(3, 5))
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())


def test_questions_about_values_are_answered() -> None:
    scores = values(3, 4)
    with WithoutValues():
        assert float(scores.sum()) == 0.0
        assert int(scores.argmax()) == 0
        assert not scores.any()
        rows, columns = torch.where(scores > 0)
        assert rows.shape == columns.shape == (1,)
        assert scores[rows].shape == (1, 4)
        assert [int(place) for place in (scores[0] > 0).nonzero()] == [0]


def test_tensors_elsewhere_come_along() -> None:
    with WithoutValues():
        assert (values(3, 4) + torch.ones(4)).is_meta
        assert torch.cat([torch.ones(1, 4), values(3, 4)]).shape == (4, 4)
        assert float(torch.ones(3).sum()) == 3.0  # by themselves they are what they were

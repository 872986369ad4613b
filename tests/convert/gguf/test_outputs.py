"""Outputs of a linear that make up for each other's errors, against dense linear algebra."""

import numpy as np
import pytest
import torch
from bpwise.convert.gguf.ggml.kernels import decode, ggml_type
from bpwise.convert.gguf.ggml.rounding import round_to_type
from bpwise.linalg.hessian import factor_hessian
from bpwise.linalg.outputs import OutputFeedback, output_sets

pytest.importorskip("libggml", reason="ggml's library is not installed: pip install '.[gguf]'")

SETS = 4
KIND = ggml_type("Q4_0")


class Problem:
    """A linear of 27 outputs, no whole number of sets, with what errors in inputs and outputs cost."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        inputs = torch.randn(512, 64, generator=rng) @ torch.randn(64, 64, generator=rng)
        self.gram = inputs.T @ inputs / 512
        self.upper = factor_hessian(self.gram, 0.01).upper
        self.weight = torch.randn(64, 27, generator=rng) * 0.05
        gradients = torch.randn(2000, 3, generator=rng) @ torch.randn(3, 27, generator=rng)
        gradients += 0.3 * torch.randn(2000, 27, generator=rng)
        fisher = gradients.T @ gradients / 2000
        values, vectors = torch.linalg.eigh(fisher)
        directions = vectors[:, -3:] * values[-3:].sqrt()
        self.fisher, self.coupling = fisher.diagonal(), directions / fisher.diagonal().sqrt()[:, None]
        self.outputs = directions @ directions.T
        self.outputs.diagonal().copy_(self.fisher + 0.1 * self.fisher.mean())

    def damage(self, data: np.ndarray) -> float:
        error = (self.weight - decode(data, KIND).T).double()
        return float(torch.trace(self.outputs.double() @ error.T @ self.gram.double() @ error))


def by_definition(problem: Problem) -> np.ndarray:
    """Round set after set; the outputs that are left move to where the loss changes least."""
    order = [output for first in range(SETS) for output in range(first, 27, SETS)]
    rounded: dict[int, np.ndarray] = {}
    matrix = problem.outputs.double()
    for first in range(SETS):
        own, left = list(range(first, 27, SETS)), order[len(rounded) :]
        shift = torch.zeros(64, len(left), dtype=torch.float64)
        if rounded:
            done = list(rounded)
            values = decode(np.stack([rounded[output] for output in done]), KIND).T
            error = (values - problem.weight[:, done]).double()
            shift = -error @ matrix[done][:, left] @ torch.linalg.inv(matrix[left][:, left])
        target = problem.weight[:, own] + shift[:, : len(own)].float()
        rounded |= zip(own, round_to_type(target, problem.upper, KIND), strict=True)
    return np.stack([rounded[output] for output in range(27)])


def test_sets_of_outputs_follow_the_definition() -> None:
    problem = Problem()
    outputs = OutputFeedback.of(problem.fisher, problem.coupling, SETS)
    found = round_to_type(problem.weight, problem.upper, KIND, outputs)
    # A tie that float32 breaks another way changes what comes after it: the damage is the same to 1 %.
    assert problem.damage(found) == pytest.approx(problem.damage(by_definition(problem)), rel=0.01)
    assert np.mean(found == by_definition(problem)) > 0.95


def test_answering_to_each_other_pays() -> None:
    problem = Problem()
    outputs = OutputFeedback.of(problem.fisher, problem.coupling, SETS)
    alone = round_to_type(problem.weight, problem.upper, KIND)
    assert problem.damage(round_to_type(problem.weight, problem.upper, KIND, outputs)) < 0.8 * problem.damage(alone)


@pytest.mark.parametrize(("outputs", "sets"), [(1, 1), (511, 1), (512, 2), (1000, 3), (8960, 4)])
def test_few_outputs_are_no_sets(outputs: int, sets: int) -> None:
    assert output_sets(outputs) == sets

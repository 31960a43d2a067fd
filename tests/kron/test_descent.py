from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sekron_search.kron.descent import minimise


class Rosenbrock:
    """A curved valley; counts its evaluations."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        self.count += 1
        leaves = [a.detach().clone().requires_grad_() for a in x]
        a, b = leaves
        value = ((1 - a) ** 2).sum() + (100 * (b - a**2) ** 2).sum()
        return float(value.detach()), list(torch.autograd.grad(value, leaves))


START = [torch.tensor([-1.2], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)]


def test_the_minimum_of_a_curved_valley_is_found() -> None:
    found = minimise(Rosenbrock(), START, evaluations=200, tolerance=0.0).point
    assert [a.shape for a in found] == [(1,), (1, 1)]
    assert float((found[0] - 1).abs() + (found[1] - 1).abs()) < 1e-5


@pytest.mark.parametrize("evaluations", [1, 2, 7])
def test_no_more_evaluations_than_allowed_and_never_higher(evaluations: int) -> None:
    function = Rosenbrock()
    found = minimise(function, START, evaluations=evaluations, tolerance=0.0)
    assert function.count <= evaluations
    assert found.value == Rosenbrock()(found.point)[0] <= Rosenbrock()(START)[0]


def test_it_ends_where_little_is_gained() -> None:
    patient, hasty = Rosenbrock(), Rosenbrock()
    minimise(patient, START, evaluations=200, tolerance=0.0)
    minimise(hasty, START, evaluations=200, tolerance=0.9)
    assert hasty.count < patient.count


def test_values_that_are_not_finite_are_stepped_back_from() -> None:
    def barrier(x: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        value = x[0] - x[0].log() * 0.1
        return float(value), [1 - 0.1 / x[0]]

    found = minimise(barrier, [torch.tensor([0.5], dtype=torch.float64)], evaluations=60, tolerance=0.0).point
    assert float(found[0]) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("steepness", [1.0, 30.0, 3000.0])
def test_a_first_step_that_is_much_too_long_costs_one_evaluation(steepness: float) -> None:
    def bowl(x: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        return float(0.5 * steepness * x[0].square().sum()), [steepness * x[0]]

    found = minimise(bowl, [torch.ones(3, dtype=torch.float64)], evaluations=4, tolerance=0.0)
    assert found.value <= 1e-6 * steepness

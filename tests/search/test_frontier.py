"""The additive front, what more of a budget buys, and hypervolumes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.budget import CostName
from sekron_search.search.frontier import additive_front, marginal_gains
from sekron_search.search.knapsack import additive_errors, best_reachable
from sekron_search.search.pareto import hypervolume, hypervolumes
from tests.search.test_search import NETWORK, random_network

GRID = st.integers(0, 5)


def counted_volume(points: list[tuple[int, ...]], reference: tuple[int, ...]) -> int:
    """Unit cells that some point dominates."""
    cells = itertools.product(*(range(limit) for limit in reference))
    return sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)


@given(st.lists(st.tuples(GRID, GRID, GRID), max_size=8), st.tuples(GRID, GRID, GRID))
def test_hypervolume_counts_what_is_dominated(points: list[tuple[int, ...]], reference: tuple[int, ...]) -> None:
    assert hypervolume(np.array(points, float).reshape(-1, 3), reference) == counted_volume(points, reference)


def test_hypervolumes_are_of_the_first_points() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1.2, (12, 4))
    points[3] = np.nan
    found = hypervolumes(points, [1.0] * 4)
    assert found.tolist() == pytest.approx([hypervolume(points[: i + 1], [1.0] * 4) for i in range(12)])
    assert (np.diff(found) >= 0).all()
    assert found[3] == found[2]
    samples = rng.uniform(0, 1, (40_000, 4))
    inside = np.any([(p <= samples).all(axis=1) for p in points], axis=0)
    assert found[-1] == pytest.approx(inside.mean(), abs=0.02)
    assert hypervolume([], [1.0]) == 0


def test_front_goes_from_the_original_to_the_cheapest() -> None:
    errors = additive_errors(NETWORK)
    points = additive_front(NETWORK, errors, ["flops", "params"], levels=9)
    together = [p for p in points if p.tightened == ("flops", "params")]
    assert together[0].solution.assignment == (0, 0, 0)
    assert together[0].solution.error == 0
    assert together[-1].level == 1
    every = list(itertools.product(range(4), repeat=3))
    for point in points:
        # Nothing that costs as little has less error: by trying all.
        bounds = {
            n: NETWORK.original[n] + point.level * (best_reachable(NETWORK, [n])[n] - NETWORK.original[n])
            for n in point.tightened
        }
        fitting = [
            sum(float(e[i]) for e, i in zip(errors, a, strict=True))
            for a in every
            if all(NETWORK.cost(a, n) <= bound + 1e-9 for n, bound in bounds.items())
        ]
        assert point.solution.error == pytest.approx(min(fitting), rel=1e-3)
        assert point.solution.lower_bound <= point.solution.error
    for name in ("flops", "params"):
        alone = [p for p in points if p.tightened == (name,)]
        assert len(alone) == 9
        assert alone[-1].costs[name] == best_reachable(NETWORK, [name])[name]
        assert [p.solution.error for p in alone] == sorted(p.solution.error for p in alone)


def test_a_front_ends_where_costs_cannot_be_least_together() -> None:
    from tests.search.test_search import tables

    apart = tables([[(10, 10, 0.0), (1, 9, 0.1), (9, 1, 0.1)]])
    points = additive_front(apart, additive_errors(apart), ["flops", "params"], levels=5)
    assert max(p.level for p in points if len(p.tightened) == 2) < 1
    assert {p.tightened for p in points if p.level == 1} == {("flops",), ("params",)}


def test_what_more_of_a_budget_buys_is_the_difference_of_the_best() -> None:
    network = random_network(0)
    errors = additive_errors(network)
    bounds: dict[CostName, float] = {"flops": 0.5 * network.original["flops"], "params": 2 * network.original["params"]}
    best, gains = marginal_gains(network, errors, bounds)
    looser, _ = marginal_gains(network, errors, {**bounds, "flops": 1.01 * bounds["flops"]})
    assert gains["flops"] == pytest.approx(best.error - looser.error)
    assert gains["flops"] > 0
    assert gains["params"] == 0, "a budget that does not bind is worth nothing"
    with pytest.raises(InfeasibleBudgetError, match="best reachable"):
        marginal_gains(network, errors, {"flops": 1.0})

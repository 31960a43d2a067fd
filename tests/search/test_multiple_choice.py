from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.knapsack.networks import resnet50_tables
from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search import multiple_choice
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import additive_errors, best_reachable, solve_knapsack
from sekron_search.search.multiple_choice import MultipleChoice, solve

NAMES: tuple[CostName, ...] = ("flops", "params", "latency_ms")


def drawn(seed: int, *, groups: int = 5, options: int = 5, bounds: int = 3, room: float = 0.5) -> MultipleChoice:
    """A knapsack whose options of less cost have more error."""
    rng = np.random.default_rng(seed)
    costs = rng.uniform(0.05, 1, (bounds, groups * options))
    errors = np.exp(-3 * costs.mean(axis=0)) * rng.uniform(0.6, 1.5, groups * options)
    return MultipleChoice(errors, costs, np.full(bounds, room * groups), np.repeat(np.arange(groups), options))


def every_choice(problem: MultipleChoice) -> NDArray[np.int64]:
    ranges = [range(s, e) for s, e in zip(problem.starts, [*problem.starts[1:], len(problem.errors)], strict=True)]
    return np.array(list(itertools.product(*ranges)))


@pytest.mark.parametrize("room", [0.3, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("bounds", [1, 2, 3])
def test_the_best_of_all_choices_is_found_and_proven(bounds: int, room: float) -> None:
    for seed in range(12):
        problem = drawn(seed, bounds=bounds, room=room)
        choices = every_choice(problem)
        meets = (problem.costs[:, choices].sum(axis=2) <= problem.room[:, None]).all(axis=0)
        found = solve(problem, 0.0, 10.0)
        if not meets.any():
            assert found is None
            continue
        assert found is not None
        best = problem.errors[choices[meets]].sum(axis=1).min()
        assert found.error == pytest.approx(best, rel=1e-12)
        assert best * (1 - 1e-9) <= found.lower_bound <= best * (1 + 1e-12)
        assert problem.excess(found.options) == 0


def test_any_multipliers_prove_a_bound() -> None:
    problem = drawn(0)
    choices = every_choice(problem)
    meets = (problem.costs[:, choices].sum(axis=2) <= problem.room[:, None]).all(axis=0)
    errors = problem.errors[choices[meets]].sum(axis=1)
    assert problem.multipliers is not None
    for scale in (0.0, 0.3, 1.0, 4.0):
        bound, reduced = problem.reduced(scale * problem.multipliers)
        assert reduced.min() >= 0
        assert (errors >= bound + reduced[choices[meets]].sum(axis=1) - 1e-12).all()
    assert problem.reduced(problem.multipliers)[0] > problem.reduced(4 * problem.multipliers)[0]


@pytest.mark.parametrize("width", [1, 3, 10])
def test_a_narrow_sweep_proves_no_more_than_is_true(width: int) -> None:
    """With partial choices left out it may miss the best choice, but never claims a bound above it."""
    missed = 0
    for seed in range(20):
        problem = drawn(seed, groups=6)
        assert problem.multipliers is not None
        exact = solve(problem, 0.0, 10.0)
        assert exact is not None
        found, proven = problem.better(problem.multipliers, exact.error * 1.2, width)
        assert proven <= exact.error * (1 + 1e-12)
        missed += found is None or problem.error(found) > exact.error * (1 + 1e-9)
    assert missed > 0 or width == 10


def test_local_search_ends_where_no_pair_of_changes_is_better() -> None:
    problem = drawn(3)
    start = problem.starts + 1
    found = problem.improved(start)
    assert problem.excess(found) == 0
    for first, second in itertools.combinations(range(len(problem.errors)), 2):
        if problem.owner[first] == problem.owner[second]:
            continue
        changed = found.copy()
        changed[problem.owner[first]], changed[problem.owner[second]] = first, second
        assert problem.excess(changed) > 0 or problem.error(changed) >= problem.error(found) - 1e-12


def test_a_bound_that_only_one_choice_meets_exactly() -> None:
    for seed in range(10):
        problem = drawn(seed, groups=8)
        cheapest = problem.starts + np.array([np.argmin(c) for c in np.split(problem.costs[0], 8)])
        exact = MultipleChoice(
            problem.errors, problem.costs[:1], problem.costs[:1, cheapest].sum(axis=1), problem.owner
        )
        found = solve(exact, 1e-3, 10.0)
        assert found is not None
        assert found.options.tolist() == cheapest.tolist()
        tighter = MultipleChoice(problem.errors, problem.costs[:1], exact.room * (1 - 1e-4), problem.owner)
        assert solve(tighter, 1e-3, 10.0) is None


def test_ties_do_not_matter() -> None:
    """Groups that are all alike: as many best choices as there are orders."""
    options = np.array([[0.0, 1.0], [0.1, 0.8], [0.5, 0.3], [1.0, 0.1]])
    errors, costs = np.tile(options[:, 0], 12), np.tile(options[:, 1], 12)
    problem = MultipleChoice(errors, costs[None] / 6, np.array([1.0]), np.repeat(np.arange(12), 4))
    found = solve(problem, 0.0, 5.0)
    assert found is not None
    table = {0.0: 0.0}  # by total cost, in tenths
    for _ in range(12):
        step: dict[float, float] = {}
        for cost, error in table.items():
            for own_error, own_cost in options:
                key = round(cost + own_cost, 6)
                step[key] = min(step.get(key, np.inf), error + own_error)
        table = step
    assert found.error == pytest.approx(min(error for cost, error in table.items() if cost <= 6 + 1e-9))
    assert found.lower_bound <= found.error


def test_three_budgets_on_tables_as_large_as_resnet50s() -> None:
    network = resnet50_tables(0, num_options=40)
    assert len(network.tables) == 53
    errors = additive_errors(network)
    for level in (0.35, 0.6):
        bounds = {name: level * network.original[name] for name in NAMES}
        solution = solve_knapsack(network, bounds, errors)
        again = solve_knapsack(network, bounds, errors)
        assert solution == again
        assert 0 <= solution.gap <= 1e-3
        assert all(network.cost(solution.assignment, name) <= bound * (1 + 1e-9) for name, bound in bounds.items())
    least = best_reachable(network, NAMES)
    with pytest.raises(InfeasibleBudgetError, match="together"):
        solve_knapsack(network, {name: 1.0001 * value for name, value in least.items()}, errors)


def test_time_that_is_up_gives_the_best_so_far_and_an_honest_bound() -> None:
    problem = drawn(1, groups=20, options=20)
    hasty = solve(problem, 0.0, -time.monotonic())
    exact = solve(problem, 0.0, 10.0)
    assert hasty is not None
    assert exact is not None
    assert hasty.lower_bound <= exact.error <= hasty.error
    assert exact.lower_bound > hasty.lower_bound


def test_what_no_sweep_proves_the_solver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps that keep one partial choice prove next to nothing: then HiGHS has the last word, whose bound is true."""
    for seed in range(8):
        problem = drawn(seed, groups=7, options=6, room=0.5)
        exact = solve(problem, 0.0, 10.0)
        assert exact is not None
        with monkeypatch.context() as patched:
            patched.setattr(multiple_choice, "WIDTHS", (1,))
            found = solve(problem, 1e-6, 10.0)
        assert found is not None
        assert found.error == pytest.approx(exact.error, rel=1e-6)
        assert found.error * (1 - 1e-5) <= found.lower_bound <= exact.error * (1 + 1e-9)
        assert problem.excess(found.options) == 0


def test_a_total_far_below_the_largest_error_is_proven_no_closer_than_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS has absolute tolerances: its bounds may be no higher than what any choice has."""
    monkeypatch.setattr(multiple_choice, "WIDTHS", (1,))
    for seed in range(12):
        rng = np.random.default_rng(seed)
        costs = rng.uniform(0.05, 1, (2, 24))
        errors = np.exp(rng.uniform(-14, 0, 24)) * (1.2 - costs.mean(axis=0))
        problem = MultipleChoice(errors, costs, np.full(2, 4.0), np.repeat(np.arange(6), 4))
        choices = every_choice(problem)
        meets = (problem.costs[:, choices].sum(axis=2) <= problem.room[:, None]).all(axis=0)
        best = problem.errors[choices[meets]].sum(axis=1).min()
        found = solve(problem, 1e-3, 10.0)
        assert found is not None
        assert found.lower_bound <= best * (1 + 1e-9)
        assert best <= found.error <= best * (1 + 2e-3)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sekron_search.errors import ConfigError, InfeasibleBudgetError
from sekron_search.search.budget import Budget
from sekron_search.search.knapsack import additive_errors, best_reachable, solve_knapsack
from sekron_search.search.options import Assignment, LayerTable, Network, Option
from sekron_search.search.pareto import front, non_dominated
from sekron_search.search.study import SAMPLERS, SamplerName, run_study
from sekron_search.search.trial import Trial, best_feasible, pareto_trials
from sekron_search.tables import FittedLayer
from tests.oracles import dominated, knapsack_by_enumeration

NUMBERS = st.one_of(st.integers(0, 4).map(float), st.just(math.inf))


def option(flops: int, params: int, error: float, *, peak: int = 10, family: str = "Kronecker") -> Option:
    return Option(f"{flops}x1x1x1", family, "0", "factored", flops, params, peak, error, error, latency_ms=flops / 10)


def tables(rows: Sequence[Sequence[tuple[int, int, float]]]) -> Network:
    """The first option of every layer is the original."""
    built = tuple(
        LayerTable(
            f"layer{i}", tuple(option(*row, family="dense" if k == 0 else "Kronecker") for k, row in enumerate(options))
        )
        for i, options in enumerate(rows)
    )
    total = sum(options[0][0] for options in rows), sum(options[0][1] for options in rows)
    original = {"flops": total[0] + 7, "params": total[1] + 3, "latency_ms": total[0] / 10, "peak_activation_bytes": 20}
    return Network(built, original, peak_floor_bytes=5)


NETWORK = tables(
    [
        [(100, 100, 0.0), (60, 50, 0.1), (30, 40, 0.3), (10, 5, 0.7)],
        [(200, 80, 0.0), (120, 60, 0.05), (70, 30, 0.2), (20, 9, 0.6)],
        [(50, 300, 0.0), (40, 150, 0.2), (30, 70, 0.4), (5, 20, 0.9)],
    ]
)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=12))
def test_non_dominated_is_its_definition(points: list[tuple[float, float, float]]) -> None:
    assert non_dominated(points).tolist() == [not dominated(points, i) for i in range(len(points))]


def test_an_error_counts_by_the_layers_sensitivity() -> None:
    scaled = replace(NETWORK, tables=tuple(replace(t, sensitivity=1e-30) for t in NETWORK.tables))
    for plain, small in zip(additive_errors(NETWORK), additive_errors(scaled), strict=True):
        np.testing.assert_allclose(plain, small)
    for sensitive in range(3):
        tables_ = tuple(replace(t, sensitivity=1e3 if i == sensitive else 1.0) for i, t in enumerate(NETWORK.tables))
        network = replace(NETWORK, tables=tables_)
        found = solve_knapsack(network, {"flops": 250}, additive_errors(network))
        assert found.assignment[sensitive] == 0


def test_front_is_sorted_and_leaves_nan_out() -> None:
    assert front([[3.0, 0.0], [1.0, 2.0], [math.nan, 0.0], [2.0, 2.0], [1.0, 2.0]]) == [1, 0]


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.integers(8, 40),
    st.integers(4, 40),
)
def test_knapsack_is_optimal(rows: list[list[tuple[int, int, float]]], flops: int, params: int) -> None:
    network = tables(rows)
    errors = additive_errors(network)
    costs = [
        [[o.flops for o in t.options] for t in network.tables],
        [[o.params for o in t.options] for t in network.tables],
    ]
    expected = knapsack_by_enumeration([e.tolist() for e in errors], costs, [flops - 7, params - 3])
    if expected is None:
        with pytest.raises(InfeasibleBudgetError, match="no choice of structures meets the budgets"):
            solve_knapsack(network, {"flops": flops, "params": params}, errors, relative_gap=0)
        return
    solution = solve_knapsack(network, {"flops": flops, "params": params}, errors, relative_gap=0)
    assert solution.error == pytest.approx(expected, abs=1e-9)
    assert solution.lower_bound <= solution.error + 1e-9
    assert network.cost(solution.assignment, "flops") <= flops
    assert network.cost(solution.assignment, "params") <= params


def test_peak_budget_rules_options_out() -> None:
    options = (option(10, 10, 0.0, peak=50, family="dense"), option(20, 20, 0.5, peak=10))
    network = Network((LayerTable("a", options, outside_bytes=4),), {"flops": 10, "peak_activation_bytes": 54})
    errors = additive_errors(network)
    assert solve_knapsack(network, {"peak_activation_bytes": 54}, errors).assignment == (0,)
    assert solve_knapsack(network, {"peak_activation_bytes": 20}, errors).assignment == (1,)
    with pytest.raises(InfeasibleBudgetError, match="best reachable 14"):
        solve_knapsack(network, {"peak_activation_bytes": 13}, errors)


def test_infeasible_budgets_say_what_can_be_had() -> None:
    with pytest.raises(InfeasibleBudgetError, match="flops: asked at most 10, best reachable 42") as caught:
        solve_knapsack(NETWORK, {"flops": 10, "params": 500}, additive_errors(NETWORK))
    assert caught.value.best == {"flops": 42, "params": 37}
    assert best_reachable(NETWORK, ["latency_ms"]) == {"latency_ms": pytest.approx(3.5)}
    apart = tables([[(10, 10, 0.0), (1, 9, 0.1), (9, 1, 0.1)]])
    with pytest.raises(InfeasibleBudgetError, match="together, though each alone could be met"):
        solve_knapsack(apart, {"flops": 8, "params": 4}, additive_errors(apart))


def test_pruning_keeps_the_original_and_drops_the_dominated() -> None:
    options = (option(9, 9, 0.0, family="dense"), option(5, 5, 0.2), option(6, 6, 0.2), option(5, 9, 0.1))
    factors = tuple((torch.full((1,), float(i)),) for i in range(4))
    fitted = FittedLayer(LayerTable("a", options), factors, (None,) * 4)
    assert [o.flops for o in fitted.pruned(["flops", "params"]).table.options] == [9, 5, 5]
    pruned = fitted.pruned(["flops"])
    assert [(o.flops, o.error) for o in pruned.table.options] == [(9, 0.0), (5, 0.1)]
    assert [float(a) for (a,) in pruned.factors] == [0, 3]


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"flop": 1}, "unknown cost 'flop'"),
        ({}, "at least one of"),
        ({"flops": "half"}, r"budget.flops: expected a positive number, or a multiple"),
        ({"params": -3}, "budget.params"),
        ({"params": "0x"}, "budget.params"),
        ({"latency_ms": float("nan")}, "budget.latency_ms"),
        ({"flops": True}, "budget.flops"),
    ],
)
def test_bad_budgets_say_what_is_wrong(budget: dict[str, float | str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Budget.of(budget)


def test_budgets_resolve_absolute_and_relative() -> None:
    budget = Budget(flops="0.5x", params=12)
    assert budget.names == ("flops", "params")
    assert budget.resolve({"flops": 30.0, "params": 99.0}) == {"flops": 15.0, "params": 12.0}


def pretend(assignment: Assignment) -> float:
    """A divergence to which the layers matter differently, which the additive errors do not know."""
    errors = [o.error for o in NETWORK.chosen(assignment)]
    return errors[0] ** 2 + 8 * errors[1] ** 2 + errors[2] ** 2


def trials_of(path: Path, count: int, sampler: SamplerName = "local", seed: int = 0) -> list[Trial]:
    bounds = {"flops": 200.0, "params": 250.0}
    return list(
        run_study(
            NETWORK,
            bounds,  # type: ignore[arg-type]
            pretend,
            storage=f"sqlite:///{path}",
            name="test",
            trials=count,
            seed=seed,
            sampler=sampler,
        )
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_studies_resume_to_the_same_trials(tmp_path: Path, sampler: SamplerName) -> None:
    whole = trials_of(tmp_path / "whole.db", 16, sampler)
    trials_of(tmp_path / "parts.db", 9, sampler)
    # A process that was killed in the middle of a trial leaves it running, or drawn but not begun.
    import optuna

    left = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'parts.db'}")
    left.ask()
    left.enqueue_trial({"level": 0.3})
    assert trials_of(tmp_path / "parts.db", 16, sampler) == whole
    assert [t.index for t in whole] == list(range(16))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trials_of_the_search_stay_within_the_budget(tmp_path: Path, sampler: SamplerName) -> None:
    trials = trials_of(tmp_path / "study.db", 14, sampler)
    assert all(t.feasible for t in trials if t.source == sampler)
    assert all(t.costs["flops"] <= 200 and t.costs["params"] <= 250 for t in trials if t.feasible)
    assert {t.source for t in trials} == {"knapsack", sampler}
    assert any(not t.feasible for t in trials), "some starts show the front beyond the budget"


def test_local_search_improves_on_the_knapsack_where_layers_differ(tmp_path: Path) -> None:
    """One of two layers has to be compressed; the additive errors name the wrong one by a little."""
    network = tables([[(100, 9, 0.0), (40, 9, 0.30)], [(100, 9, 0.0), (40, 9, 0.31)]])
    trials = list(
        run_study(
            network,
            {"flops": 150.0},
            lambda assignment: 0.3 * assignment[0] + 0.1 * assignment[1],
            storage=f"sqlite:///{tmp_path / 'study.db'}",
            name="test",
            trials=20,
            seed=0,
        )
    )
    start = min(t.divergence for t in trials if t.feasible and t.source == "knapsack" and sum(t.assignment) == 1)
    best = best_feasible(trials, 2)
    assert start == pytest.approx(0.3)
    assert best[0].divergence == pytest.approx(0.1)
    assert best[0].assignment == (0, 1)
    assert best[1].assignment != best[0].assignment


def test_front_of_trials_is_not_dominated(tmp_path: Path) -> None:
    trials = trials_of(tmp_path / "study.db", 14)
    kept = pareto_trials(trials, ["flops", "params"])
    points = np.array([[t.divergence, t.costs["flops"], t.costs["params"]] for t in trials])
    for trial in kept:
        own = np.array([trial.divergence, trial.costs["flops"], trial.costs["params"]])
        assert not any((p <= own).all() and (p < own).any() for p in points)

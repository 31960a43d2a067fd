from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sekron_search.errors import ConfigError, InfeasibleBudgetError, StorageError
from sekron_search.search.budget import Budget, CostName
from sekron_search.search.knapsack import additive_errors, best_reachable, curvature_errors, solve_knapsack
from sekron_search.search.ledger import Ledger
from sekron_search.search.options import Assignment, LayerTable, Network, Option
from sekron_search.search.pareto import front, non_dominated
from sekron_search.search.problem import Problem
from sekron_search.search.proposals import Gaps, leaned
from sekron_search.search.study import Evaluate, objectives, run_study
from sekron_search.search.trial import Evaluation, Trial, best_feasible, pareto_trials
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


def test_responses_are_straight_lines_in_logarithms() -> None:
    table = replace(NETWORK.tables[0], responses=((0.1, 0.02), (0.4, 0.08)))
    found = table.response_to(np.array([0.0, 0.1, 0.2, 0.4, 0.05, 0.8]))
    # Between the two it goes as the error, for their ratio does; outside as its square.
    np.testing.assert_allclose(found, [0.0, 0.02, 0.04, 0.08, 0.005, 0.32])


def test_an_additive_error_is_the_geometric_mean_of_curvature_and_response() -> None:
    told = [((0.1, 3.0), (0.3, 5.0), (0.7, 6.0)), ((0.05, 1.0), (0.2, 2.0), (0.6, 9.0)), ((0.2, 4.0), (0.9, 8.0))]
    sensitivities = (1.0, 4.0, 2.0)
    network = replace(
        NETWORK,
        tables=tuple(
            replace(t, responses=r, sensitivity=s) for t, r, s in zip(NETWORK.tables, told, sensitivities, strict=True)
        ),
    )
    found = additive_errors(network)
    for layer, (own, table, responses) in enumerate(zip(found, network.tables, told, strict=True)):
        assert own[0] == 0.0
        for error, response in responses:
            index = [o.error for o in table.options].index(error)
            expected = math.sqrt(sensitivities[layer] * error**2 * response)
            assert own[index] / found[0][1] == pytest.approx(expected / math.sqrt(0.1**2 * 3.0))
    doubled = replace(
        network,
        tables=tuple(replace(t, responses=tuple((e, 2 * r) for e, r in t.responses)) for t in network.tables),
    )
    for own, other in zip(found, additive_errors(doubled), strict=True):
        np.testing.assert_allclose(own, other)


def test_responses_count_only_where_every_layer_has_some() -> None:
    first = replace(NETWORK.tables[0], responses=((0.1, 3.0), (0.7, 6.0)))
    network = replace(NETWORK, tables=(first, *NETWORK.tables[1:]))
    for own, other in zip(additive_errors(network), curvature_errors(NETWORK), strict=True):
        np.testing.assert_array_equal(own, other)
    # But for a layer that can only stay as it is.
    kept = LayerTable("kept", NETWORK.tables[1].options[:1])
    found = additive_errors(replace(NETWORK, tables=(first, kept)))
    assert found[0][2] / found[0][1] == pytest.approx(3 * math.sqrt(first.response_to(np.array([0.3]))[0] / 3.0))
    assert found[1].tolist() == [0.0]


def test_additive_errors_do_not_depend_on_which_options_are_left() -> None:
    told = tuple(replace(t, responses=((0.1, 3.0), (0.9, 6.0))) for t in NETWORK.tables)
    fewer = tuple(replace(t, options=t.options[:3]) for t in told)
    pairs = zip(*(additive_errors(replace(NETWORK, tables=t)) for t in (told, fewer)), strict=True)
    for whole, part in pairs:
        np.testing.assert_array_equal(whole[:3], part)


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


def test_bounds_as_text_are_the_same_bounds() -> None:
    """A selection is kept as text, and judged by it afterwards: a rounded bound would be another one."""
    written: dict[float | str, str] = {1234567: "1234567", "1234.5678x": "1234.5678x", 2e5: "200000", "0.4x": "0.4x"}
    for asked, text in written.items():
        ((_, bound),) = Budget(params=asked).items()
        assert str(bound) == text
        ((_, again),) = Budget(params=text).items()
        assert again.value == bound.value


def pretend(assignment: Assignment) -> float:
    """A divergence to which the layers matter differently, which the additive errors do not know."""
    errors = [o.error for o in NETWORK.chosen(assignment)]
    return errors[0] ** 2 + 8 * errors[1] ** 2 + errors[2] ** 2


BOUNDS: dict[CostName, float] = {"flops": 200.0, "params": 250.0}


def take_part(path: Path | str, problem: Problem, evaluate: Evaluate, *, deadline: float | None = None) -> list[Trial]:
    with Ledger.open(path, "test", objectives=objectives(problem.bounds), facts=problem.facts()) as ledger:
        *_, found = run_study(problem, evaluate, ledger, deadline=deadline)
    return list(found.values())


def trials_of(path: Path, count: int, seed: int = 0) -> list[Trial]:
    return take_part(path, Problem(NETWORK, BOUNDS, trials=count, seed=seed), lambda a, _: Evaluation(pretend(a)))


def test_studies_that_are_killed_come_to_the_same_trials(tmp_path: Path) -> None:
    whole = trials_of(tmp_path / "whole", 16)
    problem, left = Problem(NETWORK, BOUNDS, trials=16), [0]

    def killed(assignment: Assignment, _: Sequence[Trial]) -> Evaluation:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return Evaluation(pretend(assignment))

    for until in (0, 1, 3, 5):
        left = [until]
        with pytest.raises(KeyboardInterrupt):
            take_part(tmp_path / "parts", problem, killed)
    assert trials_of(tmp_path / "parts", 16) == whole
    assert [t.index for t in whole] == list(range(16))
    assert trials_of(tmp_path / "other", 16, seed=1) != whole


def test_trials_of_the_search_stay_within_the_budget(tmp_path: Path) -> None:
    problem = Problem(NETWORK, BOUNDS, trials=20, spread=0.0)
    trials = take_part(tmp_path / "study", problem, lambda a, _: Evaluation(pretend(a)))
    assert all(t.feasible for t in trials if t.source == "search")
    assert all(t.costs["flops"] <= 200 and t.costs["params"] <= 250 for t in trials if t.feasible)
    assert {t.source for t in trials} == {"knapsack", "search"}
    assert any(not t.feasible for t in trials), "some starts show the front beyond the budget"


def random_network(seed: int, layers: int = 8, options: int = 12) -> Network:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        kept = np.sort(rng.uniform(0.05, 1, options - 1))[::-1]
        errors = np.sqrt(np.exp(-4 * kept) * rng.uniform(0.7, 1.4, options - 1))
        whole = int(rng.integers(500, 2000))
        cheaper = [(int(k * whole), int(k * whole), float(e)) for k, e in zip(kept, errors, strict=True)]
        rows.append([(whole, whole, 0.0), *cheaper])
    return tables(rows)


def test_the_last_trials_lean_to_layers_of_cheap_weights(tmp_path: Path) -> None:
    network = random_network(1)
    # A weight of the first four layers costs nine times as much.
    dear = [
        replace(t, options=tuple(replace(o, flops=9 * o.flops) for o in t.options)) if i < 4 else t
        for i, t in enumerate(network.tables)
    ]
    network = replace(
        network, tables=tuple(dear), original={**network.original, "flops": 5 * network.original["flops"]}
    )
    problem = Problem(network, {"flops": 0.5 * network.original["flops"]}, trials=16, leanings=(-1.0, 0.0, 1.0))
    compared: dict[Assignment, int] = {}

    def evaluate(assignment: Assignment, rivals: Sequence[Trial]) -> Evaluation:
        compared[assignment] = len(rivals)
        return Evaluation(sum(assignment) + 1.0)

    trials = take_part(tmp_path / "study", problem, evaluate)
    assert [t.source for t in trials].count("leaning") == 3
    assert [problem.leaning(t.index) for t in trials[-4:]] == [None, -1.0, 0.0, 1.0]
    assert any(compared.values())
    new = [t.assignment for t in trials[-3:] if t.assignment not in {s.assignment for s in trials[:-3]}]
    assert new
    assert not any(compared[a] for a in new), "they are not given up for what is better before the fit"
    assert all(t.feasible for t in trials[-3:])
    spent = [sum(o.flops for o in network.chosen(t.assignment)[:4]) for t in trials[-3:]]
    assert spent[0] >= spent[1] >= spent[2] < spent[0]
    assert Problem.from_facts(network, problem.facts()).facts() == problem.facts()
    # Where there are few trials the starts come first.
    assert [Problem(network, problem.bounds, trials=8, leanings=(1.0, 2.0)).leaning(i) for i in (6, 7)] == [None, 2.0]


def test_a_network_that_leans_is_measured_to_the_end_though_it_was_given_up_before(tmp_path: Path) -> None:
    problem = Problem(NETWORK, BOUNDS, trials=12, leanings=(0.0,))
    given_up: list[Assignment] = []

    def evaluate(assignment: Assignment, rivals: Sequence[Trial]) -> Evaluation:
        if rivals:
            given_up.append(assignment)
        return Evaluation(pretend(assignment), pruned=bool(rivals))

    trials = take_part(tmp_path / "study", problem, evaluate)
    assert trials[-1].source == "leaning"
    assert trials[-1].assignment in given_up
    assert not trials[-1].pruned


def test_errors_lean_by_the_weights_that_a_flop_buys() -> None:
    network = tables([[(100, 100, 0.0), (60, 50, 0.1)], [(400, 100, 0.0), (120, 60, 0.05)], [(800, 50, 0.0)]])
    errors = [np.array([0.0, 1.0]), np.array([0.0, 3.0]), np.array([0.0])]
    np.testing.assert_allclose(np.concatenate(leaned(errors, network, 0.5)), [0, 2, 0, 3, 0])
    np.testing.assert_allclose(np.concatenate(leaned(errors, network, 0.0)), np.concatenate(errors))


def test_a_share_of_the_trials_looks_for_the_front_beside_the_budget(tmp_path: Path) -> None:
    network = random_network(1)
    problem = Problem(network, {"flops": 0.5 * network.original["flops"]}, trials=20, spread=1.0)
    trials = take_part(tmp_path / "study", problem, lambda a, _: Evaluation(sum(a) + 1.0))
    levels = [problem.level_of(t.costs) for t in trials if t.source == "search"]
    assert min(levels) < -0.2
    assert max(levels) > 0.2


@settings(max_examples=30, deadline=None)
@given(st.floats(-1, 1))
def test_a_level_is_the_lowest_whose_bounds_are_met(level: float) -> None:
    problem = Problem(NETWORK, BOUNDS, trials=1)
    bounds = problem.bounds_at(level)
    assert problem.level_of(bounds) == pytest.approx(level, abs=1e-9)
    assert problem.level_of(bounds | {"params": bounds["params"] - 1}) == pytest.approx(level, abs=1e-9)


def test_a_cost_that_nothing_can_lower_says_nothing_of_a_level() -> None:
    """Such as a peak that is set by what stays; under a budget above the original's there are levels."""
    peak = Problem(NETWORK, {"peak_activation_bytes": 1e9}, trials=1).least["peak_activation_bytes"]
    bounds: dict[CostName, float] = {"flops": BOUNDS["flops"], "peak_activation_bytes": peak}
    alone, both = Problem(NETWORK, {"flops": bounds["flops"]}, trials=1), Problem(NETWORK, bounds, trials=1)
    assert both.least["peak_activation_bytes"] == peak
    for level in (-1.0, -0.3, 0.0, 0.7):
        assert both.level_of(both.bounds_at(level)) == pytest.approx(alone.level_of(alone.bounds_at(level)))
    original = NETWORK.unchanged("peak_activation_bytes")
    above = Problem(NETWORK, {"peak_activation_bytes": 1.2 * original}, trials=1)
    assert above.level_of({"peak_activation_bytes": 1.5 * original}) == pytest.approx(0.25)
    assert above.level_of({"peak_activation_bytes": 1.1 * original}) < 0


def test_gaps_of_a_front_are_filled_from_the_largest() -> None:
    gaps = Gaps([(0.0, 1.0), (-0.5, 7.0), (0.1, 2.0), (0.5, 1 / 3)])  # the third is dominated
    # In octaves of 1 + divergence: 3.9 at the least, 3 at -0.5, 1 at the budget, 0.4 at 0.5, and 0 at the original.
    assert [gaps.fill() for _ in range(3)] == [-0.25, -0.75, 0.25]
    assert Gaps([]).fill() == 0.0


def test_trials_teach_the_weights_of_layers(tmp_path: Path) -> None:
    """Layers matter up to four times as much as the tables say: the search comes close to who knows by how much."""
    gains = []
    for seed in range(4):
        network = random_network(seed)
        true = 2.0 ** np.random.default_rng(100 + seed).uniform(-2, 2, len(network.tables))
        errors = [w * e for w, e in zip(true, additive_errors(network), strict=True)]

        def divergence(assignment: Assignment, errors: list[Any] = errors) -> float:
            return float(sum(e[i] for e, i in zip(errors, assignment, strict=True)) ** 1.3)

        problem = Problem(network, {"flops": 0.5 * network.original["flops"]}, trials=40, seed=seed)
        trials = take_part(tmp_path / str(seed), problem, lambda a, _, f=divergence: Evaluation(f(a)))  # type: ignore[misc]
        ideal = divergence(problem.solve(0.0, errors).assignment)
        start = divergence(problem.solve(0.0, problem.errors).assignment)
        gains.append((start - best_feasible(trials, 1)[0].divergence) / (start - ideal))
    assert np.mean(gains) > 0.6, gains


def test_a_generation_does_not_repeat_itself_or_what_was_tried(tmp_path: Path) -> None:
    problem = Problem(random_network(0), {"flops": 4000.0}, trials=24)
    trials = take_part(tmp_path / "study", problem, lambda a, _: Evaluation(sum(a) + 1.0))
    assert len({t.assignment for t in trials}) == 24


def test_what_was_evaluated_is_not_evaluated_again(tmp_path: Path) -> None:
    calls: list[Assignment] = []

    def counted(assignment: Assignment, _: Sequence[Trial]) -> Evaluation:
        calls.append(assignment)
        return Evaluation(pretend(assignment), partial=(1.0, 2.0))

    trials = take_part(tmp_path / "study", Problem(NETWORK, BOUNDS, trials=60), counted)
    later = [a for g in range(15) for a in {t.assignment for t in trials[4 * g : 4 * g + 4]}]
    assert len(trials) == 60
    assert len(calls) < len(later)
    assert all(t.partial == (1.0, 2.0) for t in trials)


def test_a_trial_knows_the_cheaper_ones_it_has_to_beat(tmp_path: Path) -> None:
    def evaluate(assignment: Assignment, rivals: Sequence[Trial]) -> Evaluation:
        flops = NETWORK.cost(assignment, "flops")
        assert all(r.costs["flops"] <= flops and not r.pruned for r in rivals)
        return Evaluation(pretend(assignment), pruned=bool(rivals))

    trials = take_part(tmp_path / "study", Problem(NETWORK, BOUNDS, trials=16), evaluate)
    pruned = {t.assignment for t in trials if t.pruned}
    assert pruned
    assert not pruned & {t.assignment for t in [*pareto_trials(trials, ["flops"]), *best_feasible(trials, 9)]}


def test_a_deadline_ends_a_study_with_its_best_so_far(tmp_path: Path) -> None:
    problem = Problem(NETWORK, BOUNDS, trials=16)
    trials = take_part(tmp_path / "study", problem, lambda a, _: Evaluation(pretend(a)), deadline=time.monotonic() - 1)
    assert len(trials) == 1
    assert best_feasible(trials, 1) == trials
    assert trials_of(tmp_path / "study", 16) == trials, "a study that is over stays over"


def test_a_deadline_waits_for_a_trial_within_the_budget(tmp_path: Path) -> None:
    """Whoever comes second may get a looser start first."""
    problem = Problem(NETWORK, BOUNDS, trials=16, starts=(0.5, 0.3, 0.0))
    trials = take_part(tmp_path / "study", problem, lambda a, _: Evaluation(pretend(a)), deadline=time.monotonic() - 1)
    assert [t.feasible for t in trials] == [False, False, True]


@pytest.mark.parametrize("divergence", [math.nan, math.inf])
@pytest.mark.parametrize("storage", ["sqlite:///{}.db", "{}.journal"])
def test_networks_that_overflow_are_worse_than_all_others(tmp_path: Path, divergence: float, storage: str) -> None:
    problem = Problem(NETWORK, BOUNDS, trials=16)

    def evaluate(assignment: Assignment, _: Sequence[Trial]) -> Evaluation:
        broken = sum(assignment) % 2 == 0
        return Evaluation(divergence, partial=(divergence,)) if broken else Evaluation(pretend(assignment))

    trials = take_part(storage.format(tmp_path / "study"), problem, evaluate)
    broken = [t for t in trials if sum(t.assignment) % 2 == 0]
    assert len(trials) == 16
    assert broken
    assert all(t.pruned and math.isfinite(t.divergence) for t in broken)
    assert not {t.assignment for t in broken} & {t.assignment for t in best_feasible(trials, 16)}


def test_joining_another_study_is_refused(tmp_path: Path) -> None:
    trials_of(tmp_path / "study", 4)
    with pytest.raises(StorageError, match="different: seed"):
        trials_of(tmp_path / "study", 4, seed=1)


def test_front_of_trials_is_not_dominated(tmp_path: Path) -> None:
    trials = trials_of(tmp_path / "study", 14)
    kept = pareto_trials(trials, ["flops", "params"])
    points = np.array([[t.divergence, t.costs["flops"], t.costs["params"]] for t in trials])
    for trial in kept:
        own = np.array([trial.divergence, trial.costs["flops"], trial.costs["params"]])
        assert not any((p <= own).all() and (p < own).any() for p in points)


def test_the_memory_format_of_the_tables_moves_latencies_but_not_budgets() -> None:
    """What the original takes in the tables' format is where savings start; budgets are multiples of its own."""
    options = tuple(
        Option(f"s{i}", "sekron", "0", "factored", 10, 10, 4, error=float(i), weight_error=0.0, latency_ms=ms)
        for i, ms in enumerate((6.0, 2.0))
    )
    network = Network((LayerTable("a", options),), {"flops": 10, "latency_ms": 10.0}, latency_drift=1.2)
    assert network.cost((0,), "latency_ms") == network.unchanged("latency_ms") == pytest.approx(12.0)
    assert network.cost((1,), "latency_ms") == pytest.approx(8.0)
    assert network.unchanged("flops") == 10
    assert Budget.of({"latency_ms": "0.9x"}).resolve(network.original) == {"latency_ms": 9.0}

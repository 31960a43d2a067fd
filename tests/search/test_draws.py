from __future__ import annotations

import numpy as np
import pytest

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.draws import draw_assignment
from sekron_search.search.knapsack import additive_errors, solve_knapsack
from sekron_search.search.options import Assignment, LayerTable, Network, Option


def network(layers: int = 6) -> Network:
    """Layers whose options trade flops for errors along the same curve."""
    shares = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12)
    tables = tuple(
        LayerTable(
            f"layer{n}",
            tuple(
                Option(
                    f"s{i}",
                    "dense" if i == 0 else "other",
                    "0",
                    "factored",
                    flops=int(1000 * share),
                    params=int(10 * share),
                    peak_bytes=1,
                    weight_error=(1 - share) ** 2,
                    error=(1 - share) ** 2,
                )
                for i, share in enumerate(shares)
            ),
        )
        for n in range(layers)
    )
    return Network(tables, {"flops": 1000.0 * layers, "params": 10.0 * layers})


def draws(level: float, count: int = 20, seed: int = 0) -> list[Assignment]:
    net = network()
    found: list[Assignment] = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        found.append(draw_assignment(net, {"flops": level * net.original["flops"]}, rng, found))
    return found


def test_draws_meet_their_bounds_nearly_use_them_and_are_distinct() -> None:
    net = network()
    found = draws(0.5)
    assert len(set(found)) == len(found)
    costs = [net.cost(a, "flops") / net.original["flops"] for a in found]
    assert max(costs) <= 0.5
    assert min(costs) > 0.4
    assert draws(0.5) == found
    assert draws(0.5, seed=1) != found


def test_draws_are_spread_in_quality_but_not_by_much() -> None:
    """All are worse than the best, some clearly; none is as bad as what ignores the errors."""
    net = network()
    errors = additive_errors(net)

    def error(assignment: Assignment) -> float:
        return float(sum(e[i] for e, i in zip(errors, assignment, strict=True)))

    bound = {"flops": 0.5 * net.original["flops"]}
    best = solve_knapsack(net, bound, errors).error  # type: ignore[arg-type]
    worst = error((6, 6, 6, 0, 0, 0))
    ratios = [error(a) / best for a in draws(0.5)]
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) > 1.2
    assert max(ratios) * best < worst


def test_where_few_networks_meet_the_bounds_a_draw_may_repeat() -> None:
    net = network(1)
    rng = np.random.default_rng(0)
    only = (6,)
    assert draw_assignment(net, {"flops": 130.0}, rng, [only]) == only
    with pytest.raises(InfeasibleBudgetError, match="no choice of structures"):
        draw_assignment(net, {"flops": 100.0}, rng)

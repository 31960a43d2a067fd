"""The front of the additive problem: what the least error is at every level of the budgets, and what more would buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import KnapsackSolution, best_reachable, solve_knapsack
from sekron_search.search.options import Network

#: Levels from the original to the least that can be reached, both included.
LEVELS = 40

#: By how much a bound is loosened to see what that buys, and how exact the errors are of which the difference is taken.
STEP, STEP_GAP = 0.01, 1e-4


@dataclass(frozen=True)
class FrontPoint:
    """A point of the front.

    Args:
        tightened: The costs that were bounded.
        level: 0 is the network with no layer replaced, 1 the least that can be reached of each.
        solution: The assignment, its additive error and the proven bound of it.
        costs: Of the assignment, all that are known.
    """

    tightened: tuple[CostName, ...]
    level: float
    solution: KnapsackSolution
    costs: Mapping[CostName, float]


def additive_front(
    network: Network,
    errors: Sequence[NDArray[np.float64]],
    names: Sequence[CostName],
    *,
    levels: int = LEVELS,
    relative_gap: float = 1e-3,
) -> list[FrontPoint]:
    """The least additive error from the costs with no layer replaced to the cheapest that can be had.

    Args:
        network: Tables and costs.
        errors: Additive error of every option of every layer.
        names: Costs that are tightened, all together and, where there are several, each alone.
        levels: Number of levels; those that no assignment meets are left out.
        relative_gap: How close to the best every point is proven to be.
    """
    least = best_reachable(network, names)
    sets = [tuple(names), *((name,) for name in names if len(names) > 1)]
    points = []
    for tightened in sets:
        for level in np.linspace(0, 1, levels):
            # At the ends the very costs, not what rounding makes of them.
            bounds = {
                n: least[n] if level == 1 else network.unchanged(n) + level * (least[n] - network.unchanged(n))
                for n in tightened
            }
            try:
                solution = solve_knapsack(network, bounds, errors, relative_gap=relative_gap)
            except InfeasibleBudgetError:  # the cheapest of one cost need not be that of another
                break
            points.append(FrontPoint(tightened, float(level), solution, network.costs(solution.assignment)))
    return points


def marginal_gains(
    network: Network, errors: Sequence[NDArray[np.float64]], bounds: Mapping[CostName, float], *, step: float = STEP
) -> tuple[KnapsackSolution, dict[CostName, float]]:
    """The best under the bounds, and by how much less its error were if one of them were looser by a share of it.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds.
    """

    def best(bounds: Mapping[CostName, float]) -> KnapsackSolution:
        return solve_knapsack(network, bounds, errors, relative_gap=STEP_GAP)

    base = best(bounds)
    looser = {name: best({**bounds, name: bound * (1 + step)}).error for name, bound in bounds.items()}
    return base, {name: max(base.error - error, 0.0) for name, error in looser.items()}

"""Random assignments at given budgets: near the front, but spread in quality and unlike each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import curvature_errors, solve_knapsack
from sekron_search.search.options import Assignment, Network

#: Errors of layers, and of options, are multiplied by up to two to this power, or divided.
LAYER_OCTAVES, OPTION_OCTAVES = 2.0, 1.0

#: The knapsack need not be exact: its errors are random anyway.
GAP = 0.01

#: Draws until an assignment is new.
ATTEMPTS = 20


def draw_assignment(
    network: Network,
    bounds: Mapping[CostName, float],
    rng: np.random.Generator,
    known: Collection[Assignment] = (),
) -> Assignment:
    """The knapsack's solution for errors by the curvature with a random multiplier per layer and per option.

    Not for those with responses: proxies that know these are to be judged by what they had no part in.

    Args:
        network: Tables and fixed costs.
        bounds: Absolute bound of every budgeted cost of the whole network.
        rng: Of the multipliers.
        known: Assignments to be avoided, as long as few draws suffice for that.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds.
    """
    curved = curvature_errors(network)
    for _ in range(ATTEMPTS):
        errors = [
            e * 2 ** (rng.uniform(-LAYER_OCTAVES, LAYER_OCTAVES) + rng.uniform(-OPTION_OCTAVES, OPTION_OCTAVES, len(e)))
            for e in curved
        ]
        assignment = solve_knapsack(network, bounds, errors, relative_gap=GAP).assignment
        if assignment not in known:
            break
    return assignment

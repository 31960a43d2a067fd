"""One option per layer under several budgets, for an additive error: a multiple-choice knapsack (scipy's HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.budget import COSTS, CostName
from sekron_search.search.options import Assignment, Network

_INFEASIBLE = 2  # scipy.optimize.milp's status


@dataclass(frozen=True)
class KnapsackSolution:
    """An assignment, its additive error, and a proven lower bound of that error."""

    assignment: Assignment
    error: float
    lower_bound: float


def additive_errors(network: Network) -> list[NDArray[np.float64]]:
    """The squared relative output error of every option of every layer, by how sensitive the network is to it."""
    known = [table.sensitivity for table in network.tables if table.sensitivity is not None]
    # Relative to their mean: the solver's tolerances are absolute, and the mean stands for what is not known.
    mean = float(np.mean(known)) if known else 1.0
    weights = [1.0 if table.sensitivity is None else table.sensitivity / mean for table in network.tables]
    return [
        weight * np.array([o.error**2 for o in table.options])
        for weight, table in zip(weights, network.tables, strict=True)
    ]


def solve_knapsack(
    network: Network,
    bounds: Mapping[CostName, float],
    errors: Sequence[NDArray[np.float64]],
    *,
    relative_gap: float = 1e-3,
    time_limit_s: float = 10.0,
) -> KnapsackSolution:
    """The assignment of least total error whose costs stay within the bounds.

    Args:
        network: Tables and fixed costs.
        bounds: Absolute bound of every budgeted cost of the whole network.
        errors: Error of every option of every layer; they are added up.
        relative_gap: Stop when the solution is proven that close to the best.
        time_limit_s: Stop with the best found so far.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds together; carries the best reachable per cost.
    """
    counts = [len(table.options) for table in network.tables]
    owner = np.repeat(np.arange(len(counts)), counts)
    columns = np.arange(len(owner))
    constraints = [LinearConstraint(csr_array((np.ones(len(owner)), (owner, columns))), 1, 1)]
    upper = np.ones(len(owner))
    for name, bound in bounds.items():
        values = np.concatenate(network.values(name))
        if name == "peak_activation_bytes":
            outside = np.repeat([table.outside_bytes for table in network.tables], counts)
            upper[outside + values > bound] = 0
            if network.peak_floor_bytes > bound:
                upper[:] = 0
            continue
        room = bound - network.fixed(name)
        scale = max(abs(room), float(values.max()), 1e-12)  # well-scaled rows: HiGHS has absolute tolerances
        constraints.append(LinearConstraint(values[None, :] / scale, -np.inf, room / scale))
    result = milp(
        np.concatenate(errors),
        constraints=constraints,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, upper),
        options={"mip_rel_gap": relative_gap, "time_limit": time_limit_s},
    )
    if result.x is None:
        if result.status == _INFEASIBLE:
            raise infeasible(network, bounds)
        raise InfeasibleBudgetError(f"HiGHS found no assignment in {time_limit_s:g} s: {result.message}", {})
    starts = np.cumsum([0, *counts[:-1]])
    assignment = tuple(int(np.argmax(result.x[s : s + n])) for s, n in zip(starts, counts, strict=True))
    error = float(sum(e[i] for e, i in zip(errors, assignment, strict=True)))
    return KnapsackSolution(assignment, error, float(result.mip_dual_bound))


def best_reachable(network: Network, names: Sequence[CostName]) -> dict[CostName, float]:
    """For every cost, the least that any assignment reaches, each on its own."""
    reached: dict[CostName, float] = {}
    for name in names:
        values = network.values(name)
        reached[name] = network.cost(tuple(int(np.argmin(v)) for v in values), name)
    return reached


def infeasible(network: Network, bounds: Mapping[CostName, float]) -> InfeasibleBudgetError:
    """The error that says what was asked and what can be had."""
    best = best_reachable(network, list(bounds))
    lines = [
        f"{name}: asked at most {bound:.6g}, best reachable {best[name]:.6g} "
        f"({best[name] / network.original[name]:.3g}x of the original; {COSTS[name]})"
        for name, bound in bounds.items()
    ]
    together = "" if any(best[n] > b for n, b in bounds.items()) else " together, though each alone could be met"
    return InfeasibleBudgetError(
        f"no choice of structures meets the budgets{together}. " + "; ".join(lines) + ". Loosen the budget, or allow a "
        "wider search space (more families, smaller ranks)",
        {str(name): value for name, value in best.items()},
    )

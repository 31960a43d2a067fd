"""One option per layer under several budgets, for an additive error: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.budget import COSTS, CostName
from sekron_search.search.multiple_choice import MultipleChoice, solve
from sekron_search.search.options import Assignment, Network

#: Noise of latencies, relative to them, from which on it may be why a budget is out of reach.
NOISY = 0.1


@dataclass(frozen=True)
class KnapsackSolution:
    """An assignment, its additive error, and a proven lower bound of that error."""

    assignment: Assignment
    error: float
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far it may be from the best, relative to its error."""
        return gap(self.error, self.lower_bound)


def gap(error: float, lower_bound: float) -> float:
    """How far an additive error may be from the least, relative to it."""
    return max((error - lower_bound) / error, 0.0) if error > 0 else 0.0


def additive_errors(network: Network) -> list[NDArray[np.float64]]:
    """What the knapsack adds up, of every option of every layer.

    Where responses were measured, the geometric mean of `curvature_errors` and of them. The curvature is that of small
    errors in the original network and knows no saturation; a response is measured with all other layers unharmed, and
    saturates too early. Solutions for their mean diverge less than for either: much less at loose budgets, and at tight
    ones on average.
    """
    curved = curvature_errors(network)
    known = [table.responses for table in network.tables if table.errors.any()]
    if not all(known):
        return curved
    # Relative to what does not change when options are left out: the layers' last responses.
    unit = float(np.mean([responses[-1][1] for responses in known])) if known else 1.0
    return [np.sqrt(own * t.response_to(t.errors) / unit) for own, t in zip(curved, network.tables, strict=True)]


def curvature_errors(network: Network) -> list[NDArray[np.float64]]:
    """The squared relative output error of every option of every layer, by how sensitive the network is to it."""
    known = [table.sensitivity for table in network.tables if table.sensitivity is not None]
    # Relative to their mean: the solver's tolerances are absolute, and the mean stands for what is not known.
    mean = float(np.mean(known)) if known else 1.0
    weights = [1.0 if table.sensitivity is None else table.sensitivity / mean for table in network.tables]
    return [weight * table.errors**2 for weight, table in zip(weights, network.tables, strict=True)]


def additive_error(errors: Sequence[NDArray[np.float64]], assignment: Assignment) -> float:
    """Of an assignment: what its options' errors add up to."""
    return float(sum(own[i] for own, i in zip(errors, assignment, strict=True)))


def solve_knapsack(
    network: Network,
    bounds: Mapping[CostName, float],
    errors: Sequence[NDArray[np.float64]],
    *,
    relative_gap: float = 1e-3,
    time_limit_s: float = inf,
) -> KnapsackSolution:
    """The assignment of least total error whose costs stay within the bounds.

    Args:
        network: Tables and fixed costs.
        bounds: Absolute bound of every budgeted cost of the whole network.
        errors: Error of every option of every layer; they are added up.
        relative_gap: Stop when the solution is proven that close to the best.
        time_limit_s: Stop with the best found so far; its lower bound tells how good that is. Without a limit the
            solution is the same on every machine; the work has bounds of its own.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds together; carries the best reachable per cost.
    """
    counts = np.array([len(table.options) for table in network.tables])
    owner = np.repeat(np.arange(len(counts)), counts)
    allowed = np.ones(len(owner), dtype=bool)
    rows, room = [], []
    for name, bound in bounds.items():
        values = np.concatenate(network.values(name))
        if name == "peak_activation_bytes":  # no sum: every layer has to meet it alone
            outside = np.repeat([table.outside_bytes for table in network.tables], counts)
            allowed &= (outside + values <= bound) & (network.peak_floor_bytes <= bound)
            continue
        left = bound - network.fixed(name)
        scale = max(abs(left), float(values.max()), 1e-12)
        rows.append(values / scale)
        room.append(left / scale)
    kept = np.flatnonzero(allowed)
    found = None
    if len(np.unique(owner[kept])) == len(counts):
        costs = np.array(rows).reshape(len(rows), len(owner))[:, kept]
        problem = MultipleChoice(np.concatenate(errors)[kept], costs, np.array(room), owner[kept])
        found = solve(problem, relative_gap, time_limit_s)
    if found is None:
        raise infeasible(network, bounds)
    starts = np.cumsum(counts) - counts
    assignment = tuple(int(i) for i in kept[found.options] - starts)
    return KnapsackSolution(assignment, found.error, found.lower_bound)


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
    noise = _latency_noise(network) if "latency_ms" in bounds else 0.0
    noisy = f"; latencies are uncertain by {noise:.0%}: measured anew, on an idle machine, more may be in reach"
    return InfeasibleBudgetError(
        f"no choice of structures meets the budgets{together}. " + "; ".join(lines) + ". Loosen the budget, or allow a "
        "wider search space (more families, smaller ranks)" + (noisy if noise > NOISY else ""),
        {str(name): value for name, value in best.items()},
    )


def _latency_noise(network: Network) -> float:
    """Median noise of the options' latencies, relative to them."""
    options = [option for table in network.tables for option in table.options]
    found = [o.latency_noise_ms / o.latency_ms for o in options if o.latency_ms and o.latency_noise_ms is not None]
    return float(np.median(found)) if found else 0.0

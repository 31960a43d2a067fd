"""What a search is asked: the tables, the bounds, and how far from them it looks for the front."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import KnapsackSolution, additive_errors, best_reachable, solve_knapsack
from sekron_search.search.options import Network

#: Levels of the budget at which the knapsack's own solutions start a search: 0 is the budget, 1 the original's costs,
#: -1 the least that can be reached. The looser and tighter ones show the front around the budget.
START_LEVELS = (0.0, -0.1, 0.15, -0.25, 0.35, 0.6, -0.5)


@dataclass(frozen=True)
class Problem:
    """A search over assignments of one option per layer.

    Args:
        network: Tables and original costs.
        bounds: Absolute bounds of the budgeted costs.
        trials: Number of trials in all, the knapsack's starts included.
        seed: Of what is drawn.
        generation: Trials that are drawn from the same earlier ones, so that workers can share them: whatever their
            number, the trials are the same.
        spread: Share of the trials that are drawn at other levels than the budget, for the front.
        starts: Levels of the budget of the first trials, which are the knapsack's own solutions.
        leanings: Of the last trials, all at the budget: how much more they spend on layers whose weights cost few flops
            than errors say, which count times (weights per flop)^leaning. Weights make up for errors of other layers in
            the fit of the whole network and in training, of which divergences before them show nothing.
    """

    network: Network
    bounds: Mapping[CostName, float]
    trials: int
    seed: int = 0
    generation: int = 4
    spread: float = 0.25
    starts: Sequence[float] = START_LEVELS
    leanings: Sequence[float] = ()

    @cached_property
    def errors(self) -> list[NDArray[np.float64]]:
        """The additive error of every option of every layer."""
        return additive_errors(self.network)

    @cached_property
    def least(self) -> dict[CostName, float]:
        """The least that can be reached of every budgeted cost, each on its own."""
        return best_reachable(self.network, list(self.bounds))

    def bounds_at(self, level: float) -> dict[CostName, float]:
        """The bounds at a level: 0 is the budget, 1 that of no layer replaced, -1 the least in reach."""

        def step(cost: CostName, bound: float) -> float:
            return max(self.network.unchanged(cost) - bound, 0.0) if level > 0 else max(bound - self.least[cost], 0.0)

        return {cost: bound + level * step(cost, bound) for cost, bound in self.bounds.items()}

    def level_of(self, costs: Mapping[Any, float]) -> float:
        """The lowest level whose bounds a network of these costs meets."""
        levels = []
        for cost, bound in self.bounds.items():
            above = costs[cost] > bound
            step = self.network.unchanged(cost) - bound if above else bound - self.least[cost]
            if step > 0:
                levels.append((costs[cost] - bound) / step)
            elif above:  # of a budget that lets the network grow
                levels.append(costs[cost] / bound - 1)
            # Else nothing can be lower than the budget: it says nothing of how tight a network is.
        return max(levels, default=0.0)

    def solve(
        self, level: float, errors: Sequence[NDArray[np.float64]], *, relative_gap: float = 1e-3
    ) -> KnapsackSolution:
        """The assignment of least total error at a level of the budget.

        Args:
            level: 0 is the budget, 1 the costs with no layer replaced, -1 the least that can be reached.
            errors: Of every option of every layer.
            relative_gap: How close to the best the solution is proven to be.

        Raises:
            InfeasibleBudgetError: If no assignment meets the budget itself.
        """
        try:
            return solve_knapsack(self.network, self.bounds_at(level), errors, relative_gap=relative_gap)
        except InfeasibleBudgetError:
            # Tighter than the budget may be too tight for several costs at once.
            return solve_knapsack(self.network, self.bounds, errors, relative_gap=relative_gap)

    def leaning(self, slot: int) -> float | None:
        """Of a trial, by its number; None if it is drawn or a start."""
        last = slot - (self.trials - len(self.leanings))
        return self.leanings[last] if last >= 0 and slot >= len(self.starts) else None

    def slots(self, generation: int) -> range:
        """The trials of a generation."""
        start = generation * self.generation
        return range(start, min(start + self.generation, self.trials))

    @property
    def num_generations(self) -> int:
        """Of how many generations the search consists."""
        return -(-self.trials // self.generation)

    @classmethod
    def from_facts(cls, network: Network, facts: Mapping[str, Any]) -> Problem:
        """The search that another process has told of, on the tables that are here: compare `facts` to be sure."""
        names = ("bounds", "trials", "seed", "generation", "spread", "starts", "leanings")
        told = {name: facts[name] for name in names}
        return cls(replace(network, latency_scale=facts["latency_scale"]), **told)

    def facts(self) -> dict[str, Any]:
        """What every process that shares the search has to agree on, as plain data."""
        tables = json.dumps([asdict(table) for table in self.network.tables], sort_keys=True)
        return {
            "bounds": dict(self.bounds),
            "trials": self.trials,
            "seed": self.seed,
            "generation": self.generation,
            "spread": self.spread,
            "starts": list(self.starts),
            "leanings": list(self.leanings),
            "latency_scale": self.network.latency_scale,
            "tables": hashlib.sha256(tables.encode()).hexdigest()[:16],
        }

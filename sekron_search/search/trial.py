"""Finished trials of a search, and which of them count. Plain records: nothing here knows where they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sekron_search.search.budget import CostName
from sekron_search.search.options import Assignment
from sekron_search.search.pareto import front

#: Source of trials whose networks spend more on layers of cheap weights than errors say; see `Problem.leanings`.
LEANING = "leaning"


@dataclass(frozen=True)
class Evaluation:
    """What the evaluation of a network gave.

    Args:
        divergence: Of its outputs from the original's; extrapolated if it was pruned.
        partial: On every batch that it has seen.
        pruned: Whether it was given up before it had seen all, for it was behind a cheaper network.
    """

    divergence: float
    partial: tuple[float, ...] = ()
    pruned: bool = False


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Args:
        index: Its number in the study.
        assignment: Option of every layer.
        divergence: Of the assembled network's outputs from the original's.
        costs: Predicted costs of the whole network.
        feasible: Whether they are within the budgets.
        source: "knapsack" for a start, `LEANING` for one that leans to cheap weights, else "search".
        lower_bound: Of the additive error at the trial's budget level, where it is a start.
        partial, pruned: As of its evaluation.
    """

    index: int
    assignment: Assignment
    divergence: float
    costs: Mapping[str, float]
    feasible: bool
    source: str
    lower_bound: float | None = None
    partial: tuple[float, ...] = ()
    pruned: bool = False

    @property
    def evaluation(self) -> Evaluation:
        """What its evaluation gave."""
        return Evaluation(self.divergence, self.partial, self.pruned)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "assignment": list(self.assignment), "partial": list(self.partial)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Inverse of `to_json`."""
        return cls(**{**data, "assignment": tuple(data["assignment"]), "partial": tuple(data["partial"])})


def pareto_trials(trials: Sequence[Trial], costs: Sequence[CostName]) -> list[Trial]:
    """The trials that no other one dominates on divergence and these costs, feasible or not; distinct assignments.

    Of equal ones the first by number, in whatever order they come.
    """
    trials = sorted((t for t in trials if not t.pruned), key=lambda t: t.index)
    return [trials[i] for i in front([[t.divergence, *(t.costs[c] for c in costs)] for t in trials])]


def best_feasible(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The `count` distinct feasible assignments of least divergence."""
    chosen: dict[Assignment, Trial] = {}
    for trial in sorted((t for t in trials if t.feasible and not t.pruned), key=lambda t: (t.divergence, t.index)):
        chosen.setdefault(trial.assignment, trial)
    return list(chosen.values())[:count]

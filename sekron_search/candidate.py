"""What the search finds: networks, fitted and measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sekron_search.choice import Judged
from sekron_search.files import read_json
from sekron_search.search.budget import Budget, CostName
from sekron_search.search.options import Assignment, Network
from sekron_search.search.trial import Trial

#: Standard error of the median of n normal samples, in halves of their interquartile range over the root of n.
MEDIAN_NOISE = 1.86


@dataclass(frozen=True)
class Candidate:
    """A network of the search, fitted and measured; its weights lie in its folder.

    Args:
        assignment: Option of every layer.
        trial: Index of the trial it comes from.
        divergence: Of its outputs from the original's.
        divergence_before_sequential_fit: As the search saw it.
        predicted: Costs of the whole network from the tables.
        costs: Costs of the whole network, measured.
        original: Those of the original, measured beside it: relative budgets are relative to these, for clocks drift.
        base_latency_ms: Of the original in the memory format of the candidate, measured beside it.
        metric: For choosing, on the validation data.
    """

    assignment: Assignment
    trial: int
    divergence: float
    divergence_before_sequential_fit: float
    predicted: Mapping[str, float]
    costs: Mapping[str, float]
    original: Mapping[str, float]
    base_latency_ms: float
    metric: float | None

    def excess(self, budget: Budget) -> float:
        """The largest ratio of a cost, as measured, to its bound: the budget is met if it is at most 1."""
        return max(self.ratio(name, budget) for name in budget.names)

    def ratio(self, name: CostName, budget: Budget) -> float:
        """Of a cost to its bound; a measured latency counts with its uncertainty, for it will be measured again."""
        cost = self.costs[name]
        if name == "latency_ms" and (samples := self.costs["latency_samples"]):
            cost += MEDIAN_NOISE * self.costs["latency_noise_ms"] / samples**0.5
        return cost / budget.resolve(self.original)[name]

    @property
    def latency_share(self) -> float:
        """The measured latency, of the original's in the same memory format."""
        return self.costs["latency_ms"] / self.base_latency_ms

    @classmethod
    def load(cls, folder: Path) -> Candidate:
        """Read its record."""
        data = read_json(folder / "candidate.json")
        return cls(**{**data, "assignment": tuple(data["assignment"])})


@dataclass(frozen=True)
class Searched:
    """What the search gave.

    Args:
        trials: All of the round.
        candidates: The best, measured.
        network: The tables with the calibration that was in force.
        excess: Of the candidate that is nearest to the budget; see `Candidate.excess`.
    """

    trials: list[Trial]
    candidates: list[Candidate]
    network: Network
    excess: float


@dataclass(frozen=True, eq=False)
class Finished:
    """A candidate that was fine-tuned, as far as that went, or as it was before.

    Args:
        candidate: As it was before.
        curve: Epoch, loss and metric of every epoch.
        network: Itself.
        judged: On the validation data, or the hold-out; None if not yet.
        diverged: What ended the training, if the loss became NaN or infinite; what was trained is that of the epoch
            before.
        as_fitted: Whether the network is as it was before.
        training: `how_trained` of it.
    """

    candidate: Candidate
    curve: list[dict[str, float]]
    network: nn.Module
    judged: Judged | None = None
    diverged: str | None = None
    as_fitted: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> float | None:
        """On the validation data; None if there is none for it."""
        return None if self.judged is None else self.judged.metric

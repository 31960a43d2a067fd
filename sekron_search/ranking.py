"""Rank correlation of a proxy with what it foretells, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

Floats = NDArray[np.float64]

#: Resamples of the candidates for a confidence interval.
RESAMPLES = 500

#: Share of the resamples that lies in the interval.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RankCorrelation:
    """Kendall's tau-b: 1 if two rankings agree on every pair, 0 if on no more pairs than chance, -1 if on none.

    Args:
        tau: Over all candidates.
        low, high: The interval that holds `CONFIDENCE` of the resampled taus.
        within: By group, over the group's candidates; the order in which groups come first.
    """

    tau: float
    low: float
    high: float
    within: dict[str, float]

    @property
    def mean_within(self) -> float:
        """Over the groups: what is left when the groups themselves are easily told apart."""
        return float(np.mean(list(self.within.values())))


def kendall(x: Sequence[float] | Floats, y: Sequence[float] | Floats) -> float:
    """Kendall's tau-b; 0 if one of the two is the same for all, for then it ranks nothing.

    Source: Kendall 1945, The Treatment of Ties in Ranking Problems.
    """
    tau = float(kendalltau(x, y).statistic) if len(x) > 1 else float("nan")
    return tau if np.isfinite(tau) else 0.0


def rank_correlation(
    x: Sequence[float] | Floats, y: Sequence[float] | Floats, groups: Sequence[str], *, seed: int = 0
) -> RankCorrelation:
    """How well two rankings of the same candidates agree.

    Args:
        x, y: A value per candidate.
        groups: The group of every candidate, such as its budget: resamples keep the size of every group.
        seed: Of the resamples.

    Source: Efron 1979, Bootstrap Methods (percentile intervals), stratified by the groups.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    members = {group: np.array([i for i, g in enumerate(groups) if g == group]) for group in dict.fromkeys(groups)}
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([rng.choice(own, size=len(own)) for own in members.values()])
        drawn.append(kendall(a[chosen], b[chosen]))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    within = {group: kendall(a[own], b[own]) for group, own in members.items()}
    return RankCorrelation(kendall(a, b), float(low), float(high), within)

"""Which assignments are worth a trial: the knapsack under errors that earlier trials have corrected.

The knapsack's additive errors say nearly how much an option hurts, but not quite: layers count differently, and errors
of layers add up to more or less than their sum. So every trial corrects them: the divergence of a network is, up to a
power, the sum of the additive errors of its options, each times a weight of its layer and one of its own, unknown but
near 1. Under a normal prior the weights have a normal posterior; a draw from it, given to the knapsack, is the next
trial. So every trial meets its bounds and lies near the front, what is not known is tried, and what is good is used.

Source: Thompson 1933; as Bayesian linear regression with a knapsack inside, Russo et al. 2018, A Tutorial on Thompson
Sampling, Sec. 4.2 (online combinatorial problems).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sekron_search.search.options import Assignment, Network
from sekron_search.search.pareto import front
from sekron_search.search.problem import Problem
from sekron_search.search.trial import LEANING, Trial

Floats = NDArray[np.float64]

#: Standard deviations of the weights of a layer and of an option, before any trial: additive errors of layers are off
#: by a factor of up to two, those of the options of one layer rank them nearly always right.
LAYER_DEVIATION, OPTION_DEVIATION = 0.5, 0.2

#: Relative error of the whole model, which no weight explains.
NOISE = 0.05

#: How bold a draw is, as a multiple of the posterior's deviation; drawn for each trial. 0 is the posterior's mean.
BOLDNESS = (0.1, 0.3, 0.6)

#: No weight gets smaller: an option of no error would be chosen whatever it does.
LEAST_WEIGHT = 0.05

#: How close to the best the knapsack answers a draw, which is random anyway.
DRAW_GAP = 0.005

#: Draws until an assignment is new.
ATTEMPTS = 8


@dataclass(frozen=True)
class Proposal:
    """What a trial shall evaluate.

    Args:
        assignment: Option of every layer.
        source: "knapsack" for a start, `LEANING` for one that leans to layers of cheap weights, else "search".
        lower_bound: Of the additive error at a start's level of the budget.
    """

    assignment: Assignment
    source: str
    lower_bound: float | None = None


def propose(problem: Problem, history: Sequence[Trial], slots: Sequence[int]) -> list[Proposal]:
    """What the trials of a generation shall evaluate: the same for whoever asks.

    Args:
        problem: The search.
        history: All trials of earlier generations.
        slots: Of the generation, in order.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds.
    """
    tried = {trial.assignment for trial in history}
    model = WeightModel(problem.errors, history)
    gaps = Gaps([(problem.level_of(trial.costs), trial.divergence) for trial in history])
    found: list[Proposal] = []
    for slot in slots:
        if slot < len(problem.starts):
            solution = problem.solve(problem.starts[slot], problem.errors)
            found.append(Proposal(solution.assignment, "knapsack", solution.lower_bound))
        elif (leaning := problem.leaning(slot)) is not None:
            assignment = problem.solve(0.0, leaned(model.mean(), problem.network, leaning)).assignment
            found.append(Proposal(assignment, LEANING))
        else:
            rng = np.random.default_rng([problem.seed, slot])
            beside = rng.random() < problem.spread
            level = gaps.fill() if beside else 0.0
            for attempt in range(ATTEMPTS):
                # Gaps are filled with what is known to be good. What was tried already is left by bolder draws.
                boldness = float(rng.choice(BOLDNESS)) * (1 + attempt / 2) * (attempt > 0 or not beside)
                drawn = model.draw(rng, boldness)
                assignment = problem.solve(level, drawn, relative_gap=DRAW_GAP).assignment
                if assignment not in tried:
                    break
            found.append(Proposal(assignment, "search"))
        tried.add(found[-1].assignment)
    return found


def leaned(errors: Sequence[Floats], network: Network, leaning: float) -> list[Floats]:
    """Errors of every option of every layer, times the weights that a flop buys in the original layer, to a power."""
    originals = [table.options[0] for table in network.tables]
    weights = np.array([max(o.params, 1) / max(o.flops, 1) for o in originals])
    factors = (weights / np.exp(np.log(weights).mean())) ** leaning
    return [own * factor for own, factor in zip(errors, factors, strict=True)]


class Gaps:
    """Where a front of (level of the budget, divergence) is coarse.

    Between two neighbours of the front lies, at most, the rectangle that they span: a trial halfway between them gains
    part of it. Divergences count on a scale that is linear below that of the first trial, at the budget, and
    logarithmic above it: else networks that are good for nothing would take all trials. The original stands at one
    end, at level 1.

    Args:
        points: (level, divergence) of trials.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        ends = [(1.0, 0.0)]
        if points:
            # Nobody knows what the least that can be reached diverges by: twice as much as the cheapest trial.
            level, divergence = min(points)
            ends.append((min(-1.0, level), 2 * divergence))
        unit = max(points[0][1] if points else 1.0, 1e-12)
        known = [(level, float(np.log1p(divergence / unit))) for level, divergence in (*points, *ends)]
        self._points = [known[i] for i in front(known)]

    def fill(self) -> float:
        """The level in the middle of the largest gap, which counts as filled from now on."""
        if len(self._points) < 2:
            return 0.0
        areas = [(b[0] - a[0]) * (a[1] - b[1]) for a, b in pairwise(self._points)]
        widest = int(np.argmax(areas))
        (low, worse), (high, better) = self._points[widest : widest + 2]
        level = (low + high) / 2
        self._points.insert(widest + 1, (level, (worse + better) / 2))
        return level


class WeightModel:
    """The posterior of the weights of all layers and options, given trials.

    Args:
        errors: Additive error of every option of every layer.
        trials: What was found; those of no divergence or no error say nothing.
    """

    def __init__(self, errors: Sequence[Floats], trials: Sequence[Trial]) -> None:
        self._errors = np.concatenate(errors)
        self._cuts = np.cumsum([len(e) for e in errors])[:-1]
        self._layer = np.repeat(np.arange(len(errors)), [len(e) for e in errors])
        starts = np.concatenate([[0], self._cuts]).astype(int)
        rows, divergences = [], []
        for trial in {t.assignment: t for t in trials}.values():
            row = np.zeros(len(self._errors))
            chosen = starts + np.array(trial.assignment)
            row[chosen] = self._errors[chosen]
            if row.sum() > 0 and trial.divergence > 0:
                rows.append(row)
                divergences.append(trial.divergence)
        shares, residuals = _relative(np.array(rows).reshape(-1, len(self._errors)), np.array(divergences))
        by_layer = np.zeros((len(shares), len(errors)))
        np.add.at(by_layer.T, self._layer, shares.T)
        # Coordinates in which the prior is standard normal: weights of layers first, then those of options.
        self._features = np.hstack([LAYER_DEVIATION * by_layer, OPTION_DEVIATION * shares])
        self._residuals = residuals
        covariance = self._features @ self._features.T + NOISE**2 * np.eye(len(residuals))
        self._solver = np.linalg.inv(covariance)

    def mean(self) -> list[Floats]:
        """The errors of every option of every layer, corrected by the posterior's mean."""
        return self.draw(np.random.default_rng(0), 0.0)

    def draw(self, rng: np.random.Generator, boldness: float) -> list[Floats]:
        """The errors of every option of every layer, corrected by weights drawn from the posterior.

        Args:
            rng: Of the draw.
            boldness: Multiple of the posterior's deviation; 0 gives its mean.
        """
        prior = boldness * rng.standard_normal(self._features.shape[1])
        noise = boldness * NOISE * rng.standard_normal(len(self._residuals))
        # A draw from the prior, moved by how it misses the data, is one from the posterior (Matheron's rule).
        missed = self._residuals - self._features @ prior - noise
        unit = prior + self._features.T @ (self._solver @ missed)
        layers = len(self._cuts) + 1
        weights = 1 + LAYER_DEVIATION * unit[:layers][self._layer] + OPTION_DEVIATION * unit[layers:]
        return np.split(np.maximum(weights, LEAST_WEIGHT) * self._errors, self._cuts)


def _relative(rows: Floats, divergences: Floats) -> tuple[Floats, Floats]:
    """The share of every option in what a trial's additive errors should add up to, and what the shares lack to 1.

    Divergences grow like a power of the sum: power and scale are those of the least squares of the logarithms.
    """
    if not len(rows):
        return rows, divergences
    totals, logs = np.log(rows.sum(1)), np.log(divergences)
    centered = totals - totals.mean()
    spread = float(centered @ centered)
    # Trials at one level say nothing of the power; it is between linear and quadratic in the squared errors.
    power = float(np.clip(centered @ logs / spread, 1.0, 2.0)) if spread > 0.1 else 1.0
    explained = logs / power
    explained = np.exp(explained - explained.mean() + totals.mean())
    shares = rows / explained[:, None]
    return shares, 1 - shares.sum(1)

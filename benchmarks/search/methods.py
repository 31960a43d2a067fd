"""The ways to search that are compared: each is told what its trials gave, and asked for the next."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler

from sekron_search.search.knapsack import additive_errors, curvature_errors
from sekron_search.search.ledger import Ledger
from sekron_search.search.options import Assignment, Network
from sekron_search.search.problem import START_LEVELS, Problem
from sekron_search.search.study import objectives, run_study
from sekron_search.search.trial import Evaluation

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

#: Divergence of an assignment's network.
Measure = Callable[[Assignment], float]

#: Assignments in the order in which they were tried.
Method = Callable[[Problem, Measure, int], Iterator[Assignment]]

Sampler = Callable[[int], BaseSampler]
SAMPLERS: dict[str, Sampler] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "TPE": lambda seed: TPESampler(seed=seed, multivariate=True),
    "NSGA-II": lambda seed: NSGAIISampler(seed=seed, population_size=32),
    "NSGA-III": lambda seed: NSGAIIISampler(seed=seed, population_size=32),
    "GP": lambda seed: GPSampler(seed=seed, deterministic_objective=True),
}


def raw(sampler: str, *, started: bool) -> Method:
    """A choice per layer, its options in the order of their flops; divergence and flops are both minimised.

    Args:
        sampler: One of Optuna's.
        started: Whether the first trials are the knapsack's solutions that our search starts from.
    """

    def search(problem: Problem, measure: Measure, trials: int) -> Iterator[Assignment]:
        orders = [np.argsort(values, kind="stable") for values in problem.network.values("flops")]
        names = [table.name for table in problem.network.tables]
        space: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(order) - 1) for name, order in zip(names, orders, strict=True)
        }
        study = optuna.create_study(directions=["minimize"] * 2, sampler=SAMPLERS[sampler](problem.seed))
        for assignment in _starts(problem) if started else ():
            places = (int(np.flatnonzero(order == i)[0]) for order, i in zip(orders, assignment, strict=True))
            study.enqueue_trial(dict(zip(names, places, strict=True)))
        for _ in range(trials):
            trial = study.ask(space)
            chosen = tuple(int(order[trial.params[name]]) for name, order in zip(names, orders, strict=True))
            study.tell(trial, [measure(chosen), problem.network.cost(chosen, "flops")])
            yield chosen

    return search


def multipliers(sampler: str, *, groups: bool = False, octaves: float = 1.5) -> Method:
    """A multiplier of the additive errors per layer, or per group of layers, and a level; the knapsack does the rest.

    Args:
        sampler: One of Optuna's.
        groups: One multiplier for all layers of a module of the network.
        octaves: How far multipliers reach up and down.
    """

    def search(problem: Problem, measure: Measure, trials: int) -> Iterator[Assignment]:
        names = [t.name.split(".")[0] if groups else t.name for t in problem.network.tables]
        space: dict[str, BaseDistribution] = {
            "level": FloatDistribution(-1, 1),
            **{name: FloatDistribution(-octaves, octaves) for name in names},
        }
        study = optuna.create_study(directions=["minimize"] * 2, sampler=SAMPLERS[sampler](problem.seed))
        for level in START_LEVELS:
            study.enqueue_trial({"level": level, **dict.fromkeys(names, 0.0)})
        for _ in range(trials):
            trial = study.ask(space)
            errors = [2.0 ** trial.params[name] * e for name, e in zip(names, problem.errors, strict=True)]
            chosen = problem.solve(trial.params["level"], errors).assignment
            study.tell(trial, [measure(chosen), problem.network.cost(chosen, "flops")])
            yield chosen

    return search


def swaps(problem: Problem, measure: Measure, trials: int) -> Iterator[Assignment]:
    """One or two layers of a good network take a near option; the knapsack repairs the level with few other changes."""
    rng = np.random.default_rng(problem.seed)
    orders = [np.argsort(values, kind="stable") for values in problem.network.values("flops")]
    found: dict[Assignment, tuple[float, float]] = {}
    starts = list(_starts(problem))
    for number in range(trials):
        level = float(rng.uniform(-1, 1))
        if number < len(starts):
            chosen = starts[number]
        else:
            bound = problem.bounds_at(level)["flops"]
            cheaper = [a for a, (_, flops) in found.items() if flops <= bound] or list(found)
            best = min(cheaper, key=lambda a: found[a][0])
            chosen = problem.solve(level, _moved(problem, best, orders, rng)).assignment
        found[chosen] = measure(chosen), problem.network.cost(chosen, "flops")
        yield chosen


def _moved(
    problem: Problem, best: Assignment, orders: Sequence[np.ndarray], rng: np.random.Generator
) -> list[np.ndarray]:
    total = sum(float(e[i]) for e, i in zip(problem.errors, best, strict=True))
    stickiness = float(rng.choice([0.005, 0.02, 0.05])) * total
    errors = [e + stickiness * (np.arange(len(e)) != i) for e, i in zip(problem.errors, best, strict=True)]
    for layer in rng.choice(len(errors), size=int(rng.integers(1, 3)), replace=False):
        place = int(np.flatnonzero(orders[layer] == best[layer])[0]) + int(rng.choice([-2, -1, 1, 2]))
        forced = orders[layer][int(np.clip(place, 0, len(orders[layer]) - 1))]
        errors[layer] = np.where(np.arange(len(errors[layer])) == forced, 0.0, errors[layer] + 1e3 * total)
    return errors


def knapsack(errors: Callable[[Network], Sequence[np.ndarray]]) -> Method:
    """The knapsack's own solutions at as many levels as there are trials: what trials have to improve on.

    Args:
        errors: What the knapsack adds up.
    """

    def search(problem: Problem, measure: Measure, trials: int) -> Iterator[Assignment]:
        own = errors(problem.network)
        for level in [*START_LEVELS, *np.linspace(-1, 1, max(trials - len(START_LEVELS), 0))][:trials]:
            chosen = problem.solve(float(level), own).assignment
            measure(chosen)
            yield chosen

    return search


def ours(problem: Problem, measure: Measure, trials: int) -> Iterator[Assignment]:
    """The search of this package."""
    seen = 0
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study.journal"
        names = objectives(problem.bounds)
        with Ledger.open(journal, "benchmark", objectives=names, facts=problem.facts()) as ledger:
            for found in run_study(problem, lambda assignment, _: Evaluation(measure(assignment)), ledger):
                for slot in sorted(found)[seen:]:
                    yield found[slot].assignment
                seen = len(found)


def _starts(problem: Problem) -> Iterator[Assignment]:
    for level in START_LEVELS:
        yield problem.solve(level, problem.errors).assignment


#: Methods by name, and of how many trials each gets. Those on the raw space get ten times as many as ours needs.
METHODS: dict[str, tuple[Method, int]] = {
    "ours": (ours, 100),
    "knapsack alone": (knapsack(additive_errors), 100),
    "knapsack without responses": (knapsack(curvature_errors), 100),
    "NSGA-II": (raw("NSGA-II", started=False), 500),
    "TPE": (raw("TPE", started=False), 500),
    "random": (raw("random", started=False), 500),
    "NSGA-II, started": (raw("NSGA-II", started=True), 100),
    "NSGA-III, started": (raw("NSGA-III", started=True), 100),
    "TPE, started": (raw("TPE", started=True), 100),
    "GP, started": (raw("GP", started=True), 100),
    "random, started": (raw("random", started=True), 100),
    "multipliers, TPE": (multipliers("TPE"), 100),
    "multipliers, GP": (multipliers("GP"), 100),
    "group multipliers, TPE": (multipliers("TPE", groups=True), 100),
    "swaps": (swaps, 100),
}

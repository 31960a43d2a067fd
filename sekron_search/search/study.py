"""The Optuna study over whole-network assignments. The only module that imports optuna.

A trial is a sensitivity multiplier per layer and a level of the budget; the knapsack turns them into an assignment,
so every trial is feasible for the additive costs and near the front. The trial's value is what the assembled network
really does. Everything a trial needs to be repeated is its number among the finished ones and those before it, so a
study that was killed goes on to the same result: unfinished trials are dropped and drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sekron_search.errors import InfeasibleBudgetError
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import additive_errors, best_reachable, solve_knapsack
from sekron_search.search.options import Assignment, Network
from sekron_search.search.trial import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

SamplerName = Literal["local", "tpe", "nsgaii", "random"]

#: Multipliers reach so many octaves up and down.
OCTAVES = 3.0

#: Levels of the budget at which the knapsack's own solutions start the study: 0 is the budget, 1 the original's
#: costs, -1 the least that can be reached. The looser and tighter ones are there to show the front around the budget.
START_LEVELS = (0.0, -0.1, 0.15, -0.25, 0.35, 0.6, -0.5)

LEVEL = "level"


class LocalSampler(BaseSampler):
    """Moves a few parameters of the best feasible trial at random, by a step that shrinks with the trials.

    Source: a (1+1) evolution strategy with sparse moves, Rechenberg 1973.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters of the earlier trials."""
        best = _best(study)
        return dict(best.distributions) if best is not None else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The best trial's values, some of them moved."""
        best = _best(study)
        if best is None:
            return {}
        moved = self._rng.random(len(search_space)) < max(0.25, 2 / max(len(search_space), 1))
        values = {}
        for (name, distribution), move in zip(sorted(search_space.items()), moved, strict=True):
            assert isinstance(distribution, FloatDistribution)
            value = best.params[name]
            if name == LEVEL:
                value = 0.0
            elif move:
                value += self._rng.normal(0, 0.5)
            values[name] = float(np.clip(value, distribution.low, distribution.high))
        return values

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The middle of the range, before there is a feasible trial."""
        assert isinstance(param_distribution, FloatDistribution)
        return float(np.clip(0.0, param_distribution.low, param_distribution.high))


#: Samplers by name, as functions of a seed.
SAMPLERS: dict[SamplerName, Callable[[int], BaseSampler]] = {
    "local": LocalSampler,
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=8, constant_liar=False),
    "nsgaii": lambda seed: NSGAIISampler(seed=seed, population_size=16),
    "random": lambda seed: RandomSampler(seed=seed),
}


def run_study(
    network: Network,
    bounds: Mapping[CostName, float],
    evaluate: Callable[[Assignment], float],
    *,
    storage: str,
    name: str,
    trials: int,
    seed: int,
    sampler: SamplerName = "local",
) -> Iterator[Trial]:
    """Trials one after the other, those of an earlier, interrupted call first.

    Args:
        network: Tables and original costs.
        bounds: Absolute bounds of the budgeted costs.
        evaluate: Divergence of the assembled network; called once per distinct assignment.
        storage: Optuna storage URL.
        name: Of the study in it.
        trials: Number of trials in all, the knapsack's starts included.
        seed: Of the sampler.
        sampler: Name of the sampler.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds.
    """
    study = _open_study(storage, name, objectives=1 + len(bounds))
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    known: dict[Assignment, float] = {}
    for index, frozen in enumerate(finished):
        trial = _from_frozen(index, frozen)
        known[trial.assignment] = trial.divergence
        yield trial
    errors = additive_errors(network)
    least = best_reachable(network, list(bounds))
    starts = START_LEVELS[: max(trials, 1)]
    for index in range(len(finished), trials):
        study.sampler = SAMPLERS[sampler](seed * 100_003 + index)
        if index < len(starts):
            study.enqueue_trial({LEVEL: starts[index], **{_multiplier(t.name): 0.0 for t in network.tables}})
        asked = study.ask()
        # Only the starts leave the budget: the study's own trials search at it and a little below.
        level = asked.suggest_float(LEVEL, -1.0, 1.0)
        weights = [2.0 ** asked.suggest_float(_multiplier(t.name), -OCTAVES, OCTAVES) for t in network.tables]
        if index >= len(starts):
            level = min(level, 0.0)
        solution = _solve(network, bounds, least, level, [w * e for w, e in zip(weights, errors, strict=True)])
        if solution.assignment not in known:
            known[solution.assignment] = evaluate(solution.assignment)
        costs = network.costs(solution.assignment)
        violations = {cost: costs[cost] / bound - 1 for cost, bound in bounds.items()}
        trial = Trial(
            index=index,
            assignment=solution.assignment,
            divergence=known[solution.assignment],
            costs={cost: float(value) for cost, value in costs.items()},
            feasible=all(v <= 1e-9 for v in violations.values()),
            source="knapsack" if index < len(starts) else sampler,
            lower_bound=solution.lower_bound if index < len(starts) else None,
        )
        for cost, violation in violations.items():
            asked.set_constraint(cost, violation)
        asked.set_user_attr("trial", trial.to_json())
        study.tell(asked, [trial.divergence, *(trial.costs[cost] for cost in bounds)])
        yield trial


def _open_study(storage: str, name: str, objectives: int) -> Study:
    """The study of that name, the trials that a kill left unfinished dropped."""
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * objectives, load_if_exists=True
    )
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()  # takes the waiting ones first; a trial has to run before it can be dropped
    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL)
    return study


class Halving:
    """Successive halving of candidates that are trained one after the other, through Optuna's pruner.

    Lives in memory: it is rebuilt from the recorded curves, so a resumed run decides alike.

    Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning (ASHA).
    """

    def __init__(self) -> None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        self._study = optuna.create_study(direction="maximize", pruner=pruner)
        self._trial = self._study.ask()

    def start(self) -> None:
        """Begin with the next candidate."""
        self._trial = self._study.ask()

    def keep_on(self, epoch: int, metric: float) -> bool:
        """Record the candidate's metric (higher is better) after an epoch (from 1); whether to train on."""
        self._trial.report(metric, epoch)
        return not self._trial.should_prune()


def _solve(
    network: Network,
    bounds: Mapping[CostName, float],
    least: Mapping[CostName, float],
    level: float,
    errors: Sequence[Any],
) -> Any:
    levelled = {
        cost: bound + level * (max(network.original[cost] - bound, 0.0) if level > 0 else bound - least[cost])
        for cost, bound in bounds.items()
    }
    try:
        return solve_knapsack(network, levelled, errors)
    except InfeasibleBudgetError:
        # Tighter than the budget may be too tight for several costs at once; the budget itself is known to be met.
        return solve_knapsack(network, bounds, errors)


def _best(study: Study) -> FrozenTrial | None:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [t for t in done if t.user_attrs["trial"]["feasible"]]
    # Of equals the latest: many points give the same network, and drifting among them finds the ways out.
    return min(feasible, key=lambda t: (t.values[0], -t.number), default=None)


def _from_frozen(index: int, frozen: FrozenTrial) -> Trial:
    return Trial.from_json({**frozen.user_attrs["trial"], "index": index})


def _multiplier(layer: str) -> str:
    return f"log2 weight of {layer}"

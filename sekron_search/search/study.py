"""The study: trials of whole networks, shared by any number of processes, and Optuna's pruner for what is trained.

What a trial evaluates follows from the seed and from the trials of earlier generations alone. So a study that was
killed, or that many workers share, comes to the same trials as one process that was left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite

import optuna

from sekron_search.divergence import ChosenBy
from sekron_search.progress import Reporter
from sekron_search.search.budget import CostName, meets
from sekron_search.search.ledger import Claim, Ledger
from sekron_search.search.options import Assignment
from sekron_search.search.problem import Problem
from sekron_search.search.proposals import Proposal, propose
from sekron_search.search.trial import LEANING, Evaluation, Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: Seconds between looks at what other workers do.
POLL_S = 0.2

#: Divergence of a network, given the trials that it has to beat.
Evaluate = Callable[[Assignment, Sequence[Trial]], Evaluation]


def objectives(bounds: Mapping[CostName, float]) -> list[str]:
    """The names of a trial's values, all minimised."""
    return ["divergence", *bounds]


def run_study(
    problem: Problem, evaluate: Evaluate, ledger: Ledger, *, deadline: float | None = None
) -> Iterator[dict[int, Trial]]:
    """Take part in a study until it is over.

    Args:
        problem: What is searched.
        evaluate: What a trial does.
        ledger: Where the trials are.
        deadline: When to begin no more trials and close the study, as `time.monotonic` counts; not before there is a
            trial within the budget.

    Yields:
        All finished trials by number, whenever there are new ones; at least once.

    Raises:
        InfeasibleBudgetError: If no assignment meets the bounds.
    """
    seen = -1
    proposals: dict[int, list[Proposal]] = {}
    for generation in range(problem.num_generations):
        slots = problem.slots(generation)
        while True:
            finished = ledger.finished()
            if len(finished) > seen:
                seen = len(finished)
                yield finished
            if ledger.closed:
                return
            if {*slots} <= {*finished}:
                break
            late = deadline is not None and time.monotonic() > deadline
            if late and any(t.feasible and not t.pruned for t in finished.values()):
                ledger.close(finished)  # what workers finish later counts neither here nor when the run is gone on with
                return
            claim = ledger.claim(slots)
            if claim is None:
                time.sleep(POLL_S)
                continue
            history = [finished[slot] for slot in range(slots.start)]
            with ledger.working(claim):
                if generation not in proposals:
                    proposals = {generation: propose(problem, history, slots)}
                _do(problem, proposals[generation][claim.slot - slots.start], history, evaluate, ledger, claim)
    ledger.close()


def take_part(
    problem: Problem, evaluate: Evaluate, ledger: Ledger, reporter: Reporter, *, deadline: float | None = None
) -> list[Trial]:
    """Take part in a study as `run_study`, with progress; all trials in the order of their numbers."""
    found: dict[int, Trial] = {}
    with reporter.task("searching", problem.trials) as task:
        for found in run_study(problem, evaluate, ledger, deadline=deadline):
            best = min((t.divergence for t in found.values() if t.feasible and not t.pruned), default=inf)
            task.update(len(found), f"best divergence {best:.4g}")
    return [found[slot] for slot in sorted(found)]


def _do(
    problem: Problem,
    proposal: Proposal,
    history: Sequence[Trial],
    evaluate: Evaluate,
    ledger: Ledger,
    claim: Claim,
) -> None:
    """Evaluate a proposal, unless an earlier trial has, and record it."""
    network, bounds = problem.network, problem.bounds
    costs = {str(cost): float(value) for cost, value in network.costs(proposal.assignment).items()}
    # One that leans may well be behind others before the fit as a whole, for which it is tried: it is never given up.
    leans = proposal.source == LEANING
    known = next((t for t in history if t.assignment == proposal.assignment and not (leans and t.pruned)), None)
    cheaper = [t for t in history if not t.pruned and all(t.costs[cost] <= costs[cost] for cost in bounds)]
    rivals = [] if leans else cheaper
    found = known.evaluation if known is not None else evaluate(proposal.assignment, rivals)
    if not isfinite(found.divergence):
        # Some networks overflow. They are worse than all others, by a number that storages and regressions can take.
        worst = max((t.divergence for t in history), default=1.0)
        found = Evaluation(2 * max(worst, 1.0), pruned=True)
    violations = {str(cost): costs[cost] / bound - 1 for cost, bound in bounds.items()}
    trial = Trial(
        index=claim.slot,
        assignment=proposal.assignment,
        divergence=found.divergence,
        costs=costs,
        feasible=meets(costs, bounds),
        source=proposal.source,
        lower_bound=proposal.lower_bound,
        partial=found.partial,
        pruned=found.pruned,
    )
    structures = {t.name: o.structure for t, o in zip(network.tables, network.chosen(trial.assignment), strict=True)}
    values = [trial.divergence, *(costs[cost] for cost in bounds)]
    ledger.finish(claim, trial, values, violations, structures)


class Halving:
    """Successive halving of candidates that are trained one after the other, through Optuna's pruner.

    Lives in memory: it is rebuilt from the recorded curves, so a resumed run decides alike.

    Args:
        by: "metric" (higher is better) or "divergence" (lower is better), which curves of earlier versions lack.

    Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning (ASHA).
    """

    def __init__(self, by: ChosenBy) -> None:
        self._by = by
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        self._study = optuna.create_study(direction="maximize", pruner=pruner)
        self._trial = self._study.ask()

    def start(self) -> None:
        """Begin with the next candidate."""
        self._trial = self._study.ask()

    def keep_on(self, row: Mapping[str, float]) -> bool:
        """Record the candidate's row of its curve after an epoch; whether to train on."""
        worth = -row["divergence"] if self._by == "divergence" and "divergence" in row else row["metric"]
        self._trial.report(worth, int(row["epoch"]))
        return not self._trial.should_prune()

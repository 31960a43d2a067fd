"""Another budget for a finished run: answered from its tables and trials, without a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sekron_search.catalog import Searched
from sekron_search.errors import ConfigError
from sekron_search.files import write_json
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget, CostName, meets
from sekron_search.search.knapsack import additive_error, additive_errors, gap, solve_knapsack
from sekron_search.search.options import Assignment
from sekron_search.search.record import SearchRecord

if TYPE_CHECKING:
    from sekron_search.job import Job

#: A trial is preferred to the knapsack's own solution, whose divergence nobody measured, up to this multiple of its
#: additive error: additive errors rank networks only so well, and a budget may be far from what the run looked at.
TRUSTED = 1.5

#: What to do where no file describes a run's network.
OBJECTS = (
    "print the answer only (--print-only), or finish the network from the program that has it: "
    'compress(..., out=RUN, resume=True).finish(budget={"flops": "0.4x"})'
)


@dataclass(frozen=True)
class Choice:
    """A network that meets a budget.

    Args:
        source: "trial N", or "knapsack".
        assignment: Option of every layer, of all that were fitted.
        costs: As the tables predict them.
        error: Additive error.
        divergence: Of the outputs from the original's, before any training; None if it was not measured.
    """

    source: str
    assignment: Assignment
    costs: Mapping[CostName, float]
    error: float
    divergence: float | None


@dataclass(frozen=True)
class Selection:
    """The answer to a budget.

    Args:
        record: What was searched.
        budget, bounds: What is asked, and as absolute bounds.
        chosen: The answer.
        others: What else meets the budget: the knapsack's solution, the best trial.
        reason: Why the answer is the chosen one.
        lower_bound: Of the additive error under the budget.
    """

    record: SearchRecord
    budget: Budget
    bounds: Mapping[CostName, float]
    chosen: Choice
    others: tuple[Choice, ...]
    reason: str
    lower_bound: float

    @property
    def gap(self) -> float:
        """How far the additive error of the answer may be from the best, relative to it."""
        return gap(self.chosen.error, self.lower_bound)

    @property
    def name(self) -> str:
        """For a folder."""
        return "_".join(f"{name}-{bound}" for name, bound in self.budget.items())

    def to_json(self) -> dict[str, Any]:
        """The answer as plain data."""
        return {
            "budget": {name: str(bound) for name, bound in self.budget.items()},
            "bounds": dict(self.bounds),
            "original": {name: float(value) for name, value in self.record.network.original.items()},
            "chosen": self._choice_json(self.chosen),
            "others": [self._choice_json(choice) for choice in self.others],
            "reason": self.reason,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "searched_for": list(self.record.budgeted),
            "structures": {
                table.name: {"structure": option.structure, "family": option.family, "execution": option.execution}
                for table, option in zip(
                    self.record.network.tables, self.record.network.chosen(self.chosen.assignment), strict=True
                )
            },
        }

    @staticmethod
    def _choice_json(choice: Choice) -> dict[str, Any]:
        values = {"error": choice.error, "divergence": choice.divergence, "assignment": list(choice.assignment)}
        return {"source": choice.source, "costs": dict(choice.costs), **values}


def select(folder: RunFolder, budget: Budget) -> Selection:
    """What a run that has searched says to a budget: the best of its trials, and the knapsack over all its options.

    Args:
        folder: The run folder.
        budget: What is asked; multiples are of the original's costs.

    Raises:
        RunFolderError: If the folder holds no run that has searched.
        ConfigError: If latency is asked for and the run knows none.
        InfeasibleBudgetError: If no choice of structures meets the budget; carries the best that can be reached.
    """
    searched = Searched.load(folder)
    record, network = searched.record, searched.record.network
    if "latency_ms" in budget.names and not network.has_latency:
        raise ConfigError(
            f"budget.latency_ms: the run in {folder.path} measured no latencies of options, for it had no latency "
            "budget; start a run that has one"
        )
    bounds = budget.resolve(network.original)
    errors = additive_errors(network)
    solution = solve_knapsack(network, bounds, errors)

    def choice(source: str, assignment: Assignment, divergence: float | None) -> Choice:
        error = additive_error(errors, assignment)
        return Choice(source, assignment, network.costs(assignment), error, divergence)

    trials = [
        choice(f"trial {trial.index}", trial.assignment, trial.divergence)
        for trial in searched.trials
        if not trial.pruned
    ]
    own = next((t for t in trials if t.assignment == solution.assignment), None)
    knapsack = replace(own or choice("knapsack", solution.assignment, None), source="knapsack")
    fitting = [t for t in trials if meets(t.costs, bounds)]
    best = min(fitting, key=lambda t: (t.divergence, t.error), default=None)
    chosen, reason = _better(best, knapsack)
    others = tuple(c for c in (best, knapsack) if c is not None and c is not chosen)
    return Selection(record, budget, bounds, chosen, others, reason, solution.lower_bound)


def with_network(
    folder: RunFolder, selection: Selection, reporter: Reporter, out: Path | None = None, job: Job | None = None
) -> Selection:
    """Write the answer's network, not fine-tuned, where `load` opens it, with a `selection.json` beside it.

    The knapsack's solution is measured first, so that divergences decide what the answer is.

    Args:
        folder: The run folder.
        selection: The answer.
        reporter: Told of the progress.
        out: Folder to write to; by default one in the run's `selections/`, named after the budget.
        job: The run's; by default what its configuration describes.

    Returns:
        The answer as it was written.

    Raises:
        RunFolderError: If the run's network was given as an object, or anything changed since the run.
    """
    # These import torch's half of the package, which printing an answer does not need.
    from sekron_search.assembly import Assembler
    from sekron_search.export import save_artefact
    from sekron_search.jobs import job_of_run
    from sekron_search.prepare import prepare_whole
    from sekron_search.runtimes.base import threads
    from sekron_search.timing import own_threads

    job = job or job_of_run(folder, OBJECTS)
    job.model.eval()
    with folder.claimed(job.fingerprint(), resume=True), threads(own_threads(job, folder)):
        tables = prepare_whole(job, folder, reporter)
        selection.record.check_options([f.table.options for f in tables.fitted], folder.network)
        assembler = Assembler(job, tables)
        measured = [
            replace(c, divergence=assembler.evaluate(c.assignment).divergence) if c.divergence is None else c
            for c in (selection.chosen, *selection.others)
        ]
        chosen = min(measured, key=lambda c: c.divergence or 0.0)
        others = tuple(c for c in measured if c is not chosen)
        reason = "the least divergence, as measured" if others else selection.reason
        selection = replace(selection, chosen=chosen, others=others, reason=reason)
        network = assembler.assemble(chosen.assignment)
        home = out or folder.selections / selection.name
        save_artefact(home, network, job.factory, tables.layout.memory_format)
        write_json(home / "selection.json", selection.to_json())
    return selection


def _better(trial: Choice | None, knapsack: Choice) -> tuple[Choice, str]:
    """The better of the best trial and the knapsack's solution, and why."""
    if trial is None:
        return knapsack, "no trial meets the budget: the knapsack's solution, by its additive error"
    if knapsack.divergence is not None:
        if knapsack.divergence <= (trial.divergence or 0.0):
            return knapsack, "the knapsack's solution, which a trial has measured to diverge least"
        return trial, "the trial of least divergence, as measured"
    if trial.error <= TRUSTED * knapsack.error:
        return trial, "the trial of least divergence, as measured"
    return knapsack, (
        f"the knapsack's solution, by its additive error: that of the best trial within the budget is "
        f"{trial.error / knapsack.error:.1f} times as large"
        if knapsack.error > 0
        else "the knapsack's solution, which has no error"
    )

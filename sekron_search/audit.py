"""How far proxies can be trusted: random candidates are scored, trained shortly, and the two rankings compared."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from sekron_search.assembly import Assembler
from sekron_search.errors import ConfigError, DataError, DivergedError, InfeasibleBudgetError, RunFolderError
from sekron_search.files import read_json, write_json
from sekron_search.job import Job
from sekron_search.learning_rate import tuned
from sekron_search.progress import Reporter
from sekron_search.proxies import PROXIES, Judge, Proxy, Subject, score
from sekron_search.ranking import rank_correlation
from sekron_search.references import import_reference
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import with_memory_format
from sekron_search.search.budget import Budget, CostName
from sekron_search.search.draws import draw_assignment
from sekron_search.search.knapsack import solve_knapsack
from sekron_search.search.options import Assignment, Network
from sekron_search.search.problem import Problem
from sekron_search.tensor_files import read_tensors, write_tensors

#: Where no budgets are given: the run's own, and this much of the way from it to the original and to the least that can
#: be reached.
LEVELS = (0.5, 0.0, -0.5)

#: How often a level that is out of reach is halved before it is given up.
HALVINGS = 4


@dataclass(frozen=True)
class Planned:
    """A candidate of the audit: its budget in words, and the option of every layer."""

    budget: str
    assignment: Assignment


def check_audit(job: Job) -> None:
    """Raise an error, before any long work, if an audit is asked for that cannot be made.

    Raises:
        DataError: If there is nothing to train with, or no metric that could be foretold.
        ConfigError: If latency is budgeted for the audit only: options are timed for the run's budget. If a proxy of
            the user's cannot be imported.
    """
    config = job.settings.audit
    if config.candidates == 0:
        return
    for needed, what in ((job.train, "training data"), (job.validate, "validation metric")):
        if needed is None:
            raise DataError(
                f"audit.candidates is {config.candidates}, but there is no {what}: the audit trains candidates and "
                "compares their metrics with what the proxies foretold; give it, or set audit.candidates to 0"
            )
    for reference in config.proxies:
        import_reference(reference, "audit.proxies")
    timed = "latency_ms" in job.settings.bounds.names
    if not timed and any("latency_ms" in budget for budget in config.budgets):
        raise ConfigError(
            "key 'audit.budgets': latency_ms is not part of the run's budget, so no option is timed; add it there, or "
            "leave it out here"
        )


def plan_audit(job: Job, network: Network) -> list[Planned]:
    """The candidates: random ones, as many under every budget; the same for the same settings and tables.

    Raises:
        InfeasibleBudgetError: If a budget cannot be met.
    """
    config = job.settings.audit
    if config.candidates == 0:
        return []
    budgets = _bounds(job, network)
    drawn: list[Planned] = []
    for number in range(config.candidates):
        which = number % len(budgets)
        bounds = budgets[which]
        name = ", ".join(f"{cost} {bound / network.original[cost]:.3g}x" for cost, bound in bounds.items())
        rng = np.random.default_rng([config.seed, which, number])
        assignment = draw_assignment(network, bounds, rng, {p.assignment for p in drawn})
        drawn.append(Planned(name, assignment))
    return drawn


def _bounds(job: Job, network: Network) -> list[dict[CostName, float]]:
    given = job.settings.audit.budgets
    if given:
        return [Budget.of(budget).resolve(network.original) for budget in given]
    problem = Problem(network, job.settings.bounds.resolve(network.original), trials=0)
    return [_reachable(problem, level) for level in LEVELS]


def _reachable(problem: Problem, level: float) -> dict[CostName, float]:
    """The bounds at a level, or halfway to it from the budget, and so on: several costs may not be had together."""
    for _ in range(HALVINGS):
        try:
            solve_knapsack(problem.network, problem.bounds_at(level), problem.errors, relative_gap=1.0)
        except InfeasibleBudgetError:
            level /= 2
        else:
            return problem.bounds_at(level)
    return problem.bounds_at(0.0)


def audit(
    assembler: Assembler, planned: Sequence[Planned], folder: RunFolder, reporter: Reporter
) -> dict[str, Any] | None:
    """Score and train the planned candidates, and say how well every proxy ranked them; None if there are none.

    Every candidate is kept when it is finished, so an audit that was killed goes on where it stopped, to the same
    result.

    Args:
        assembler: Makes the networks.
        planned: From `plan_audit`.
        folder: The run folder; `audit.json` is written into it.
        reporter: Told of the progress.

    Raises:
        RunFolderError: If the folder holds the audit of other candidates.
    """
    if not planned:
        return None
    examiner = Examiner(assembler, folder)
    rows = list(read_json(folder.audit)["candidates"]) if folder.audit.exists() else []
    with reporter.task("auditing proxies", len(planned)) as task:
        for number, candidate in enumerate(planned):
            if number < len(rows):
                examiner.complete(rows[number], candidate)
            else:
                rows.append(examiner.examine(number, candidate))
                write_json(folder.audit, {"candidates": rows})
                shutil.rmtree(folder.audited / str(number), ignore_errors=True)
            task.update(number + 1, f"{rows[number]['metric']:.4f}")
    record = {
        "epochs": assembler.job.settings.audit.epochs,
        "metric_name": assembler.job.settings.metric_name,
        "original_metric": read_json(folder.original)["validation_metric"],
        "train_seconds": float(np.median([row["train_seconds"] for row in rows])),
        "proxies": compare(rows, examiner.judge.proxies),
        "candidates": rows,
    }
    write_json(folder.audit, record)
    return record


def compare(rows: Sequence[Mapping[str, Any]], proxies: Mapping[str, Proxy] = PROXIES) -> list[dict[str, Any]]:
    """How well every proxy ranks candidates by their metric after training.

    Args:
        rows: With the keys budget, scores, seconds and metric.
        proxies: By name.
    """
    found = []
    groups = [row["budget"] for row in rows]
    for name, proxy in proxies.items():
        scores = [-row["scores"][name] for row in rows]
        ranked = rank_correlation(scores, [row["metric"] for row in rows], groups)
        found.append(
            {
                "name": name,
                "label": proxy.label,
                "cheap": proxy.is_cheap,
                **asdict(ranked),
                "mean_within": ranked.mean_within,
                "seconds": float(np.median([row["seconds"][name] for row in rows])),
            }
        )
    return found


class Examiner:
    """Scores and trains a candidate.

    Args:
        assembler: Makes the networks.
        folder: The run folder.
    """

    def __init__(self, assembler: Assembler, folder: RunFolder) -> None:
        self.assembler, self.folder, self.judge = assembler, folder, Judge(assembler)

    def examine(self, number: int, candidate: Planned) -> dict[str, Any]:
        """Everything about a candidate, as plain data."""
        home = self.folder.audited / str(number)
        subject = self.subject(candidate)
        # Written last: where it is, the weights are there too.
        scored = home / "scores.json"
        if not scored.exists():
            scores = score(subject)
            write_tensors(home / "weights.safetensors", dict(subject.fitted.state_dict()))
            write_json(scored, {"scores": scores.values, "seconds": scores.seconds})
        network = self.assembler.skeleton(candidate.assignment)
        network.load_state_dict(read_tensors(home / "weights.safetensors"))
        start = time.perf_counter()
        metric = self._train(network, home)
        return {
            "budget": candidate.budget,
            "assignment": list(candidate.assignment),
            "costs": self.judge.network.costs(candidate.assignment),
            **read_json(scored),
            "train_seconds": time.perf_counter() - start,
            "metric": metric,
        }

    def complete(self, row: dict[str, Any], candidate: Planned) -> None:
        """Add what a record lacks that is older than some proxies; what was trained is not trained again for them.

        Raises:
            RunFolderError: If the record is of another candidate.
        """
        if row["assignment"] != list(candidate.assignment):
            raise RunFolderError(f"{self.folder.audit}: it is of other candidates; delete it to have them audited anew")
        missing = [name for name in self.judge.proxies if name not in row["scores"]]
        added = score(self.subject(candidate), missing)
        row["scores"] |= added.values
        row["seconds"] |= added.seconds

    def subject(self, candidate: Planned) -> Subject:
        """The candidate, for proxies."""
        return Subject(self.judge, candidate.assignment)

    def _train(self, network: nn.Module, home: Path) -> float:
        """The metric after training as the run's candidates are trained, but for the epochs."""
        job = self.assembler.job
        config = job.settings.finetune.model_copy(update={"epochs": job.settings.audit.epochs})
        # One rate for all, of the audit's own: other epochs ask for another one than the run's.
        found = self.folder.audited / "learning_rate.json"
        distillation = tuned(job.distillation_by(config), network.to(job.device), found, Reporter())
        try:
            curve = distillation.train(
                with_memory_format(network, self.assembler.tables.layout.memory_format),
                checkpoint=home / "checkpoint.pt",
                measure=job.measure_in_training,
                after_epoch=lambda row: True,
                progress=lambda done: None,
            )
        except DivergedError as error:  # as in a run: the last good epoch counts, or the network as it was fitted
            curve = error.curve
            if not curve:
                assert job.validate is not None  # see `check_audit`
                network.load_state_dict(read_tensors(home / "weights.safetensors"))
                return job.validate(network)
        return curve[-1]["metric"]

"""Another network of a finished run's search, finished as the run finished its own: no search, no new tables.

The folder that comes out is a run folder whose search is known: `run` does in it what is left of its stages, and goes
on with it after a kill.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from sekron_search.catalog import Searched, finished_report
from sekron_search.config import Config
from sekron_search.errors import ConfigError, RunFolderError, SekronError
from sekron_search.export import load
from sekron_search.files import atomic, read_json, read_yaml, write_json
from sekron_search.job import Job
from sekron_search.jobs import job_of_run
from sekron_search.pick import Pick
from sekron_search.progress import ConsoleReporter, Reporter
from sekron_search.report.verdict import headline, summary
from sekron_search.run import run as run_stages
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget, meets
from sekron_search.search.record import SearchRecord, read_trials, trial_of
from sekron_search.search.trial import Trial
from sekron_search.sections import AuditConfig
from sekron_search.select import select, with_network
from sekron_search.team import Team

#: Source of a trial that is none of the search: what `select` found.
SELECTED = "selection"

#: What to do where no file describes a run's network.
OBJECTS = "finish it from the program that has it: compress(..., out=RUN, resume=True).finish(trial=N)"


@dataclass(frozen=True)
class Result:
    """What `compress` and `finish` give back.

    Args:
        model: The compressed network, loaded from the artefact, in evaluation mode.
        report: The contents of report.json.
        path: The run folder.
        job: Network, data, metrics and settings, from which other networks of the run are finished.
    """

    model: nn.Module
    report: dict[str, Any]
    path: Path
    job: Job = field(repr=False)

    def __repr__(self) -> str:
        return f"Result({str(self.path)!r}: {headline(self.report)} Front of {len(self.front)} networks.)"

    @property
    def front(self) -> list[dict[str, Any]]:
        """The candidates of the Pareto front."""
        front: list[dict[str, Any]] = self.report["front"]
        return front

    def finish(
        self,
        *,
        trial: int | None = None,
        selection: str | None = None,
        budget: Budget | Mapping[str, float | str] | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> Result:
        """Finish another network of the same search: fit, measure, fine-tune, save and report it.

        Called again after a kill, it goes on; after the program has ended, `compress` with `resume=True` and the same
        `out` gives this result again.

        Args:
            trial: Number of a trial of the front, or of any other trial.
            selection: Instead: name of a folder in the run's `selections/`.
            budget: Instead: another budget, answered from the run's trials and tables and kept as a selection.
            out: Run folder of the network; by default in the run's `finished/`.
            progress: Whether to show progress on standard error.

        Raises:
            SekronError: As for `finish_run`; InfeasibleBudgetError if nothing that was searched meets the budget.
        """
        if (trial is None) + (selection is None) + (budget is None) != 2:
            raise ConfigError("finish: name a trial, a selection or a budget, one of the three")
        folder, reporter = RunFolder(self.path), ConsoleReporter() if progress else Reporter()
        if budget is not None:
            selection = _selected_for(folder, Budget.of(budget), reporter, self.job)
        return _result(reporter, *_finish(folder, reporter, self.job, trial=trial, selection=selection, out=out))


def finish(
    run: str | os.PathLike[str],
    *,
    trial: int | None = None,
    selection: str | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Finish another trial of a run than the one it chose: fit, measure, fine-tune, save and report it.

    Called again after a kill, it goes on.

    Args:
        run: Run folder of a finished run whose network and data a configuration describes.
        trial: Number of a trial of its front, or of any other of its trials.
        selection: Instead: name of a folder in the run's `selections/`.
        out: Run folder of the result; by default in the run's `finished/`.
        progress: Whether to show progress on standard error.

    Raises:
        SekronError: As for `finish_run`.
    """
    folder, reporter = RunFolder(run), ConsoleReporter() if progress else Reporter()
    return _result(reporter, *_finish(folder, reporter, None, trial=trial, selection=selection, out=out))


def finish_run(
    folder: RunFolder,
    reporter: Reporter,
    *,
    trial: int | None = None,
    selection: str | None = None,
    out: Path | None = None,
) -> tuple[RunFolder, dict[str, Any]]:
    """The stages of a run that follow its search, for one of its networks, in a run folder of their own.

    The settings are the run's: the fine-tuning, the budget that the result is judged by. A selection is judged by the
    budget that it answers. A learning rate is found anew unless the run trained the network already. The run's audit is
    not repeated.

    Args:
        folder: The finished run.
        reporter: Told of the progress.
        trial: Number of one of its trials.
        selection: Instead: name of a folder in its `selections/`.
        out: Run folder of the result; by default `finished/trial-N` or `finished/` and the selection's name in the run.

    Returns:
        The result's folder and report.

    Raises:
        ConfigError: If not exactly one of trial and selection is given.
        RunFolderError: If the run has not finished, there is no such trial or selection, its network was given as an
            object, network or data changed since, or `out` holds something else.
    """
    target, report, _ = _finish(folder, reporter, None, trial=trial, selection=selection, out=out)
    return target, report


def _finish(
    folder: RunFolder,
    reporter: Reporter,
    job: Job | None,
    *,
    trial: int | None,
    selection: str | None,
    out: str | os.PathLike[str] | None,
) -> tuple[RunFolder, dict[str, Any], Job]:
    """The result's folder and report, and the job that made it: the run's, or what its configuration describes."""
    if (trial is None) == (selection is None):
        raise ConfigError("finish: name a trial or a selection, one of the two")
    finished_report(folder)
    found = _trial_of(folder, trial) if trial is not None else _selected(folder, str(selection))
    target = RunFolder(out or folder.finished / found.name)
    job = _finishing(folder, job or job_of_run(folder, OBJECTS))
    if Team.here().rank == 0:  # of processes that torchrun has started the others only train
        with target.claimed(job.fingerprint(), resume=True):
            _begin(folder, target, found)
    return target, run_stages(job, target, reporter, resume=True), job


def _selected_for(folder: RunFolder, budget: Budget, reporter: Reporter, job: Job) -> str:
    """The name of the selection that answers a budget, made by a team's first process."""
    team, name = Team.here(), None
    if team.rank == 0:
        try:
            name = with_network(folder, select(folder, budget), reporter, job=job).name
        finally:
            team.told(name)  # None if it failed
    elif (name := team.told()) is None:
        raise SekronError("the selection failed in the first process; its message says why")
    return str(name)


def _result(reporter: Reporter, folder: RunFolder, report: dict[str, Any], job: Job) -> Result:
    say_verdict(report, folder, reporter)
    return Result(load(folder.path, model=job.model if job.factory is None else None), report, folder.path, job)


def say_verdict(report: Mapping[str, Any], folder: RunFolder, reporter: Reporter) -> None:
    """The verdict of a finished run, and where its report is; of a team's processes the first one says it."""
    if Team.here().rank == 0:
        for line in (headline(report), *summary(report), f"report: {folder.page}"):
            reporter.say(line)


@dataclass(frozen=True)
class _Found:
    """A network of a run.

    Args:
        name: For a folder.
        pick: Of it.
        record: All options, and no assignment but of all of them.
        trials: The run's, and the network itself where it is none of them.
    """

    name: str
    pick: Pick
    record: SearchRecord
    trials: list[Trial]


def _whole(folder: RunFolder) -> tuple[SearchRecord, list[Trial]]:
    """A run's options and trials, assignments as of all options."""
    found = Searched.load(folder)
    every = tuple(tuple(range(len(table.options))) for table in found.record.network.tables)
    return replace(found.record, searched=every), list(found.trials)


def _trial_of(folder: RunFolder, number: int) -> _Found:
    record, trials = _whole(folder)
    trial_of(trials, number, folder.search)
    own = Pick.of(folder)
    budget = read_yaml(folder.config, f"config {folder.config}")["budget"] if own is None else own.budget
    return _Found(f"trial-{number}", Pick(folder.identity, f"trial {number}", number, budget), record, trials)


def _selected(folder: RunFolder, name: str) -> _Found:
    path = folder.selections / name / "selection.json"
    if not path.exists():
        known = ", ".join(sorted(p.parent.name for p in folder.selections.glob("*/selection.json"))) or "there is none"
        raise RunFolderError(f"run folder {folder.path}: expected one of its selections ({known}), got {name!r}")
    record, trials = _whole(folder)
    data = read_json(path)
    try:
        chosen, budget = data["chosen"], dict(data["budget"])
        assignment, divergence = tuple(chosen["assignment"]), float(chosen["divergence"])
        costs = {str(cost): value for cost, value in record.network.costs(assignment).items()}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunFolderError(
            f"{path}: damaged, or written by an earlier version ({type(error).__name__}: {error}); select it again"
        ) from None
    bounds = Budget.of(budget).resolve(record.network.original)
    trials = [replace(t, feasible=meets(t.costs, bounds)) for t in trials]
    same = next((t for t in trials if t.assignment == assignment and not t.pruned), None)
    if same is None:
        number = 1 + max((t.index for t in trials), default=-1)
        same = Trial(number, assignment, divergence, costs, feasible=meets(costs, bounds), source=SELECTED)
        trials.append(same)
    return _Found(name, Pick(folder.identity, f"selection {name}", same.index, budget), record, trials)


def _finishing(folder: RunFolder, job: Job) -> Job:
    """A job, checked to be the run's, as one that takes its tables and repeats no audit."""
    folder.check(job.fingerprint())
    tables = (job.settings.tables or folder.tables).resolve()
    update = {"tables": tables, "audit": AuditConfig()} | ({"out": None} if isinstance(job.settings, Config) else {})
    return replace(job, settings=job.settings.model_copy(update=update))


def _begin(folder: RunFolder, target: RunFolder, found: _Found) -> None:
    """Put what the run knows into a folder; what is there already stays, so that a killed call is gone on with.

    Raises:
        RunFolderError: If the folder finishes something else.
    """
    known = Pick.of(target)
    if known is not None and known != found.pick:
        raise RunFolderError(
            f"run folder {target.path}: it finishes {known.source} of run {known.run}, not {found.pick.source} of run "
            f"{found.pick.run}; choose another --out"
        )
    if known is None:
        if target.config.exists():
            raise RunFolderError(f"run folder {target.path}: it holds a run with a search of its own; choose another")
        found.pick.save(target)  # first, so that nothing takes the folder for one that has to search
    picked = trial_of(found.trials, found.pick.trial, folder.search)
    if target.search.exists():
        begun = trial_of(read_trials(target.search), found.pick.trial, target.search)
        if begun.assignment != picked.assignment:
            raise RunFolderError(
                f"run folder {target.path}: it finishes another network than {found.pick.source} of run "
                f"{found.pick.run} is now, which was made anew since; choose another --out"
            )
    home = folder.candidates / found.record.network.digest(picked.assignment)
    kept = [folder.layout, folder.original, folder.profile, folder.calibration]
    if (home / "checkpoint.pt").exists():  # begun at that rate; a network that nobody has trained finds its own
        kept.append(folder.learning_rate)
    for path in kept:
        _copy(path, target.path / path.name)
    for name in ("weights.safetensors", "candidate.json", "checkpoint.pt"):
        _copy(home / name, target.candidates / home.name / name)
    if not target.search.exists():
        write_json(target.search, {"trials": [t.to_json() for t in found.trials]})
    if not target.network.exists():
        found.record.save(target.network)


def _copy(source: Path, target: Path) -> None:
    if source.exists() and not target.exists():
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)

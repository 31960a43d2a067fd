"""Run folders as they lie on disk: which there are, how far each came, what it says. Needs neither network nor data."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sekron_search.errors import RunFolderError, SekronError
from sekron_search.files import read_json, read_yaml
from sekron_search.pick import Pick
from sekron_search.rundir import RunFolder
from sekron_search.search.record import SearchRecord, read_trials, trial_of
from sekron_search.search.trial import Trial, pareto_trials

#: Of `report.json`; raised whenever what is read of it changes.
REPORT_FORMAT = 5

State = Literal["finished", "running", "interrupted", "failed", "unreadable"]


@dataclass(frozen=True)
class RunEntry:
    """A run folder in a list.

    Args:
        run: The folder.
        state: What became of it.
        stage: Where it is or was, if it has not finished.
        reason: Why it failed, or cannot be read.
        date: When it began, in ISO 8601.
        budget: What was asked, as text by cost.
        met: Whether every budget is met; None if it has not finished.
        metric_name, metric, original_metric: Of the compressed network and the original, if they were measured.
        finishes: What of another run it finishes, if it does.
    """

    run: str
    state: State
    stage: str | None = None
    reason: str | None = None
    date: str | None = None
    budget: dict[str, str] | None = None
    met: bool | None = None
    metric_name: str | None = None
    metric: float | None = None
    original_metric: float | None = None
    finishes: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def list_runs(folder: Path) -> list[RunEntry]:
    """All run folders in a folder, itself and those inside other runs included, in the order of their paths.

    Raises:
        RunFolderError: If there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder")
    return [_entry(RunFolder(path)) for path in _run_folders(folder)]


def _run_folders(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # links may lead into a circle
    for here, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RunFolder(here).manifest.name in files:
            below[:] = [name for name in below if name == RunFolder(here).finished.name]
            yield Path(here)


def _entry(folder: RunFolder) -> RunEntry:
    name = str(folder.path)
    try:
        folder.read_manifest()
        facts = {"date": _date(folder), **_asked(folder)}
        claimed = folder.is_claimed()  # before the report is looked for, for a run may end in between
        if folder.report.exists():
            return RunEntry(name, "finished", **facts, **_verdict(finished_report(folder)))
        if claimed:
            return RunEntry(name, "running", _stage(folder), **facts)
        if folder.failure.exists():
            return RunEntry(name, "failed", _stage(folder), str(read_json(folder.failure)["message"]), **facts)
        return RunEntry(name, "interrupted", _stage(folder), **facts)
    except (SekronError, OSError, KeyError, TypeError, AttributeError) as error:
        return RunEntry(name, "unreadable", reason=str(error) or type(error).__name__)


def _date(folder: RunFolder) -> str:
    if folder.environment.exists():
        return str(read_json(folder.environment)["date"])
    made = datetime.datetime.fromtimestamp(folder.manifest.stat().st_mtime, datetime.UTC)
    return made.isoformat(timespec="seconds")


def _asked(folder: RunFolder) -> dict[str, Any]:
    pick = Pick.of(folder)
    if pick is not None:
        return {"budget": _texts(pick.budget), "finishes": f"{pick.source} of run {pick.run}"}
    if not folder.config.exists():
        return {}
    return {"budget": _texts(read_yaml(folder.config, f"config {folder.config}")["budget"])}


def _texts(budget: Any) -> dict[str, str]:
    return {str(name): str(bound) for name, bound in budget.items()}


def _verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    found = outcome(report)
    metrics = {"metric": found["compressed"]["metric"], "original_metric": found["original"]["metric"]}
    return {"met": found["met"], "metric_name": found["metric_name"], **metrics}


def _stage(folder: RunFolder) -> str:
    """How far a run came that has not finished, by what lies in its folder."""
    trained = any(folder.candidates.glob("*/checkpoint.pt")) or folder.learning_rate.exists()
    reached = [
        ((folder.compressed / "model.json").exists(), "measuring the result"),
        (folder.pick.exists() and any(folder.candidates.glob("*/candidate.json")), "fine-tuning"),
        (folder.pick.exists(), "fitting the network"),
        (trained or folder.network.exists(), "fine-tuning"),
        (any(folder.candidates.glob("*/candidate.json")), "fitting candidates"),
        (folder.study.exists(), "searching"),
        (folder.original.exists(), "fitting tables"),
    ]
    return next((stage for is_there, stage in reached if is_there), "preparing")


def finished_report(folder: RunFolder) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        RunFolderError: If the folder is no run, has not finished, or its report is of another version.
    """
    if not folder.report.exists():
        folder.read_manifest()
        raise RunFolderError(f"run folder {folder.path}: not a finished run; go on with `run --resume`")
    again = "delete it, and go on with the run by --resume, or use the version that wrote it"
    report = read_json(folder.report, remedy=again)
    if (version := report.get("format")) != REPORT_FORMAT:
        raise RunFolderError(
            f"{folder.report}: written in format {version!r}, this version reads format {REPORT_FORMAT}; {again}"
        )
    return report


def outcome(report: Mapping[str, Any]) -> dict[str, Any]:
    """What came out of a finished run, as plain data: the part of its report that programs are told."""
    kept = ("budgets", "original", "compressed", "metric_name", "metric_without_training", "divergence_name")
    return {
        "met": all(budget["met"] for budget in report["budgets"]),
        **{key: report[key] for key in kept},
        "divergence": report["divergence"],
        "finishes": report.get("finishes"),
    }


@dataclass(frozen=True)
class Searched:
    """What a run has searched.

    Args:
        folder: Of the run.
        record: All options of its layers.
        trials: All trials, assignments as of all options.
        report: None if it has not finished.
    """

    folder: RunFolder
    record: SearchRecord
    trials: tuple[Trial, ...]
    report: dict[str, Any] | None

    @classmethod
    def load(cls, folder: RunFolder) -> Searched:
        """Read it.

        Raises:
            RunFolderError: If the folder is no run, or has not finished its search.
        """
        folder.read_manifest()
        if not folder.network.exists() or not folder.search.exists():
            raise RunFolderError(f"run folder {folder.path}: it has not finished its search; go on with `run --resume`")
        record = SearchRecord.load(folder.network)
        trials = tuple(replace(t, assignment=record.whole(t.assignment)) for t in read_trials(folder.search))
        return cls(folder, record, trials, finished_report(folder) if folder.report.exists() else None)

    def front(self) -> list[dict[str, Any]]:
        """The trials that none beats on divergence and the budgeted costs, by increasing divergence."""
        pick = Pick.of(self.folder)
        costs = self.record.budgeted if pick is None else pick.bounds.names
        found = sorted(pareto_trials(self.trials, costs), key=lambda trial: trial.divergence)
        return [self._trial(trial) for trial in found]

    def trial(self, number: int) -> dict[str, Any]:
        """A trial: predicted costs, divergence, structures, and what was measured if it was a candidate.

        Raises:
            RunFolderError: If there is none of that number.
        """
        return self._with_layers(trial_of(self.trials, number, self.folder.search))

    def candidate(self, name: str) -> dict[str, Any]:
        """The trial that a folder in `candidates/` holds, as `trial`.

        Raises:
            RunFolderError: If there is no such candidate.
        """
        # A later trial may be of the same network as an earlier one, which is the one that was fitted.
        known = {self.record.network.digest(trial.assignment): trial for trial in reversed(self.trials)}
        there = sorted(p.parent.name for p in self.folder.candidates.glob("*/candidate.json") if p.parent.name in known)
        if name not in there:
            raise RunFolderError(
                f"run folder {self.folder.path}: expected one of its candidates ({', '.join(there)}), got {name!r}"
            )
        return self._with_layers(known[name])

    def _trial(self, trial: Trial) -> dict[str, Any]:
        name = self.record.network.digest(trial.assignment)
        fitted = (self.folder.candidates / name / "candidate.json").exists()
        candidates = [] if self.report is None else self.report["candidates"]
        return {
            "trial": trial.index,
            "source": trial.source,
            "divergence": trial.divergence,
            "costs": dict(trial.costs),
            "feasible": trial.feasible,
            "pruned": trial.pruned,
            "chosen": any(c["chosen"] and c["folder"] == name for c in candidates),
            "candidate": name if fitted else None,
        }

    def _with_layers(self, trial: Trial) -> dict[str, Any]:
        facts, network = self._trial(trial), self.record.network
        measured = None
        if facts["candidate"] is not None:
            found = read_json(self.folder.candidates / facts["candidate"] / "candidate.json")
            measured = {key: found[key] for key in ("divergence", "costs", "metric")}
        return {
            **facts,
            "original": {name: float(network.original[name]) for name in trial.costs},
            "measured": measured,
            "layers": [
                {
                    "name": table.name,
                    "structure": option.structure,
                    "family": option.family,
                    "execution": option.execution,
                    "flops": option.flops,
                    "params": option.params,
                    "latency_ms": option.latency_ms,
                    "error": option.error,
                }
                for table, option in zip(network.tables, network.chosen(trial.assignment), strict=True)
            ],
        }

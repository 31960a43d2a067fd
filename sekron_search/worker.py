"""A worker: takes part in the searches of a run that another process began, until the run needs no more."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from sekron_search.assembly import Assembler
from sekron_search.errors import RunFolderError, StorageError
from sekron_search.job import Job
from sekron_search.jobs import job_of_run
from sekron_search.prepare import prepare
from sekron_search.progress import Reporter
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.base import threads
from sekron_search.search.artifacts import Artifacts
from sekron_search.search.ledger import Ledger
from sekron_search.search.problem import Problem
from sekron_search.search.searches import RUN, Search, searches
from sekron_search.search.storage import Store, open_store
from sekron_search.search.study import take_part
from sekron_search.timing import own_threads

#: Seconds between looks for a search that has begun.
POLL_S = 1.0


def work(
    folder: RunFolder, reporter: Reporter, *, storage: str | None, artifacts: str | None, patience_s: float
) -> int:
    """Evaluate trials of a run's searches until the run searches no more, or no search begins for too long.

    Args:
        folder: The run folder. What it lacks comes from the artifacts.
        reporter: Told of the progress.
        storage: URL of the storage that the run was given; by default the run folder's own journal.
        artifacts: Folder or URL of the artifacts that the run was given, if any.
        patience_s: How long to wait for a search to begin.

    Returns:
        How many trials this worker has finished.

    Raises:
        StorageError: If no search begins in time, storage or artifacts cannot be reached, or the tables here are not
            those of the search.
        RunFolderError: If there is not all that a worker needs, or network or data are others than the run's.
    """
    waiting = _Searches(folder, storage, reporter, patience_s)
    assembler: Assembler | None = None
    done = 0
    try:
        for ledger in waiting:
            if assembler is None:
                _fetch(ledger, artifacts, folder, reporter, patience_s)
                job = _job(folder)
                with threads(own_threads(job, folder)):
                    assembler = Assembler(job, prepare(job, folder, reporter))
            with threads(assembler.job.settings.latency.num_threads):
                done += _take_part(assembler, ledger, reporter)
    finally:
        waiting.release()
    return done


class _Searches:
    """The searches of a run, one after the other, as they begin."""

    def __init__(self, folder: RunFolder, storage: str | None, reporter: Reporter, patience_s: float) -> None:
        self._folder, self._storage, self._reporter, self._patience_s = folder, storage, reporter, patience_s
        self._store: Store | None = None

    def __iter__(self) -> Iterator[Ledger]:
        while (name := self._next()) is not None:
            assert self._store is not None
            yield Ledger.open(self._store, name, objectives=(), facts=None)

    def release(self) -> None:
        """Give the storage's connections back."""
        if self._store is not None:
            self._store.release()

    def _next(self) -> str | None:
        """The search that is going on; None once the run is over, or silent for too long."""
        give_up = time.monotonic() + self._patience_s
        told = False
        while True:
            known = self._known()
            if any(search.over for search in known):
                return None
            going_on = [search.name for search in known if not search.closed]
            if going_on:
                return going_on[-1]
            if time.monotonic() >= give_up:
                if known:
                    return None
                raise StorageError(
                    f"{self._where}: no search of run {self._folder.path} has begun in {self._patience_s:g} s; "
                    "was the run given this storage?"
                )
            if not told:
                self._reporter.say(f"waiting for a search of run {self._folder.path} in {self._where}")
                told = True
            time.sleep(min(POLL_S, self._patience_s))

    @property
    def _where(self) -> str:
        return self._store.where if self._store is not None else f"journal {self._folder.study}"

    def _known(self) -> list[Search]:
        """The run's searches so far."""
        if self._store is None:
            # The run makes its journal: it takes a folder that is not empty for a stranger's.
            if self._storage is None and not self._folder.study.exists():
                return []
            self._store = open_store(self._storage or self._folder.study)
        if self._folder.manifest.exists():
            return searches(self._store, run=self._folder.identity)
        found = searches(self._store)
        runs = {search.facts.get(RUN) for search in found if not search.closed}
        if len(runs) > 1:
            raise StorageError(
                f"{self._where}: {len(runs)} runs are going on there, and {self._folder.path} does not say which one "
                "is meant; copy that run's run.json into it, or give each run a storage of its own"
            )
        return [search for search in found if search.facts.get(RUN) in runs]


def _fetch(ledger: Ledger, artifacts: str | None, folder: RunFolder, reporter: Reporter, patience_s: float) -> None:
    """Put a run's files into a folder that lacks them; the run uploads them when its search has begun."""
    if artifacts is None:
        return
    give_up = time.monotonic() + patience_s
    while not (ledger.files or ledger.closed or time.monotonic() >= give_up):
        time.sleep(min(POLL_S, patience_s))
    store = Artifacts.open(artifacts)
    try:
        fetched = store.download(ledger, folder.path)
    finally:
        store.release()
    reporter.say(f"fetched {len(fetched)} files from {store.where}")


def _job(folder: RunFolder) -> Job:
    """The job of a run, checked to be the run's.

    Raises:
        RunFolderError: If the folder lacks what the run has prepared, the run has no configuration, or network or data
            are others here.
    """
    for path in (folder.manifest, folder.config, folder.layout, folder.original):
        if not path.exists():
            raise RunFolderError(
                f"run folder {folder.path}: it lacks {path.name}, which the run makes before its search; let workers "
                "see the run's folder, or give --artifacts to the run and to its workers"
            )
    job = job_of_run(
        folder, "a worker cannot build it: describe model and data in a config file and use `sekron-search run`"
    )
    folder.check(job.fingerprint())
    if folder.tables.exists():
        # They may have been fetched from a run that keeps its tables elsewhere.
        job = dataclasses.replace(job, settings=job.settings.model_copy(update={"tables": None}))
    job.model.eval()
    return job


def _take_part(assembler: Assembler, ledger: Ledger, reporter: Reporter) -> int:
    """Evaluate trials of a search until it is over; how many."""
    facts = ledger.facts
    problem = Problem.from_facts(assembler.tables.network, facts)
    if different := sorted(key for key, value in problem.facts().items() if facts.get(key) != value):
        raise StorageError(
            f"{ledger.where}: {ledger.name} is another search than this worker's (different: {', '.join(different)}); "
            "run and workers need the same version of sekron-search, and the same run folder or artifacts"
        )
    reporter.say(f"taking part in {ledger.name}")
    take_part(problem, assembler.evaluate, ledger, reporter)
    return ledger.num_finished

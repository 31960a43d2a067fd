"""How the processes of a run share its search: the storage of its studies, and the files that workers need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sekron_search.errors import StorageError
from sekron_search.network_tables import Tables
from sekron_search.rundir import RunFolder
from sekron_search.search.artifacts import Artifacts
from sekron_search.search.ledger import Ledger
from sekron_search.search.problem import Problem
from sekron_search.search.searches import RUN, searches
from sekron_search.search.storage import open_store
from sekron_search.search.study import objectives


@dataclass(frozen=True)
class Sharing:
    """Where a run's search is shared with workers.

    Args:
        storage: URL of an Optuna storage; by default a journal in the run folder.
        artifacts: Folder or s3://BUCKET/PREFIX for workers that do not see the run folder; None if all do.
    """

    storage: str | None = None
    artifacts: str | None = None

    def check(self) -> None:
        """Raise a `StorageError` now, before long work, if they cannot be opened."""
        if self.artifacts is not None and self.storage is None:
            raise StorageError(
                "artifacts are for workers that do not see the run folder, and its journal they do not see either: "
                "give --storage too"
            )
        if self.storage is not None:
            open_store(self.storage).release()
        if self.artifacts is not None:
            Artifacts.open(self.artifacts).release()

    def open(self, folder: RunFolder, tables: Tables, name: str, problem: Problem) -> Ledger:
        """Begin a search of a run, or go on with it, where workers find it.

        Args:
            folder: Of the run.
            tables: What workers need is uploaded, where there are artifacts.
            name: Which of the run's searches.
            problem: What is searched.
        """
        ledger = Ledger.open(
            self.storage or folder.study,
            f"run {folder.identity}, {name}",
            objectives=objectives(problem.bounds),
            facts={**problem.facts(), RUN: folder.identity},
        )
        if self.artifacts is not None:
            store = Artifacts.open(self.artifacts)
            store.upload(ledger, shared_files(folder, tables))
            store.release()
        return ledger

    def conclude(self, folder: RunFolder) -> None:
        """Say that the run searches no more: its workers leave."""
        store = open_store(self.storage or folder.study)
        try:
            if own := searches(store, run=folder.identity):
                Ledger.open(store, own[-1].name, objectives=(), facts=None).conclude()
        finally:
            store.release()


def shared_files(folder: RunFolder, tables: Tables) -> dict[str, Path]:
    """What a worker needs of a run that has prepared its tables, by name in its run folder."""
    files = [folder.manifest, folder.config, folder.layout, folder.original, folder.profile]
    named = {path.name: path for path in files if path.exists()}
    return named | {f"{folder.tables.name}/{path.name}": path for path in tables.files}

"""Worker processes for tests: they share no state with the test's process, and start without importing everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.search.toy_worker", "tests.processes", "sekron_search.worker"])


def take_part(folder: str, storage: str | None) -> None:
    """What `sekron-search worker` does."""
    import torch

    from sekron_search.progress import Reporter
    from sekron_search.rundir import RunFolder
    from sekron_search.worker import work

    torch.set_num_threads(1)
    work(RunFolder(folder), Reporter(), storage=storage, artifacts=None, patience_s=60)


def stopped(pid: int) -> None:
    """Stop a process where it is; what it is doing is then sure."""
    os.kill(pid, signal.SIGSTOP)


def resumed(pid: int) -> None:
    """Let a stopped process go on."""
    os.kill(pid, signal.SIGCONT)


def is_writing(journal: Path) -> bool:
    """Whether some process holds the lock of a journal."""
    return journal.with_name(journal.name + ".lock").exists()

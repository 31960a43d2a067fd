"""Worker processes for tests: they share no state with the test's process, and start without importing everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

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


def take_part_without_end(folder: str, storage: str | None) -> None:
    """The same, but the first trial goes on until the process is killed."""
    from sekron_search.assembly import Assembler

    with mock.patch.object(Assembler, "evaluate", side_effect=lambda *_: time.sleep(3600)):
        take_part(folder, storage)


def stopped_without_lock(pid: int, journal: Path) -> None:
    """Stop a process while nobody holds the lock of a journal, so that it can be killed without breaking that."""

    def stopped() -> bool:
        os.kill(pid, signal.SIGSTOP)
        if journal.with_name(journal.name + ".lock").exists():
            os.kill(pid, signal.SIGCONT)
            return False
        return True

    wait_until(stopped, "the journal was never without a lock")


def wait_until(what: Callable[[], bool], otherwise: str) -> None:
    """Wait for up to two minutes; the test fails with these words if it has not come about then."""
    give_up = time.monotonic() + 120
    while not what():
        assert time.monotonic() < give_up, otherwise
        time.sleep(0.02)

"""Progress of long work: a bar with the time left on a terminal, plain lines elsewhere, nothing on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Task:
    """A piece of work of known length; silent by itself.

    Args:
        description: What is being done.
        total: Number of steps.
    """

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total

    def update(self, done: int, note: str = "") -> None:
        """So many steps are done."""


class Reporter:
    """Says what is going on; this one says nothing."""

    def say(self, text: str) -> None:
        """One line of news."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """A piece of work."""
        yield Task(description, total)


class ConsoleReporter(Reporter):
    """Bars with the time left on a terminal, a line every few seconds elsewhere; on standard error."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line of news."""
        self.console.print(text, markup=False)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """A bar, or lines."""
        if not self.console.is_terminal:
            yield _Lines(description, total)
            return
        columns = [
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        ]
        with Progress(*columns, console=self.console) as bar:
            yield _Bar(bar, bar.add_task(description, total=total, note=""), description, total)


class _Bar(Task):
    def __init__(self, bar: Progress, task: TaskID, description: str, total: int) -> None:
        super().__init__(description, total)
        self._bar, self._task = bar, task

    def update(self, done: int, note: str = "") -> None:
        self._bar.update(self._task, completed=done, note=note)


class _Lines(Task):
    """A line at the start, then at most one every ten seconds, then one at the end, with the time left."""

    interval_s = 10.0

    def __init__(self, description: str, total: int) -> None:
        super().__init__(description, total)
        self._start = self._said = time.monotonic()
        print(f"{description}: {total} steps", file=sys.stderr, flush=True)

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done and (done >= self.total or now - self._said >= self.interval_s):
            self._said = now
            spent = now - self._start
            left = spent / done * (self.total - done)
            print(
                f"{self.description}: {done}/{self.total}, {spent:.0f} s, about {left:.0f} s left"
                + (f" ({note})" if note else ""),
                file=sys.stderr,
                flush=True,
            )

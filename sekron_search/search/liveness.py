"""Whether a worker is alive, told without comparing the clocks of machines.

A worker counts up while it works. Others call it dead when its count has not changed for a while by their own clock,
or at once when they see for themselves that its process is gone.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process, told from all others that were and will be.

    Args:
        name: Of its machine, for people.
        pid: Its number there.
        space: Where that number means something: the machine since it was booted, and the container; None if unknown.
        started: When it started, in the machine's ticks; None if unknown.
    """

    name: str
    pid: int
    space: str | None
    started: int | None

    @classmethod
    def here(cls) -> Process:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _space(), _started(os.getpid()))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Process:
        """Inverse of `to_json`."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended: it ran here, and its number is free, or another's by now."""
        if self.space is None or self.started is None or self.space != _space():
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} of {self.name}"


class Watch:
    """Tells which counts have stopped.

    Args:
        grace_s: A count that has not changed for longer than this has stopped.
        clock: Seconds; never goes back.
    """

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s, self._clock = grace_s, clock
        self._seen: dict[int, tuple[int, float]] = {}

    def looks(self) -> float:
        """The time at which a look begins: before the counts are read."""
        return self._clock()

    def has_stopped(self, key: int, count: int, looked: float) -> bool:
        """Whether a count has stopped, as far as this watch has seen; never on the first look.

        Args:
            key: Whose count it is.
            count: As it was read.
            looked: What `looks` said before; what takes long between the two must not count against the other.
        """
        last, since = self._seen.get(key, (None, 0.0))
        if last != count:
            since = self._clock()
        self._seen[key] = count, since
        return looked - since > self._grace_s


def _space() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return None


def _started(pid: int) -> int | None:
    """Start of a process here; None if there is none of that number, or all that is left of it is its exit code."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name is in parentheses and may hold anything, so fields are counted from the last one on.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])

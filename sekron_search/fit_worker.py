"""A process that fits tables for another one: `python -m sekron_search.fit_worker CACHE`.

Jobs are files that the lines of its standard input name; every one is answered by a line of JSON. It ends when its
standard input does, even in the middle of a fit: so no worker outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

from sekron_search.fitting import work


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    def wanted() -> Iterator[str]:
        while True:
            yield lines.get()

    def answer(error: str) -> None:
        print(json.dumps({"error": error}), file=answers, flush=True)

    threading.Thread(target=read, daemon=True).start()
    work(Path(sys.argv[1]), wanted(), answer)


if __name__ == "__main__":
    main()

"""How time and memory from a trained network to an assembled candidate grow with its layers and their widths.

    python -m benchmarks.scale [--only resnet18 ...]

Every network runs in a process of its own, from nothing: tables of all its layers, and the search's first networks
under half the flops and half the parameters, each evaluated. Nothing is trained, nor fitted again layer after layer.
Images are random but correlated as natural ones are: 224x224, 256 to calibrate and 64 held out. Two threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.resnet18 import correlated_images, resnet
from benchmarks.results_file import RESULTS, Target, samples_of, write_results
from sekron_search.candidates import Finder
from sekron_search.config import make_settings
from sekron_search.job import Job
from sekron_search.prepare import prepare
from sekron_search.progress import ConsoleReporter, Task
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget

THREADS = 2

#: Depth and width of every network.
NETWORKS: dict[str, tuple[int, float]] = {
    "resnet18": (18, 1.0),
    "resnet34": (34, 1.0),
    "resnet50": (50, 1.0),
    "resnet18, half as wide": (18, 0.5),
    "resnet18, twice as wide": (18, 2.0),
}

IMAGE_SIZE, CALIBRATION, HOLDOUT, BATCH = 224, 256, 64, 32
BUDGET: dict[str, float | str] = {"flops": "0.5x", "params": "0.5x"}

#: Networks that the search evaluates: its first generation.
TRIALS = 4

#: What ResNet-18 may take.
MOST_SECONDS, MOST_GIB = 300.0, 6.0

#: Whose processor time counts.
USAGES = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

#: Seconds between two looks at the memory.
LOOK_S = 1.0


class Clock(ConsoleReporter):
    """Seconds of every kind of task."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """A piece of work, timed."""
        with self.timed(description), super().task(description, total) as task:
            yield task

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the block's time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--data", help="not used; what all benchmarks are called with")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here is not None:
        print(json.dumps(candidate(*NETWORKS[args.here])))
        return
    earlier = RESULTS / "scale.json"
    samples: dict[str, Any] = samples_of(earlier) if earlier.exists() else {}
    for name in args.only:
        print(f"--- {name}", flush=True)
        samples[name] = apart(name)
        print(json.dumps(samples[name], indent=1), flush=True)
        write_results("scale", targets(samples), samples, command="make bench NAME=scale")


def apart(name: str) -> dict[str, Any]:
    """A network in a process of its own, watched from here."""
    command = [sys.executable, "-m", "benchmarks.scale", "--here", name]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], memory_gib(process.pid))
            time.sleep(LOOK_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read()
    watcher.join()
    wall = time.monotonic() - start
    if process.returncode != 0:
        raise SystemExit(f"{name}: exit status {process.returncode}")
    return {"wall_s": wall, "peak_gib": peak[0], **json.loads(output)}


def memory_gib(pid: int) -> float:
    """Of a process and its descendants, pages that they share counted once; 0 for what has ended."""
    total, waiting = 0, [pid]
    while waiting:
        own = waiting.pop()
        try:
            lines = Path(f"/proc/{own}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for thread in Path(f"/proc/{own}/task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total / 2**20


def candidate(depth: int, width: float) -> dict[str, Any]:
    """From a network to its best candidate; how long every stage took, and what came out."""
    torch.set_num_threads(THREADS)
    clock = Clock()
    settings = make_settings(
        Budget.of(BUDGET),
        {
            "calibration": {
                "samples": CALIBRATION,
                "holdout": HOLDOUT,
                "batch_size": BATCH,
                "sequential_steps": 0,
            },
            "search": {"trials": TRIALS, "generation": TRIALS},
            "finetune": {"epochs": 0, "candidates": 1},
        },
    )
    with clock.timed("making network and images"):
        model = resnet(depth, width)
        images = correlated_images(CALIBRATION + HOLDOUT, IMAGE_SIZE)
    fit = [(x,) for x in images[:CALIBRATION].split(BATCH)]
    holdout = [(x,) for x in images[CALIBRATION:].split(BATCH)]
    job = Job(model, (images[:1],), fit, holdout, settings)
    with tempfile.TemporaryDirectory() as home:
        folder = RunFolder(home)
        with folder.claimed(job.fingerprint(), resume=False):
            with clock.timed("all tables"):
                tables = prepare(job, folder, clock)
            with clock.timed("candidate"):
                found = Finder(job, tables, folder, clock).search()
    best = found.candidates[0]
    usage = {name: best.costs[name] / tables.original[name] for name in ("flops", "params")}
    return {
        "layers": len(tables.layers),
        "weights": sum(p.numel() for p in model.parameters()),
        "flops": tables.original["flops"],
        "options": sum(len(f.table.options) for f in tables.fitted),
        "cpu_s": sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, USAGES)),
        "stages_s": clock.seconds,
        "shares_of_the_original": usage,
        "divergence": best.divergence,
    }


def targets(samples: dict[str, Any]) -> list[Target]:
    """What ResNet-18 has to stay below."""
    if "resnet18" not in samples:
        return []
    own = samples["resnet18"]
    return [
        Target("ResNet-18, 224x224: seconds to an assembled candidate", own["wall_s"], MOST_SECONDS, at_least=False),
        Target("ResNet-18, 224x224: peak memory in GiB, children included", own["peak_gib"], MOST_GIB, at_least=False),
    ]


if __name__ == "__main__":
    main()

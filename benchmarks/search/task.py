"""One search of the comparison, in a process of its own.

    python -m benchmarks.search.task FOLDER METHOD SEED DATA [LEVEL]

Everything that was measured is kept in FOLDER, so a task that was killed goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cifar10.config import config_of
from benchmarks.search.methods import METHODS
from sekron_search.assembly import Assembler
from sekron_search.files import read_json, write_json
from sekron_search.jobs import job_from_config
from sekron_search.prepare import prepare
from sekron_search.progress import ConsoleReporter
from sekron_search.rundir import RunFolder
from sekron_search.search.options import Assignment
from sekron_search.search.problem import Problem

#: Trials between two writes.
EVERY = 10


def assembler(folder: Path, data: Path) -> Assembler:
    """ResNet-20's tables, made if they are not there yet, and what assembles and measures networks."""
    config = config_of(data, Path(__file__).parent / "config.yaml", tables=folder / "tables")
    job = job_from_config(config)
    job.model.eval()
    run = RunFolder(folder / "run")
    run.path.mkdir(parents=True, exist_ok=True)
    return Assembler(job, prepare(job, run, ConsoleReporter()))


def path_of(folder: Path, method: str, seed: int, level: float | None) -> Path:
    name = method.replace(", ", "-").replace(" ", "_")
    return folder / f"{name}-{seed}{'' if level is None else f'-at-{level:g}'}.json"


def main() -> None:
    folder, method, seed, data = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    level = float(sys.argv[5]) if len(sys.argv) > 5 else None
    torch.set_num_threads(1)
    path = path_of(folder, method, seed, level)
    made = assembler(folder, data)
    network = made.tables.network
    search, trials = METHODS[method]
    # With a level all trials are at that budget; else they are spread over the whole front.
    bound = (0.5 if level is None else level) * network.original["flops"]
    problem = Problem(network, {"flops": bound}, trials=trials, seed=seed, spread=1.0 if level is None else 0.0)
    known: dict[Assignment, float] = {}
    if path.exists():
        known = {tuple(t["assignment"]): t["divergence"] for t in read_json(path)["trials"]}

    def measure(assignment: Assignment) -> float:
        if assignment not in known:
            known[assignment] = made.evaluate(assignment).divergence
        return known[assignment]

    rows: list[dict[str, Any]] = []
    for assignment in search(problem, measure, trials):
        flops = network.cost(assignment, "flops") / network.original["flops"]
        rows.append({"assignment": list(assignment), "divergence": measure(assignment), "flops": flops})
        if len(rows) % EVERY == 0 or len(rows) == trials:
            best = min((r["divergence"] for r in rows if r["flops"] <= 0.5), default=np.inf)
            print(f"{method}, seed {seed}: {len(rows)}/{trials}, best at half the flops {best:.4g}", flush=True)
            if len(rows) >= len(known) or len(rows) == trials:
                write_json(path, {"done": len(rows) == trials, "trials": rows})


if __name__ == "__main__":
    main()

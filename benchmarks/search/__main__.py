"""How much searches find in how many trials: ResNet-20 on CIFAR-10, divergence on held-out images against flops.

    python -m benchmarks.search --data DIR [--runs DIR] [--seeds 0 1 2] [--only METHOD ...]

Every search measures networks alike. The hypervolume is that of (divergence, flops) below a reference point; it grows
with every trial that moves the front. Searches that were killed go on where they stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cifar10.config import archive_of
from benchmarks.cifar10.data import cifar10
from benchmarks.command import parser_of
from benchmarks.results_file import Target, write_results
from benchmarks.search.methods import METHODS
from benchmarks.search.plot import plot
from benchmarks.search.task import assembler, path_of
from sekron_search.divergence import mean_divergence, reference_outputs
from sekron_search.files import read_json
from sekron_search.search.pareto import hypervolumes

#: Reference point: a divergence at which accuracy is lost, and the original's flops.
REFERENCE = (4.0, 1.0)

#: Budgets of flops at which our search is also run with all its trials.
LEVELS = (0.5, 0.3)

#: Images that no search has seen, on which the networks found at those budgets are measured once more.
FRESH = 4096

RAW = ("NSGA-II", "TPE", "random")
KNAPSACKS = ("knapsack alone", "knapsack without responses")
STARTED = tuple(name for name in METHODS if name.endswith(", started"))


def curve(trials: Sequence[dict[str, Any]]) -> list[float]:
    """Hypervolume after every trial."""
    return [float(v) for v in hypervolumes([[t["divergence"], t["flops"]] for t in trials], REFERENCE)]


def best_at(trials: Sequence[dict[str, Any]], level: float) -> dict[str, Any]:
    return min((t for t in trials if t["flops"] <= level), key=lambda t: t["divergence"])


def targets_of(curves: dict[str, list[list[float]]], gains: Sequence[dict[str, Any]]) -> list[Target]:
    found = []
    ours = curves["ours"]
    for name in RAW:
        leads = [a[49] - b[499] for a, b in zip(ours, curves[name], strict=True)]
        found.append(
            Target(f"hypervolume of ours after 50 trials less {name}'s after 500, worst seed", min(leads), 0.0)
        )
    for name in STARTED:
        lead = float(np.mean([a[99] for a in ours]) - np.mean([b[99] for b in curves[name]]))
        found.append(Target(f"hypervolume of ours after 100 trials less {name}'s after 100, mean", lead, 0.0))
    for level in LEVELS:
        for method in KNAPSACKS:
            ratio = float(np.mean([g["ratio"][method] for g in gains if g["level"] == level]))
            what = f"divergence of ours over the best solution's of {method} at {level:g}x flops, mean"
            found.append(Target(what, ratio, 0.9, at_least=False))
    return found


def gains_of(made: Any, runs: Path, seeds: Sequence[int], data: Path) -> list[dict[str, Any]]:
    """Our networks at fixed budgets against the best of the knapsack's, on the held-out and on fresh images."""
    split = cifar10(str(archive_of(data))).validation
    images = torch.stack([split[i][0] for i in range(FRESH)])
    fresh = [(part,) for part in images.split(256)]
    references = reference_outputs(made.job.model, fresh)

    def on_fresh(trial: dict[str, Any]) -> float:
        network = made.assemble(tuple(trial["assignment"]))
        with torch.no_grad():
            return mean_divergence("kl", network, fresh, references)

    rows = []
    for level in LEVELS:
        starts = {m: best_at(read_json(path_of(runs, m, seeds[0], None))["trials"], level) for m in KNAPSACKS}
        fresh_starts = {method: on_fresh(trial) for method, trial in starts.items()}
        for seed in seeds:
            own = best_at(read_json(path_of(runs, "ours", seed, level))["trials"], level)
            own_fresh = on_fresh(own)
            rows.append(
                {
                    "level": level,
                    "seed": seed,
                    "ours": own["divergence"],
                    "ratio": {m: own["divergence"] / t["divergence"] for m, t in starts.items()},
                    "ratio_on_fresh_images": {m: own_fresh / value for m, value in fresh_starts.items()},
                }
            )
    return rows


def main() -> None:
    parser = parser_of(__doc__, "search", seeds=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="methods to run; else all")
    args = parser.parse_args()
    made = assembler(args.runs, args.data)
    tasks: list[tuple[str, int, float | None]] = [(name, seed, None) for seed in args.seeds for name in args.only]
    tasks += [("ours", seed, level) for seed in args.seeds for level in LEVELS if "ours" in args.only]

    def search(task: tuple[str, int, float | None]) -> None:
        name, seed, level = task
        path = path_of(args.runs, name, seed, level)
        if path.exists() and read_json(path)["done"]:
            return
        command = [sys.executable, "-m", "benchmarks.search.task", str(args.runs), name, str(seed), str(args.data)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *([] if level is None else [str(level)])], check=True, env=environment)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(search, tasks))
    if set(args.only) != set(METHODS):
        return
    found = {m: [read_json(path_of(args.runs, m, s, None))["trials"] for s in args.seeds] for m in METHODS}
    curves = {name: [curve(trials) for trials in rows] for name, rows in found.items()}
    gains = gains_of(made, args.runs, args.seeds, args.data)
    samples = {
        "reference_point": {"divergence": REFERENCE[0], "flops": REFERENCE[1]},
        "seeds": args.seeds,
        "hypervolume": {name: [[round(v, 5) for v in row] for row in rows] for name, rows in curves.items()},
        "at_a_budget": gains,
    }
    path = write_results("search", targets_of(curves, gains), samples, command="make bench NAME=search DATA=...")
    plot(path)


if __name__ == "__main__":
    main()

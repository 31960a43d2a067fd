"""Fits: exact recovery, TensorLy at equal ranks, refinement, data-aware fits, spectra of a whole network.

    python -m benchmarks.fit --data DIR [--only exact rivals ...]

DIR holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt. TensorLy and this package run in one process,
interleaved, on one thread each; the spectra use two. With --only, the results of other parts are kept as they are.
"""

from __future__ import annotations

import os

# Before numpy is loaded: its threads cannot be set later. One thread for both sides of a comparison.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fit import data_aware, exact, rivals, spectra
from benchmarks.results_file import RESULTS, Target, samples_of, write_results

Part = Callable[[Path], Any]

PARTS: dict[str, Part] = {
    "exact": lambda data: exact.recovery(),
    "refinement": lambda data: exact.refinement(),
    "spectra": lambda data: spectra.score_all(workers=2),
    "rivals": rivals.compete_all,
    "data_aware": data_aware.compare,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    earlier = RESULTS / "fit.json"
    samples = samples_of(earlier) if set(args.only) != set(PARTS) and earlier.exists() else {}
    for name in args.only:
        print(f"--- {name}", flush=True)
        samples[name] = PARTS[name](args.data)
        write_results("fit", targets(samples), samples, command="make bench NAME=fit DATA=...")


def targets(samples: dict[str, Any]) -> list[Target]:
    """What was asked of every part that was run."""
    found = []
    for row in samples.get("exact", []):
        found.append(Target(f"share of weights recovered exactly: {row['family']}", row["recovered"], 0.95))
    if refined := samples.get("refinement"):
        gains = [a - b for a, b in zip(refined["recursion"], refined["eight_starts"], strict=True)]
        found.append(Target("least gain of refining nested S=3 over 20 seeds", min(gains), 1e-6))
        mean = statistics.mean(refined["eight_starts"])
        found.append(Target("mean error of refined nested S=3", mean, 0.735, at_least=False))
    if scored := samples.get("spectra"):
        found.append(Target("seconds for all spectra of ResNet-18", scored["seconds"], 60, at_least=False))
        found.append(Target("peak memory for them, GiB", scored["peak_memory_gib"], 4, at_least=False))
    for row in samples.get("rivals", []):
        name = f"{row['family']} on {row['set']}"
        found.append(Target(f"error, worst ratio to TensorLy: {name}", row["error_ratio_worst"], 1.001, at_least=False))
        bound = 0.1 if row["family"] == "CP" and "256" in row["set"] else 1.0
        found.append(Target(f"time, ratio to TensorLy: {name}", row["time_ratio"], bound, at_least=False))
    if rows := samples.get("rivals"):
        mean = statistics.mean(row["error_ratio_mean"] for row in rows)
        lower = 1 - 1e-6  # equal is not lower
        found.append(Target("error, mean ratio to TensorLy over all families", mean, lower, at_least=False))
    if aware := samples.get("data_aware"):
        found.append(Target("share of pairs with lower held-out error when data-aware", aware["share_lower"], 0.95))
    return found


if __name__ == "__main__":
    main()

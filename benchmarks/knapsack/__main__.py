"""The knapsack on tables as large as ResNet-50's: 53 layers, 200 options each, three budgets at once.

    python -m benchmarks.knapsack [--seeds 4]

Tables are drawn from seeds; the budgets are the same share of the original's flops, parameters and latency, from what
can hardly be met to what hardly binds. Times and gaps as proven, beside HiGHS alone on the same problem. Then what a
study asks: 20 layers of 30 options, two budgets, errors that change from call to call.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from benchmarks.knapsack.networks import resnet50_tables
from benchmarks.results_file import Target, write_results
from sekron_search.search.budget import CostName
from sekron_search.search.knapsack import additive_errors, solve_knapsack
from sekron_search.search.options import Network

NAMES: tuple[CostName, ...] = ("flops", "params", "latency_ms")
LEVELS = (0.23, 0.27, 0.32, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
CALLS = 200
ALONE_S = 30.0


def large(seed: int, *, alone: bool) -> list[dict[str, Any]]:
    """Time and gap at every level of the budgets; of HiGHS alone too, if asked for."""
    network = resnet50_tables(seed)
    errors, rows = additive_errors(network), []
    for level in LEVELS:
        bounds = {name: level * network.original[name] for name in NAMES}
        start = time.perf_counter()
        solution = solve_knapsack(network, bounds, errors)
        row: dict[str, Any] = {"seed": seed, "level": level, "seconds": time.perf_counter() - start}
        row |= {"error": solution.error, "lower_bound": solution.lower_bound, "gap": solution.gap}
        if alone:
            row["highs_alone"] = highs_alone(network, bounds)
        print(row)
        rows.append(row)
    return rows


def highs_alone(network: Network, bounds: dict[CostName, float]) -> dict[str, float]:
    """Time and gap of scipy's mixed-integer solver on the whole problem."""
    counts = [len(table.options) for table in network.tables]
    owner = np.repeat(np.arange(len(counts)), counts)
    one_of_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    constraints = [LinearConstraint(one_of_each, 1, 1)]
    for name, bound in bounds.items():
        room = bound - network.fixed(name)
        constraints.append(LinearConstraint(np.concatenate(network.values(name))[None] / room, -np.inf, 1))
    start = time.perf_counter()
    found = milp(
        np.concatenate(additive_errors(network)),
        constraints=constraints,
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-3, "time_limit": ALONE_S},
    )
    return {"seconds": time.perf_counter() - start, "gap": float(found.mip_gap)}


def small(seed: int) -> list[float]:
    """Seconds of each of many calls with changing errors."""
    network = resnet50_tables(seed, num_options=30)
    network = Network(network.tables[:20], network.original)
    original = {str(name): float(sum(v[0] for v in network.values(name))) for name in NAMES}
    network = Network(network.tables, original)
    rng, errors, times = np.random.default_rng(seed), additive_errors(network), []
    for _ in range(CALLS):
        changed = [e * rng.lognormal(0, 0.5) * rng.lognormal(0, 0.2, len(e)) for e in errors]
        bounds: dict[CostName, float] = {name: 0.5 * original[name] for name in ("flops", "params")}
        start = time.perf_counter()
        solve_knapsack(network, bounds, changed)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--data", help="not used; what all benchmarks are called with")
    seeds = parser.parse_args().seeds
    rows = [row for seed in range(seeds) for row in large(seed, alone=seed == 0)]
    times = small(0)
    targets = [
        Target("slowest of three budgets at once, s", max(r["seconds"] for r in rows), 2.0, at_least=False),
        Target("largest gap", max(r["gap"] for r in rows), 1e-3, at_least=False),
        Target("median of a study's calls, s", float(np.median(times)), 0.1, at_least=False),
    ]
    command = f"python -m benchmarks.knapsack --seeds {seeds}"
    write_results("knapsack", targets, {"large": rows, "study_call_seconds": times}, command=command)


if __name__ == "__main__":
    main()

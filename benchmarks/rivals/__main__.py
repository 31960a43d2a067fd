"""This package beside its rivals on CIFAR-10 (JPEG), at equal flops, equal latency and equal training.

    python -m benchmarks.rivals --data DIR [--networks resnet20] [--budgets 0.5x ...] [--methods ours "uniform CP" ...]
                                [--epochs 3] [--seeds 0]

DIR holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt. Every network is trained on the same images by
the same distillation for the same epochs, its learning rate found in the same way; errors of replaced layers' outputs
count where layers are replaced, which pruning and fresh networks do not do. Latencies are of deployed networks beside
the original. Under each budget this package is then given the measured latency of the best rival as its only budget.
Everything is chosen on a validation split; the test split is evaluated once per network. Killed runs are gone on with,
and results of other methods, seeds and epochs that were written before are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from benchmarks.cifar10.config import NETWORKS
from benchmarks.cifar10.runs import Runs
from benchmarks.command import parser_of
from benchmarks.results_file import RESULTS, Target, write_results
from benchmarks.rivals.contest import Contest, latency_ratio
from benchmarks.rivals.methods import RIVALS
from sekron_search import load
from sekron_search.files import read_json
from sekron_search.progress import ConsoleReporter

BUDGETS = ("0.5x", "0.278x", "0.15x")
OURS, OURS_TIMED = "ours", "ours, as fast as the best rival"

#: Points of top-1 by which the best rival is to be beaten: at equal flops, and at equal latency.
MARGIN, MARGIN_TIMED = 0.5, 0.0

#: What tells samples from each other.
KEYS = ("network", "budget", "method", "seed", "epochs")


def ours(runs: Runs, budget: Mapping[str, str], seed: int, epochs: int) -> dict[str, Any]:
    """What this package reaches under a budget."""
    report = runs.report(budget, seed=seed, epochs=epochs)
    compressed = report["compressed"]
    network = load(runs.folder(budget, seed=seed, epochs=epochs).path)
    return {
        "flops": compressed["flops"],
        "params": compressed["params"],
        "latency_ratio": latency_ratio(runs.job(budget, seed=seed, epochs=epochs), network),
        "validation": report["validation_metric"],
        "test": compressed["metric"],
        "learning_rate": report["learning_rate"],
        "curve": report["curve"],
    }


def sample_of(runs: Runs, budget: str, method: str, seed: int, epochs: int) -> dict[str, Any]:
    """What a method reaches."""
    case = {"network": runs.network, "budget": budget, "method": method, "seed": seed, "epochs": epochs}
    if method == OURS:
        return case | ours(runs, {"flops": budget}, seed, epochs)
    job = runs.job({"flops": budget}, seed=seed, epochs=epochs)
    home = runs.home / "rivals" / "-".join(str(case[key]).replace(" ", "_").replace(",", "") for key in KEYS)
    return case | Contest(job, ConsoleReporter()).enter(method, float(budget.removesuffix("x")), home)


def best_rival(samples: list[dict[str, Any]]) -> str | None:
    """The rival of the highest mean validation metric among samples of equal conditions."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        if sample["method"] in RIVALS and "validation" in sample:
            found.setdefault(sample["method"], []).append(sample["validation"])
    return max(found, key=lambda name: mean(found[name]), default=None)


def timed_sample(runs: Runs, samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """This package with the latency of the best rival as its budget, for samples of the same conditions."""
    best = next((s for s in samples if s["method"] == best_rival(samples)), None)
    if best is None:
        return None
    budget = {"latency_ms": f"{best['latency_ratio']:.3f}x"}
    case = {key: best[key] for key in KEYS} | {"method": OURS_TIMED}
    return case | {"rival": best["method"], **ours(runs, budget, best["seed"], best["epochs"])}


def targets_of(samples: list[dict[str, Any]]) -> list[Target]:
    """Our lead over the best rival, in points of top-1 on the test split."""
    found = []
    for network, budget, epochs in dict.fromkeys((s["network"], s["budget"], s["epochs"]) for s in samples):
        own = [s for s in samples if (s["network"], s["budget"], s["epochs"]) == (network, budget, epochs)]
        best = best_rival(own)
        reached = {
            method: mean(s["test"] for s in own if s["method"] == method and "test" in s)
            for method in {s["method"] for s in own if "test" in s}
        }
        for method, margin in ((OURS, MARGIN), (OURS_TIMED, MARGIN_TIMED)):
            if best is not None and method in reached:
                what = f"{network}, {budget} flops, {epochs} epochs: points by which {method!r} is ahead of {best!r}"
                found.append(Target(what, 100 * (reached[method] - reached[best]), margin))
    return found


def main() -> None:
    methods = [OURS, *RIVALS]
    parser = parser_of(__doc__, "accuracy", seeds=[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20"])
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    path = RESULTS / "rivals.json"
    samples: list[dict[str, Any]] = read_json(path)["samples"] if path.exists() else []

    def add(sample: dict[str, Any]) -> None:
        samples[:] = [s for s in samples if any(s[key] != sample[key] for key in KEYS)] + [sample]
        write_results("rivals", targets_of(samples), samples, command="make bench NAME=rivals DATA=...")

    for network in args.networks:
        runs = Runs(network, args.data, args.runs)
        for seed in args.seeds:
            for budget in args.budgets:
                for method in args.methods:
                    add(sample_of(runs, budget, method, seed, args.epochs))
                asked = (network, budget, seed, args.epochs)
                alike = [s for s in samples if tuple(s[k] for k in ("network", "budget", "seed", "epochs")) == asked]
                timed = timed_sample(runs, alike)
                if timed is not None:
                    add(timed)


if __name__ == "__main__":
    main()

"""This package beside its rivals, at equal flops, equal latency and equal training.

    python -m benchmarks.rivals --data DIR [--networks resnet20 vgg mobilenet edsr] [--budgets 0.5x ...]
                                [--methods ours "uniform CP" ...] [--epochs 3] [--seeds 0]

DIR holds what `benchmarks.accuracy` says, whose runs are used if --runs holds them. Every network is trained on the
same images by the same distillation for the same epochs, its learning rate found in the same way; errors of replaced
layers' outputs count where layers are replaced, which pruning and fresh networks do not do. Latencies are of deployed
networks beside the original. Under each budget this package is then given the measured latency of the best rival as its
only budget. Everything is chosen on a validation split; the test split is evaluated once per network. Killed runs are
gone on with, and results of other methods, seeds, epochs and teachers that were written before are kept.
"""

from __future__ import annotations

from math import floor
from statistics import mean
from typing import Any

from benchmarks.command import parser_of
from benchmarks.results_file import Target, earlier_samples, with_sample, write_results
from benchmarks.rivals.contest import Contest, conditions, speed
from benchmarks.rivals.methods import RIVALS
from benchmarks.runs import Run, Runs
from benchmarks.tasks import TASKS
from sekron_search.costs.profile import Provenance
from sekron_search.errors import DivergedError, InfeasibleBudgetError
from sekron_search.progress import ConsoleReporter

BUDGETS = ("0.5x", "0.278x", "0.15x")
OURS, OURS_TIMED = "ours", "ours, as fast as the best rival"

#: By which the best rival is to be beaten at equal flops, in points of top-1; elsewhere, and at equal latency, by any.
MARGINS = {"resnet20": 0.5}

#: Latencies are equal if they differ by no more than this factor, which clocks are good for.
NOISE = 1.03

#: What samples have to have in common to be compared, and what tells them from each other.
CONDITIONS = ("network", "budget", "epochs", "mirrored_teacher")
KEYS = (*CONDITIONS, "method", "seed")

Sample = dict[str, Any]


def ours(own: Run) -> dict[str, Any]:
    """What this package reaches in a run."""
    try:
        report = own.report
    except (InfeasibleBudgetError, DivergedError) as error:
        return {"failed": str(error)}
    compressed = report["compressed"]
    return {
        "flops": compressed["flops"],
        "flops_ratio": compressed["flops"] / report["original"]["flops"],
        "params": compressed["params"],
        **speed(own.job, own.network),
        "validation": report["validation_metric"],
        "test": compressed["metric"],
        "learning_rate": report["learning_rate"],
        **(report.get("training") or {}),
        "curve": report["curve"],
    }


def sample_of(runs: Runs, budget: str, method: str, seed: int, epochs: int) -> dict[str, Any]:
    """What a method reaches."""
    own = runs.run({"flops": budget}, seed=seed, epochs=epochs)
    case = {
        "network": runs.network,
        "budget": budget,
        "epochs": epochs,
        "mirrored_teacher": own.job.settings.finetune.mirrored_teacher,
        "method": method,
        "seed": seed,
    }
    if method == OURS:
        return case | ours(own)
    name = "-".join(str(case[key]).replace(" ", "_").replace(",", "") for key in KEYS)
    home = runs.home / "rivals" / f"{name}-{conditions(own.job)}"
    return case | Contest(own.job, ConsoleReporter()).enter(method, float(budget.removesuffix("x")), home)


def by_method(samples: list[Sample]) -> dict[str, dict[int, Sample]]:
    """Samples of equal conditions by method and seed."""
    found: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        found.setdefault(sample["method"], {})[sample["seed"]] = sample
    return found


def best_rival(samples: list[Sample]) -> str | None:
    """The rival of the highest mean validation metric among samples of equal conditions."""
    reached = {
        method: mean(s["validation"] for s in own.values())
        for method, own in by_method(samples).items()
        if method in RIVALS and not any("failed" in s for s in own.values())
    }
    return max(reached, key=lambda method: reached[method], default=None)


def timed_samples(runs: Runs, samples: list[Sample]) -> list[Sample]:
    """This package with the latency of the best rival as its budget, for every seed of some equal conditions.

    A rival that is slower than the original asks for nothing: then the flops are asked for, and the original's latency.
    The latency of one that was timed on another processor says nothing here: then there is none.
    """
    best, here = best_rival(samples), Provenance.here().processor
    found = []
    for seed, rival in by_method(samples).get(best or "", {}).items():
        if rival["processor"] != here:
            print(
                f"{best}, seed {seed}: timed on {rival['processor']}; run it on {here} for its latency to be asked for"
            )
            continue
        thousandths = floor(1000 * rival["latency_ratio"])
        budget = {"latency_ms": f"{thousandths / 1000}x"}
        if thousandths >= 1000:
            budget = {"flops": rival["budget"], "latency_ms": "1x"}
        case = {key: rival[key] for key in KEYS} | {"method": OURS_TIMED, "rival": best, "asked": budget}
        found.append(case | ours(runs.run(budget, seed=seed, epochs=rival["epochs"])))
    return found


def targets_of(samples: list[Sample]) -> list[Target]:
    """Our lead over the best rival on the test split, over the seeds that both have."""
    found = []
    for condition in dict.fromkeys(condition_of(s) for s in samples):
        methods = by_method([s for s in samples if condition_of(s) == condition])
        rivals = methods.get(best_rival([s for own in methods.values() for s in own.values()]) or "", {})
        network, budget, epochs, mirrored = condition
        task = TASKS[network]
        for method, margin in ((OURS, MARGINS.get(network, 0.0)), (OURS_TIMED, 0.0)):
            pairs = [(own, rivals[seed]) for seed, own in methods.get(method, {}).items() if seed in rivals]
            if not pairs:
                continue
            teacher = ", mirrored teacher" if mirrored else ""
            case = f"{network}, {budget} flops, {epochs} epochs{teacher}, {len(pairs)} seeds: {method}"
            failed = sum("failed" in own for own, _ in pairs)
            if failed:
                found.append(Target(f"{case}: seeds that reach nothing", failed, 0, at_least=False))
                continue
            best = pairs[0][1]["method"]
            lead = mean(own["test"] - rival["test"] for own, rival in pairs)
            found.append(Target(f"{case}: {task.unit} ahead of {best}", task.factor * lead, margin))
            # Ratios to the original's latency differ from processor to processor.
            timed = [(own, rival) for own, rival in pairs if own["processor"] == rival["processor"]]
            if method == OURS_TIMED and timed:
                slower = mean(own["latency_ratio"] / rival["latency_ratio"] for own, rival in timed)
                what = f"{case}: latency, of that of {best}, {len(timed)} seeds on the same processor"
                found.append(Target(what, slower, NOISE, at_least=False))
    return found


def condition_of(sample: Sample) -> tuple[Any, ...]:
    """The values of `CONDITIONS`."""
    return tuple(sample[key] for key in CONDITIONS)


def main() -> None:
    methods = [OURS, *RIVALS]
    parser = parser_of(__doc__, "accuracy", seeds=[0], trains=True)
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=["resnet20"])
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    samples = earlier_samples("rivals")

    def add(sample: Sample) -> None:
        samples[:] = with_sample(samples, sample, KEYS)
        write_results("rivals", targets_of(samples), samples, command="make bench NAME=rivals DATA=...")

    for network in args.networks:
        runs = Runs(network, args.data, args.runs, args.device)
        for budget in args.budgets:
            for seed in args.seeds:
                for method in args.methods:
                    add(sample_of(runs, budget, method, seed, args.epochs))
            alike = [s for s in samples if condition_of(s) == condition_of(samples[-1])]
            for sample in timed_samples(runs, alike) if OURS in args.methods else ():
                add(sample)


if __name__ == "__main__":
    main()

"""ResNet-20 on CIFAR-10 (JPEG) under budgets of half and a quarter of the flops.

    python -m benchmarks.accuracy --data DIR [--seeds 0 1] [--runs DIR]

DIR holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt. Killed runs are gone on with. Everything is
chosen on a validation split of the training data; the test split is evaluated once, at the end of every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from benchmarks.cifar10.config import TEMPLATE, config_of
from benchmarks.command import parser_of
from benchmarks.results_file import Target, budget_targets, write_results
from sekron_search.api import job_from_config
from sekron_search.progress import ConsoleReporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder


@dataclass(frozen=True)
class Case:
    """A budget of flops, the learning rate for it (chosen on the validation split), and what has to be reached.

    Args:
        budget: Of flops.
        learning_rate: The further a network starts from its original, the larger the best one is.
        untrained, trained: Least top-1 in percent, without training and after three epochs.
    """

    budget: str
    learning_rate: float
    untrained: float
    trained: float


CASES = (Case("0.5x", 4e-4, 87.0, 87.5), Case("0.25x", 3e-3, 79.0, 85.5))


def main() -> None:
    args = parser_of(__doc__, "accuracy", seeds=[0]).parse_args()
    template = yaml.safe_load(TEMPLATE.read_text())
    targets, samples = [], []
    for seed in args.seeds:
        for case in CASES:
            config = config_of(
                args.data,
                finetune={**template["finetune"], "learning_rate": case.learning_rate},
                budget={"flops": case.budget},
                seed=seed,
                tables=args.runs / "tables",
            )
            folder = RunFolder(args.runs / f"flops-{case.budget}-seed-{seed}")
            report = run(job_from_config(config), folder, ConsoleReporter(), resume=True)
            plain = 100 * report["metric_without_training"]
            final = 100 * report["compressed"]["metric"]
            for what, value, bound in (
                ("without training", plain, case.untrained),
                ("after 3 epochs", final, case.trained),
            ):
                targets.append(Target(f"top-1 at {case.budget} flops {what}, seed {seed}", value, bound))
            targets += budget_targets(report, f"{case.budget}, seed {seed}")
            keys = ("original", "compressed", "metric_without_training", "budgets", "divergence", "curve", "layers")
            samples.append({"budget": case.budget, "seed": seed, **{key: report[key] for key in keys}})
    write_results("accuracy", targets, samples, command="make bench NAME=accuracy DATA=...")


if __name__ == "__main__":
    main()

"""What classifiers on CIFAR-10 (JPEG) and a super-resolution network lose under budgets of flops, after fine-tuning.

    python -m benchmarks.accuracy --data DIR [--networks resnet20 vgg mobilenet edsr] [--seeds 0 1 2] [--epochs 10]

DIR holds data/cifar10_jpeg.tar.xz, models/resnet20_cifar10_jpeg.pt and data/sr_hr.tar; the other networks are trained
first, unless --runs holds their weights already. Killed runs are gone on with. Everything is chosen on a validation
split (of the training data; Set14); the test split (Set5) is evaluated once, at the end of every run. Results of other
networks, seeds and epochs that were written before are kept.
"""

from __future__ import annotations

from typing import Any

from benchmarks.command import parser_of
from benchmarks.results_file import Target, budget_targets, earlier_samples, with_sample, write_results
from benchmarks.runs import Runs
from benchmarks.tasks import TASKS
from sekron_search.files import read_json

#: By network and budget of flops, how much may be lost after so many epochs: points of top-1, or dB.
EPOCHS = 10
CASES = {
    "resnet20": {"0.5x": 0.2, "0.278x": 1.0, "0.15x": 3.0},
    "vgg": {"0.5x": 0.3},
    "mobilenet": {"0.5x": 0.3},
    "edsr": {"0.5x": 0.05, "0.25x": 0.15},
}

#: What is kept of a run's report.
KEYS = (
    "original",
    "compressed",
    "metric_without_training",
    "budgets",
    "divergence",
    "curve",
    "learning_rate",
    "layers",
)


def sample_of(runs: Runs, budget: str, seed: int, epochs: int) -> dict[str, Any]:
    """A run, or what there is of it already, and by how much its metrics are lower than the original's."""
    made = runs.run({"flops": budget}, seed=seed, epochs=epochs)
    report, factor = made.report, runs.task.factor
    before = {"test": report["original"]["metric"], "validation": read_json(made.folder.original)["validation_metric"]}
    after = {"test": report["compressed"]["metric"], "validation": report["validation_metric"]}
    return {
        "network": runs.network,
        "budget": budget,
        "seed": seed,
        "epochs": epochs,
        "mirrored_teacher": made.job.settings.finetune.mirrored_teacher,
        "processor": read_json(made.folder.environment)["processor"],
        "unit": runs.task.unit,
        "lost": {split: factor * (before[split] - after[split]) for split in before},
        "lost_without_training": factor * (before["test"] - report["metric_without_training"]),
        **{key: report[key] for key in KEYS},
        **(report.get("training") or {}),
    }


def targets_of(samples: list[dict[str, Any]]) -> list[Target]:
    """What was asked of all seeds' mean."""
    found = []
    for network, budgets in CASES.items():
        for budget, most in budgets.items():
            own = [s for s in samples if (s["network"], s["budget"], s["epochs"]) == (network, budget, EPOCHS)]
            if not own:
                continue
            # A mean is of seeds that learned from the same teacher, that of the last run.
            own = [s for s in own if s["mirrored_teacher"] == own[-1]["mirrored_teacher"]]
            task, case = TASKS[network], f"{network} at {budget} flops"
            for split, images in task.splits.items():
                lost = sum(s["lost"][split] for s in own) / len(own)
                what = f"{case}, {images}: {task.unit} lost after {EPOCHS} epochs, mean of {len(own)} seeds"
                found.append(Target(what, lost, most, at_least=False))
            found += [target for s in own for target in budget_targets(s, f"{case}, seed {s['seed']}")]
    return found


def main() -> None:
    parser = parser_of(__doc__, "accuracy", seeds=[0, 1, 2], trains=True)
    parser.add_argument("--networks", nargs="+", choices=TASKS, default=list(CASES))
    parser.add_argument("--budgets", nargs="+", help="by default those that something is asked of")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    samples = earlier_samples("accuracy")
    for network in args.networks:
        runs = Runs(network, args.data, args.runs, args.device)
        for seed in args.seeds:
            for budget in args.budgets or CASES[network]:
                sample = sample_of(runs, budget, seed, args.epochs)
                samples = with_sample(samples, sample, ("network", "budget", "seed", "epochs"))
                write_results("accuracy", targets_of(samples), samples, command="make bench NAME=accuracy DATA=...")


if __name__ == "__main__":
    main()

"""Whether ranks and structures should move once more after training: a second search, from trained weights.

    python -m benchmarks.rounds --data DIR [--first 0.278x] [--budget 0.15x] [--epochs 3] [--seeds 0]

The network that a run reaches under a looser budget is made dense, searched and fitted again under the tighter one, and
trained for as many epochs again, towards the original. Beside it is the run that goes to the tighter budget at once:
one round, with the epochs of one. DIR holds what `benchmarks.accuracy` says, whose runs are used if --runs holds them.
Networks are compared on validation images, by how far their outputs are from those that both are trained to give.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.command import parser_of
from benchmarks.results_file import Target, earlier_samples, with_sample, write_results
from benchmarks.runs import Run, Runs
from benchmarks.tasks import TASKS
from sekron_search.choice import Judged, judged
from sekron_search.kron.layer import KroneckerLayer
from sekron_search.learning_rate import tuned
from sekron_search.model import copy_model
from sekron_search.progress import ConsoleReporter
from sekron_search.tensor_files import write_tensors

KEYS = ("network", "first", "budget", "epochs", "seed")


def dense(network: nn.Module) -> nn.Module:
    """The network with the layers that it would have had, of the same function, in the place of replaced ones."""
    for name, child in network.named_children():
        setattr(network, name, child.to_dense() if isinstance(child, KroneckerLayer) else dense(child))
    return network


def again(runs: Runs, first: Run, budget: str, seed: int) -> Run:
    """The run that searches the trained network of another run, as if its weights were the original's; none train."""
    home = runs.home / "rounds" / first.folder.path.name
    weights = home / "trained.safetensors"
    if not weights.exists():
        assert first.report
        home.mkdir(parents=True, exist_ok=True)
        write_tensors(weights, dict(dense(first.network).state_dict()))
    return replace(runs, home=home, start=weights).run({"flops": budget}, seed=seed, epochs=0)


def trained(direct: Run, network: nn.Module, home: Path) -> Judged:
    """A network after the training of a run, on its validation images."""
    job, reporter = direct.job, ConsoleReporter()
    assert job.distillation is not None
    distillation = tuned(job.distillation, network, home / "learning_rate.json", reporter)
    with reporter.task("fine-tuning", distillation.total_batches) as task:
        distillation.train(
            network,
            checkpoint=home / "checkpoint.pt",
            measure=job.measure_in_training,
            after_epoch=lambda row: True,
            progress=task.update,
        )
    return judged(job, [network], [0.0], home / "judged.safetensors")[0]


def sample_of(runs: Runs, first: str, budget: str, seed: int, epochs: int) -> dict[str, Any]:
    """Networks of one round and of two, before and after the last training."""
    direct = runs.run({"flops": budget}, seed=seed, epochs=epochs)
    second = again(runs, runs.run({"flops": first}, seed=seed, epochs=epochs), budget, seed)
    assert direct.report
    assert second.report
    home, network = second.folder.path.with_name(f"{second.folder.path.name}-trained"), second.network
    home.mkdir(exist_ok=True)
    found = {
        "one round": judged(direct.job, [direct.network], [0.0], home / "one_round.safetensors")[0],
        "two rounds, before the second training": judged(
            direct.job, [copy_model(network)], [0.0], home / "untrained.safetensors"
        )[0],
        "two rounds": trained(direct, network, home),
    }
    return {
        **dict(zip(KEYS, (runs.network, first, budget, epochs, seed), strict=True)),
        "mirrored_teacher": direct.job.settings.finetune.mirrored_teacher,
        "params": {name: run.report["compressed"]["params"] for name, run in (("one round", direct), ("two", second))},
        "divergence": {name: mark.divergence for name, mark in found.items()},
        "validation": {name: mark.metric for name, mark in found.items()},
    }


def targets_of(samples: list[dict[str, Any]]) -> list[Target]:
    """That a second round, with its training added, leaves a network nearer to the original."""
    return [
        Target(
            f"{s['network']}, {s['first']} flops, then {s['budget']}, {s['epochs']} epochs each, seed {s['seed']}: "
            f"divergence on validation images, of that at {s['budget']} at once after {s['epochs']} epochs",
            s["divergence"]["two rounds"] / s["divergence"]["one round"],
            1.0,
            at_least=False,
        )
        for s in samples
    ]


def main() -> None:
    parser = parser_of(__doc__, "accuracy", seeds=[0], trains=True)
    parser.add_argument("--network", choices=TASKS, default="resnet20")
    parser.add_argument("--first", default="0.278x", help="budget of flops of the first round")
    parser.add_argument("--budget", default="0.15x", help="budget of flops of the second one")
    parser.add_argument("--epochs", type=int, default=3, help="of each round")
    args = parser.parse_args()
    samples, runs = earlier_samples("rounds"), Runs(args.network, args.data, args.runs, args.device)
    for seed in args.seeds:
        samples = with_sample(samples, sample_of(runs, args.first, args.budget, seed, args.epochs), KEYS)
        write_results("rounds", targets_of(samples), samples, command="make bench NAME=rounds DATA=...")


if __name__ == "__main__":
    main()

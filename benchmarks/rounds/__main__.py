"""Whether ranks and structures should move once more after training: a second search, from trained weights.

    python -m benchmarks.rounds --data DIR [--network resnet20] [--first 0.278x] [--budget 0.15x] [--epochs 3]
                                [--seeds 0] [--runs DIR] [--device cpu]

The network that a run reaches under a looser budget is made dense, searched and fitted again under the tighter one, as
near to what it was trained to as can be, and then trained for as many epochs again, towards the original. Beside it is
the run that goes to the tighter budget at once: one round, with the epochs of one. DIR holds what `benchmarks.accuracy`
says, whose runs are used if --runs holds them. Networks are compared on validation images, by how far their outputs are
from those that both are trained to give.
"""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

from torch import nn

from benchmarks.command import parser_of
from benchmarks.results_file import Target, earlier_samples, with_sample, write_results
from benchmarks.runs import Run, Runs, trained
from sekron_search.choice import judged
from sekron_search.errors import ConfigError
from sekron_search.model import copy_model, kronecker_layers, replace_layers
from sekron_search.progress import ConsoleReporter
from sekron_search.tensor_files import digest, write_tensors

KEYS = ("network", "first", "budget", "epochs", "mirrored_teacher", "seed")

#: Those whose metric is one by name, for of others' outputs nothing is measured.
NETWORKS = ("resnet20", "vgg", "mobilenet")


def dense(network: nn.Module) -> nn.Module:
    """A network of the same function with ordinary layers in the place of replaced ones."""
    return replace_layers(network, {name: layer.to_dense() for name, layer in kronecker_layers(network).items()})


def again(runs: Runs, first: Run, budget: str, seed: int) -> Run:
    """The run that searches the trained network of another run, as if its weights were the original's; none train."""
    home = runs.home / "rounds" / first.folder.path.name
    home.mkdir(parents=True, exist_ok=True)
    weights = home / "trained.safetensors"
    write_tensors(weights, dict(dense(first.network).state_dict()))
    return replace(runs, home=home, start=weights).run({"flops": budget}, seed=seed, epochs=0)


def sample_of(runs: Runs, first: str, budget: str, seed: int, epochs: int) -> dict[str, Any]:
    """Networks of one round and of two, before and after the last training."""
    direct = runs.run({"flops": budget}, seed=seed, epochs=epochs)
    job = direct.job
    if job.distillation is None:
        raise ConfigError(f"--epochs: expected one or more, for rounds are trained, got {epochs}")
    second = again(runs, runs.run({"flops": first}, seed=seed, epochs=epochs), budget, seed)
    one, network = direct.network, second.network
    conditions = digest([job.fingerprint(), list(network.state_dict().items())])[:10]
    home = second.folder.path.with_name(f"{second.folder.path.name}-trained-{conditions}")
    home.mkdir(exist_ok=True)
    fitted = copy_model(network)
    trained(job.distillation, network, job, home, ConsoleReporter())
    networks = {"one round": one, "two rounds, before the second training": fitted, "two rounds": network}
    unknown = [nan] * len(networks)  # a metric that is one by name is measured anew
    marks = judged(job, list(networks.values()), unknown, home / "judged.safetensors")
    return {
        "network": runs.network,
        "first": first,
        "budget": budget,
        "epochs": epochs,
        "mirrored_teacher": job.settings.finetune.mirrored_teacher,
        "seed": seed,
        "params": {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items()},
        "divergence": {name: mark.divergence for name, mark in zip(networks, marks, strict=True)},
        "validation": {name: mark.metric for name, mark in zip(networks, marks, strict=True)},
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
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
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

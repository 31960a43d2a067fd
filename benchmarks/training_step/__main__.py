"""Time of a training step of ResNet-20 (CIFAR-10) and of networks compressed from it.

    python -m benchmarks.training_step --data DIR [--runs DIR]

A step is a forward pass, cross-entropy, a backward pass and an update by Muon on 128 images; the teacher's pass is no
part of it. Networks take turns, each in the form in which fine-tuning trains it; two threads. DIR holds
data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt. Networks are found under budgets of flops and not trained.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.command import parser_of
from benchmarks.results_file import Target, write_results
from benchmarks.runs import Runs
from sekron_search.muon import Muon
from sekron_search.precision import autocast_dtype
from sekron_search.training_form import training_form

THREADS, BATCH, ROUNDS = 2, 128, 15

#: A compressed network's step may take so many times the original's.
MOST = {"0.5x": 1.2}
BUDGETS = ("0.5x", "0.25x")


class Trainee:
    """A network and its optimizer.

    Args:
        network: In the form for training.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.train()
        self.optimizer = Muon(network.parameters(), 1e-5)

    def step(self, images: Tensor, labels: Tensor, precision: torch.dtype | None) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        with torch.autocast("cpu", precision) if precision is not None else nullcontext():
            output = self.network(images)
        F.cross_entropy(output.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


def networks(data: Path, runs: Path) -> dict[str, nn.Module]:
    """By budget of flops, "1x" for the original."""
    found: dict[str, nn.Module] = {}
    for budget in BUDGETS:
        made = Runs("resnet20", data, runs).run({"flops": budget}, epochs=0)
        assert made.report["budgets"][0]["met"]
        found |= {"1x": made.job.model, budget: made.network}
    return found


def measured(trainees: dict[str, Trainee], precision: torch.dtype | None) -> dict[str, Any]:
    """Median milliseconds of a step, and the median over the rounds of its ratio to the original's."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), generator=generator)
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for number in range(ROUNDS + 2):
        for name, trainee in trainees.items():
            taken = trainee.step(images, labels, precision)
            if number >= 2:  # warm
                seconds[name].append(taken)
    return {
        name: {
            "ms": 1e3 * statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, seconds["1x"], strict=True)),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    args = parser_of(__doc__, "training_step").parse_args()
    found = networks(args.data, args.runs)
    torch.set_num_threads(THREADS)
    precisions = dict.fromkeys(
        (None, autocast_dtype("auto", torch.device("cpu")))
    )  # what nobody would train in is left
    with training_form(*found.values()):
        trainees = {name: Trainee(network) for name, network in found.items()}
        samples = {str(precision or torch.float32): measured(trainees, precision) for precision in precisions}
    targets = [
        Target(f"{budget} flops, {precision}: time of a step against the original's", own[budget]["ratio"], most, False)
        for precision, own in samples.items()
        for budget, most in MOST.items()
    ]
    write_results("training_step", targets, samples, command="make bench NAME=training_step DATA=...")


if __name__ == "__main__":
    main()

"""Runs of the package on a trained network, kept in a folder, for all benchmarks that make some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from benchmarks.tasks import TASKS, Task
from sekron_search import load
from sekron_search.finetune import Distillation
from sekron_search.job import Job
from sekron_search.jobs import job_from_config
from sekron_search.learning_rate import tuned
from sekron_search.progress import ConsoleReporter, Reporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder


@dataclass(frozen=True)
class Runs:
    """Runs of a network.

    Args:
        network: One of `TASKS`.
        data: Holds data/cifar10_jpeg.tar.xz, data/sr_hr.tar and models/resnet20_cifar10_jpeg.pt.
        home: Folder of the runs, of their tables, and of the weights of networks that have to be trained.
        device: On which compressed networks are fine-tuned.
        start: Weights of the network, in the place of those that are given or trained.
    """

    network: str
    data: Path
    home: Path
    device: str = "cpu"
    start: Path | None = None

    @property
    def task(self) -> Task:
        """What the network is for."""
        return TASKS[self.network]

    @cached_property
    def weights(self) -> Path:
        """Of the network, which is trained if there are none."""
        if self.start is not None:
            return self.start
        if self.task.given is not None:
            return self.task.given(self.data)
        path = self.home / f"{self.network}.safetensors"
        if not path.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            self.task.train(self.data, path)
        return path

    def run(self, budget: Mapping[str, str], *, seed: int = 0, epochs: int) -> Run:
        """A run under a budget.

        Args:
            budget: As in a configuration.
            seed: Of everything that is random.
            epochs: Of fine-tuning.
        """
        config = self.task.config(
            self.data,
            weights=self.weights,
            finetune={
                **yaml.safe_load(self.task.template.read_text())["finetune"],
                "epochs": epochs,
                "device": self.device,
                # Networks that are given were trained on all training images, those for validation too.
                "choice": "divergence" if self.task.given is not None else "metric",
            },
            budget=dict(budget),
            seed=seed,
            tables=(self.home / "tables").resolve(),
        )
        asked = "-".join(f"{name}-{bound}" for name, bound in budget.items())
        folder = RunFolder(self.home / f"{self.network}-{asked}-epochs-{epochs}-seed-{seed}")
        return Run(job_from_config(config), folder)


@dataclass(frozen=True)
class Run:
    """A run, which is made, or gone on with, when its report is asked for.

    Args:
        job: What it does.
        folder: Where it is kept.
    """

    job: Job
    folder: RunFolder

    @cached_property
    def report(self) -> dict[str, Any]:
        """Of the finished run."""
        return run(self.job, self.folder, ConsoleReporter(), resume=True)

    @property
    def network(self) -> nn.Module:
        """The compressed network of the run, which is made for it."""
        _ = self.report
        return load(self.folder.path)


def trained(
    distillation: Distillation, network: nn.Module, job: Job, home: Path, reporter: Reporter
) -> list[dict[str, float]]:
    """The curve of a network's training.

    Args:
        distillation: How it is trained, but for a learning rate that has to be found.
        network: It is changed.
        job: Measures it after every epoch.
        home: Folder in which rate and checkpoint are kept; a training that was killed is gone on with.
        reporter: Told of the progress.
    """
    distillation = tuned(distillation, network, home / "learning_rate.json", reporter)
    with reporter.task("fine-tuning", distillation.total_batches) as task:
        return distillation.train(
            network,
            checkpoint=home / "checkpoint.pt",
            measure=job.measure_in_training,
            after_epoch=lambda row: True,
            progress=task.update,
        )

"""Runs of the package on a network for CIFAR-10, kept in a folder, for all benchmarks that make some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cifar10.config import TEMPLATE, config_of, resnet20_weights
from benchmarks.cifar10.train import train
from sekron_search.api import job_from_config
from sekron_search.job import Job
from sekron_search.progress import ConsoleReporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder


@dataclass(frozen=True)
class Runs:
    """Runs of a network.

    Args:
        network: One of `NETWORKS`.
        data: Holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt.
        home: Folder of the runs, of their tables, and of the weights of networks that have to be trained.
    """

    network: str
    data: Path
    home: Path

    @cached_property
    def weights(self) -> Path:
        """Of the network, which is trained if there are none."""
        if self.network == "resnet20":
            return resnet20_weights(self.data)
        path = self.home / f"{self.network}.safetensors"
        if not path.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            train(self.network, self.data, path)
        return path

    def job(self, budget: Mapping[str, str], *, seed: int = 0, epochs: int) -> Job:
        """What a run does.

        Args:
            budget: As in a configuration.
            seed: Of everything that is random.
            epochs: Of fine-tuning.
        """
        config = config_of(
            self.data,
            network=self.network,
            weights=self.weights,
            finetune={**yaml.safe_load(TEMPLATE.read_text())["finetune"], "epochs": epochs},
            budget=dict(budget),
            seed=seed,
            tables=(self.home / "tables").resolve(),
        )
        return job_from_config(config)

    def folder(self, budget: Mapping[str, str], *, seed: int = 0, epochs: int) -> RunFolder:
        """Where a run is kept."""
        asked = "-".join(f"{name}-{bound}" for name, bound in budget.items())
        return RunFolder(self.home / f"{self.network}-{asked}-epochs-{epochs}-seed-{seed}")

    def report(self, budget: Mapping[str, str], *, seed: int = 0, epochs: int) -> dict[str, Any]:
        """Of a run, gone on with where it was stopped."""
        folder = self.folder(budget, seed=seed, epochs=epochs)
        return run(self.job(budget, seed=seed, epochs=epochs), folder, ConsoleReporter(), resume=True)

"""The trained networks that benchmarks compress and fine-tune: their images, their metric, and what that is told in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.cifar10 import config as cifar10_config
from benchmarks.cifar10.train import train as train_classifier
from benchmarks.super_resolution import config as super_resolution_config
from benchmarks.super_resolution.train import train as train_super_resolution
from sekron_search.config import Config


@dataclass(frozen=True)
class Task:
    """A network and what it is for.

    Args:
        config: `config(data, weights=path, **changes)`, the configuration of a run; data is the folder of all data.
        template: YAML that the configurations are made of.
        train: `train(data, out)`, which makes the weights where none are given.
        given: From the folder of all data to the weights, where they are given.
        unit: What a loss of the metric is told in.
        factor: Of the metric, to that unit.
        splits: By "test", and by "validation" where its loss is asked for too, what the images are called.
    """

    config: Callable[..., Config]
    template: Path
    train: Callable[[Path, Path], None]
    given: Callable[[Path], Path] | None
    unit: str
    factor: float
    splits: Mapping[str, str]


def _classifier(network: str, given: Callable[[Path], Path] | None = None) -> Task:
    return Task(
        partial(cifar10_config.config_of, network=network),
        cifar10_config.TEMPLATE,
        partial(train_classifier, network),
        given,
        unit="points of top-1",
        factor=100,
        splits={"test": "CIFAR-10"},
    )


TASKS = {
    "resnet20": _classifier("resnet20", cifar10_config.resnet20_weights),
    "vgg": _classifier("vgg"),
    "mobilenet": _classifier("mobilenet"),
    "edsr": Task(
        super_resolution_config.config_of,
        super_resolution_config.TEMPLATE,
        train_super_resolution,
        None,
        unit="dB",
        factor=1,
        splits={"test": "Set5", "validation": "Set14"},
    ),
}

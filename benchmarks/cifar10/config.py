"""Configurations of runs on CIFAR-10, for all benchmarks that make some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.command import run_config
from sekron_search.config import Config

TEMPLATE = Path(__file__).parent / "config.yaml"

#: By name, the factory of a network.
NETWORKS = {
    "resnet20": "benchmarks.cifar10.resnet:ResNet20",
    "vgg": "benchmarks.cifar10.vgg:Vgg",
    "mobilenet": "benchmarks.cifar10.mobilenet:MobileNetV2",
}


def archive_of(data: Path) -> Path:
    """The images, below the folder that holds the data."""
    return data / "data/cifar10_jpeg.tar.xz"


def resnet20_weights(data: Path) -> Path:
    """ResNet-20's weights, below the folder that holds the data."""
    return data / "models/resnet20_cifar10_jpeg.pt"


def config_of(
    data: Path,
    template: Path = TEMPLATE,
    *,
    network: str = "resnet20",
    weights: Path | None = None,
    **changes: Any,
) -> Config:
    """A configuration, with a network and the images of a folder.

    Args:
        data: Holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt.
        template: YAML of everything but model and data.
        network: One of `NETWORKS`.
        weights: Of the network; those of ResNet-20 lie in the folder.
        changes: Keys that take the place of the template's.
    """
    return run_config(
        template,
        model=NETWORKS[network],
        weights=weights or resnet20_weights(data),
        data="benchmarks.cifar10.data:cifar10",
        archive=archive_of(data),
        **changes,
    )

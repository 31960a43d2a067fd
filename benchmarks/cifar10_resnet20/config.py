"""Configurations of runs on ResNet-20 and CIFAR-10, for all benchmarks that make some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.command import run_config
from sekron_search.config import Config

TEMPLATE = Path(__file__).parent / "config.yaml"


def config_of(data: Path, template: Path = TEMPLATE, **changes: Any) -> Config:
    """A configuration, with the network and the images of a folder.

    Args:
        data: Holds data/cifar10_jpeg.tar.xz and models/resnet20_cifar10_jpeg.pt.
        template: YAML of everything but model and data.
        changes: Keys that take the place of the template's.
    """
    return run_config(
        template,
        model="benchmarks.cifar10_resnet20.network:ResNet20",
        weights=data / "models/resnet20_cifar10_jpeg.pt",
        data="benchmarks.cifar10_resnet20.data:cifar10",
        archive=data / "data/cifar10_jpeg.tar.xz",
        **changes,
    )

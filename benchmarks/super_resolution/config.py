"""Configurations of runs on super-resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.command import run_config
from sekron_search.config import Config

TEMPLATE = Path(__file__).parent / "config.yaml"


def archive_of(data: Path) -> Path:
    """The images, below the folder that holds the data."""
    return data / "data/sr_hr.tar"


def config_of(data: Path, *, weights: Path, **changes: Any) -> Config:
    """A configuration, with the EDSR-like network and the images of a folder.

    Args:
        data: Holds data/sr_hr.tar.
        weights: Of the network.
        changes: Keys that take the place of the template's.
    """
    return run_config(
        TEMPLATE,
        model="benchmarks.super_resolution.network:Edsr",
        weights=weights,
        data="benchmarks.super_resolution.data:super_resolution",
        archive=archive_of(data),
        **changes,
    )

"""What benchmarks that make runs have in common: their command line, and how a configuration is put together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sekron_search.config import Config


def parser_of(
    doc: str | None, runs: str, seeds: Sequence[int] = (), *, trains: bool = False
) -> argparse.ArgumentParser:
    """A command line of --data, --runs, and --seeds and --device where they mean something.

    Args:
        doc: What the benchmark does.
        runs: Where its runs are kept by default, below `runs/`.
        seeds: By default.
        trains: Whether networks are fine-tuned.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs") / runs)
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    if trains:
        parser.add_argument("--device", default="cpu", help="where networks are fine-tuned: cpu, cuda")
    return parser


def run_config(template: Path, *, model: str, weights: Path, data: str, archive: Path, **changes: Any) -> Config:
    """The configuration of a run.

    Args:
        template: YAML of everything but model and data.
        model: Factory of the network.
        weights: Its weights.
        data: Factory of the data, a function of the archive.
        archive: The images.
        changes: Keys that take the place of the template's.
    """
    return Config.model_validate(
        {
            **yaml.safe_load(template.read_text()),
            **changes,
            "model": {"factory": model, "weights": weights.resolve()},
            "data": {"source": "factory", "factory": data, "kwargs": {"archive": str(archive.resolve())}},
        }
    )

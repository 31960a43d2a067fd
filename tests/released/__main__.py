"""Writes the files of this version that later ones have to open, with what they hold.

    python -m tests.released

They go to tests/released/VERSION, which is written anew until the version is released, and never after.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import yaml

import sekron_search
from sekron_search import load
from sekron_search.api import job_from_config
from sekron_search.config import Config
from sekron_search.files import write_json
from sekron_search.progress import ConsoleReporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.search.budget import Budget
from sekron_search.select import select
from sekron_search.tensor_files import write_tensors
from tests.cases import CONFIG, blobs, write_config
from tests.released import BUDGETS, STRUCTURES, described

HOME = Path(__file__).parent

#: What is kept of a run folder: all that public commands read.
KEPT = (
    *("run.json", "config.yaml", "report.json", "search.json", "network.json", "environment.json", "layout.json"),
    *("original.json", "calibration.json", "profile.yaml", "learning_rate.json", "compressed", "candidates"),
)


def make(home: Path) -> None:
    """Write them.

    Args:
        home: Folder of a version.
    """
    home.mkdir(parents=True)
    changes = {"params: 0.8x": "latency_ms: 2.0x", "trials: 8": "trials: 4"}
    with tempfile.TemporaryDirectory() as folder:
        config, whole = write_config(Path(folder), CONFIG, **changes), RunFolder(Path(folder) / "run")
        report = run(job_from_config(Config.load(config)), whole, ConsoleReporter(), resume=False)
        answers = [select(whole, Budget.of(b)).to_json() for b in BUDGETS]
        for name in KEPT:
            if (whole.path / name).is_dir():
                shutil.copytree(whole.path / name, home / "run" / name, ignore=shutil.ignore_patterns("checkpoint*"))
            elif (whole.path / name).exists():
                (home / "run").mkdir(exist_ok=True)
                shutil.copyfile(whole.path / name, home / "run" / name)
        x = blobs(8).tensors[0]
        write_tensors(home / "network.safetensors", {"input": x, "output": load(whole.path)(x)})
    write_json(home / "held.json", {"report": report, "selected": answers, "structures": described(STRUCTURES)})
    (home / "structures.yaml").write_text(yaml.safe_dump(list(STRUCTURES)))


if __name__ == "__main__":
    version = HOME / sekron_search.__version__
    if version.exists():
        shutil.rmtree(version)
    make(version)
    print(f"written to {version}", file=sys.stderr)

"""Writes the files of this version that later ones have to open, with what they hold.

    python -m tests.released [--again]

They go to tests/released/VERSION. With --again it is written anew, until the version is released, and never after.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import yaml

import sekron_search
from sekron_search import DeviceProfile, load
from sekron_search.config import Config
from sekron_search.costs.design import design
from sekron_search.costs.sampling import measure_operations
from sekron_search.files import write_json
from sekron_search.jobs import job_from_config
from sekron_search.progress import ConsoleReporter
from sekron_search.run import run
from sekron_search.rundir import RunFolder
from sekron_search.runtimes.registry import make_runtime
from sekron_search.search.budget import Budget
from sekron_search.select import select, with_network
from sekron_search.tensor_files import write_tensors
from tests.cases import CONFIG, blobs, write_config
from tests.released import BUDGETS, STRUCTURES, described, predicted_ms

HOME = Path(__file__).parent

#: What is kept of a run folder: all that public commands read.
KEPT = (
    *("run.json", "config.yaml", "report.json", "search.json", "network.json", "environment.json", "layout.json"),
    *("original.json", "calibration.json", "profile.yaml", "learning_rate.json", "compressed", "candidates"),
    *("audit.json", "selections"),
)


def make(home: Path) -> None:
    """Write them.

    Args:
        home: Folder of a version.
    """
    home.mkdir(parents=True)
    changes = {"params: 0.8x": "latency_ms: 2.0x", "trials: 8": "trials: 4", "epochs: 2, ": "epochs: 1, "}
    text = CONFIG + "audit: {candidates: 4, budgets: [{flops: 0.7x}, {flops: 0.5x}]}\n"
    with tempfile.TemporaryDirectory() as folder:
        config, whole = write_config(Path(folder), text, **changes), RunFolder(Path(folder) / "run")
        report = run(job_from_config(Config.load(config)), whole, ConsoleReporter(), resume=False)
        answers = [select(whole, Budget.of(b)) for b in BUDGETS]
        written = with_network(whole, answers[-1], ConsoleReporter())
        for name in KEPT:
            if (whole.path / name).is_dir():
                shutil.copytree(whole.path / name, home / "run" / name, ignore=shutil.ignore_patterns("checkpoint*"))
            elif (whole.path / name).exists():
                (home / "run").mkdir(exist_ok=True)
                shutil.copyfile(whole.path / name, home / "run" / name)
        x = blobs(8).tensors[0]
        outputs = {"output": load(whole.path)(x), "selected": load(whole.selections / written.name)(x)}
        write_tensors(home / "network.safetensors", {"input": x, **outputs})
    held = {"report": report, "selected": [a.to_json() for a in answers], "selection": written.name}
    device = measured_device()
    (home / "device.yaml").write_text(device.to_yaml())
    held |= {"predicted_ms": predicted_ms(device), "structures": described(STRUCTURES)}
    write_json(home / "held.json", held)
    (home / "structures.yaml").write_text(yaml.safe_dump(list(STRUCTURES)))


def measured_device() -> DeviceProfile:
    """A profile of this machine with a latency model, of few operations and small ones."""
    runtime = make_runtime("pytorch-eager", num_threads=1, device="cpu", memory_format="contiguous")
    few = [o for o in design(0, quick=True) if o.moved_bytes < 1e5 and o.flops < 1e6][::8]
    profile = DeviceProfile.empty(runtime)
    measure_operations(profile.costly(few), runtime, after_chunk=profile.operations.update)
    profile.fit(granularity=1, node_ms=0.001)
    return profile


def main(arguments: list[str], home: Path) -> None:
    """Write them, beside those that are there and in their place only if that is asked for.

    Args:
        arguments: Of the command line.
        home: Folder of the version.
    """
    if home.exists() and arguments != ["--again"]:
        raise SystemExit(f"{home} is there; --again writes it anew, which only a version that is not released may")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / home.name)
        shutil.rmtree(home, ignore_errors=True)
        shutil.move(Path(folder) / home.name, home)
    print(f"written to {home}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:], HOME / sekron_search.__version__)

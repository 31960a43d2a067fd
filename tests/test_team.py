"""Processes that torchrun starts train as one would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sekron_search import load
from sekron_search.errors import DataError
from sekron_search.files import read_json
from sekron_search.team import ALONE, Team
from sekron_search.tensor_files import read_tensors
from tests.cases import write_config
from tests.team_training import SIZES, trained

ROOT = Path(__file__).parents[1]


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_samples_of_a_batch_are_shared_out_evenly() -> None:
    parts = [list(range(11))[Team(rank, 3).part(11)] for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert list(range(11))[ALONE.part(11)] == list(range(11))
    with pytest.raises(DataError, match="a batch of 2 samples for 3 processes"):
        Team(0, 3).part(2)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    """Without batch-norm the same; a training that was stopped after an epoch is gone on with by all."""
    done = torchrun("-m", "tests.team_training", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in SIZES:
        found = read_json(tmp_path / f"{name}.json")["curve"]
        (tmp_path / name).mkdir()
        curve, state = trained(name, tmp_path / name)
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in curve], rel=1e-4)
        own = read_tensors(tmp_path / f"{name}.safetensors")
        for key, value in state.items():
            torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-5)


def test_a_run_among_two_processes(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    out = tmp_path / "run"
    done = torchrun("-m", "tests.team_command", "run", str(config), "--out", str(out))
    assert done.returncode == 0, done.stderr
    # A thread of gloo that is left aborts the interpreter now and then.
    assert re.findall("threads at the end: (.*)", done.stderr) == ["1", "1"]
    assert done.stdout.count("report:") == 1  # what one process says, not two
    report = read_json(out / "report.json")
    assert len(report["curve"]) == 2
    assert all(budget["met"] for budget in report["budgets"])
    assert not load(out).training
    other = next(
        row["trial"] for row in report["front"] if row["trial"] not in {c["trial"] for c in report["candidates"]}
    )
    done = torchrun("-m", "sekron_search.cli", "finish", str(out), "--trial", str(other), "--export", "safetensors")
    # A trial that misses the budget ends with 3, which torchrun tells but does not hand on.
    assert done.returncode == 0 or re.search(r"exitcode *: 3\b", done.stderr), done.stderr
    assert done.stdout.count("report:") == 1
    assert len(read_json(out / "finished" / f"trial-{other}" / "report.json")["curve"]) == 2


@pytest.mark.slow
def test_another_budget_of_a_run_of_objects_among_two_processes(tmp_path: Path) -> None:
    done = torchrun("-m", "tests.team_finishing", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("report: ") == 1
    report = read_json(tmp_path / "smaller" / "report.json")
    assert [(b["name"], b["met"]) for b in report["budgets"]] == [("params", True)]
    assert len(report["curve"]) == 1


def test_what_fails_in_the_first_process_ends_all(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{"flops: 0.6x": "flops: 0.0001x"})
    done = torchrun("-m", "sekron_search.cli", "run", str(config), "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "best reachable" in done.stderr or "cannot be" in done.stderr

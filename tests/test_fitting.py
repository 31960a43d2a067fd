"""Tables from worker processes: the same as from here, errors that name the layer, and no process left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sekron_search import fitting
from sekron_search.calibration import collect_metrics, memory_groups
from sekron_search.errors import WorkerError
from sekron_search.fitting import FitJob, Fitter
from sekron_search.inspection import inspect_model
from sekron_search.model import LayerInfo, layer_weight
from sekron_search.search.space import SearchSpace
from sekron_search.tables import FittedLayer, load_table
from tests.cases import blobs, small_net
from tests.processes import wait_until

SPACE = SearchSpace(families=("sekron", "cp"), max_factors=2, rank_levels=2, max_options=3)


def jobs() -> list[FitJob]:
    model, images = small_net(), blobs(64).tensors[0]
    layers = inspect_model(model, images).layers
    metrics = collect_metrics(model, layers, [(images,)])
    return [FitJob(f"key-{i.name}", i, layer_weight(model, i), metrics[i.name], SPACE, 4, 3) for i in layers]


def fitted(cache: Path, workers: int) -> dict[str, FittedLayer]:
    with Fitter(cache, workers) as fitter:
        return {f.table.name: f for f in fitter.fit(jobs())}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are worth it, however little there is to do."""
    monkeypatch.setattr(fitting, "LEAST_SECONDS", 0.0)


def test_a_job_survives_its_files(tmp_path: Path) -> None:
    job = jobs()[0]
    job.save(tmp_path / "job.json")
    loaded = FitJob.load(tmp_path / "job.json")
    assert (loaded.key, loaded.info, loaded.space) == (job.key, job.info, job.space)
    assert torch.equal(loaded.metric.moment, job.metric.moment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("at_once")
def test_workers_give_the_same_tables(tmp_path: Path) -> None:
    here, there = fitted(tmp_path / "here", 1), fitted(tmp_path / "there", 2)
    assert sorted(here) == sorted(there)
    for name, table in here.items():
        assert table.table == there[name].table
        for own, other in zip(table.factors, there[name].factors, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    # What was handed over is gone, what was fitted is there.
    assert {p.suffix for p in (tmp_path / "there").iterdir()} == {".json", ".safetensors"}
    assert all(load_table(tmp_path / "there", f"key-{name}", name) is not None for name in here)


@pytest.mark.usefixtures("at_once")
def test_a_worker_that_dies_is_an_error_that_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = fitting._Worker.ask

    def killed(worker: fitting._Worker, line: str) -> str:
        if "conv2" in line:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        return ask(worker, line)

    monkeypatch.setattr(fitting._Worker, "ask", killed)
    with pytest.raises(WorkerError, match=r"layer 'conv2'.*ended \(killed"):
        fitted(tmp_path, 2)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.usefixtures("at_once")
def test_a_fit_that_fails_in_a_worker_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = FitJob.save

    def damaged(job: FitJob, path: Path) -> None:
        save(job, path)
        if job.info.name == "conv2":
            path.with_suffix(".safetensors").write_bytes(b"nothing")

    monkeypatch.setattr(FitJob, "save", damaged)
    with pytest.raises(WorkerError, match=r"layer 'conv2'.*truncated or damaged"):
        fitted(tmp_path, 2)


@pytest.mark.usefixtures("at_once")
def test_workers_end_when_the_fits_are_given_up(tmp_path: Path) -> None:
    with Fitter(tmp_path, 2) as fitter:
        next(iter(fitter.fit(jobs())))
        workers = [worker.process for worker in fitter._started]
        assert len(workers) == 2
    assert all(process.poll() is not None for process in workers)


def test_what_killed_runs_left_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    left, used, new = (tmp_path / f".fit-{name}" for name in ("left", "used", "new"))
    for folder in (left, used, new):
        folder.mkdir()
        (folder / "job.json").touch()
    with (used / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for folder in (left, used):
            os.utime(folder, (0, 0))
        fitting._sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".fit-new", ".fit-used"]


def test_a_worker_ends_with_its_standard_input(tmp_path: Path) -> None:
    """Also when the process that started it is killed and can say no goodbye."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            f"c = [sys.executable, '-m', 'sekron_search.fit_worker', {str(tmp_path)!r}]\n"
            "p = subprocess.Popen(c, stdin=subprocess.PIPE)\n"
            "print(p.pid, flush=True)\n"
            "time.sleep(600)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert _runs(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not _runs(worker), "the worker goes on without its parent")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_groups_of_layers_fit_into_memory_and_give_the_same_metrics() -> None:
    model, images = small_net(), blobs(64).tensors[0]
    layers = inspect_model(model, images).layers
    sizes = {
        i.name: i.geometry.groups * (i.weight_shape[1] * i.weight_shape[2] * i.weight_shape[3]) ** 2 for i in layers
    }

    def bytes_of(group: list[LayerInfo]) -> int:
        return 8 * sum(sizes[i.name] for i in group)

    most = 8 * max(sizes.values())
    groups = memory_groups(layers, most)
    assert len(groups) > 1
    assert [i for group in groups for i in group] == list(layers)
    assert all(bytes_of(group) <= most for group in groups)
    assert [len(g) for g in memory_groups(layers, 1)] == [1] * len(layers)
    whole = collect_metrics(model, layers, [(images,)])
    for group in groups:
        for name, metric in collect_metrics(model, group, [(images,)]).items():
            assert torch.equal(metric.moment, whole[name].moment)
            assert torch.equal(metric.mean, whole[name].mean)


@pytest.mark.usefixtures("at_once")
def test_a_full_disk_is_an_error_that_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(job: FitJob, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FitJob, "save", full)
    with pytest.raises(WorkerError, match=r"layer 'conv\d'.*No space left"):
        fitted(tmp_path, 2)

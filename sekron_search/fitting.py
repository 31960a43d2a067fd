"""Tables of many layers side by side: in worker processes where there is enough to do, else here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from sekron_search.errors import SekronError, WorkerError
from sekron_search.files import read_json, write_json
from sekron_search.kron.geometry import ConvGeometry
from sekron_search.kron.metric import InputMetric
from sekron_search.model import LayerInfo
from sekron_search.runtimes.base import threads
from sekron_search.search.space import SearchSpace
from sekron_search.tables import FittedLayer, build_layer_table, load_table, save_table
from sekron_search.tensor_files import read_tensors, write_tensors

#: Work of less is done here: workers take seconds to start.
LEAST_SECONDS = 10.0

#: Rough times of an option: of one evaluation of its error by itself, and of all of them per product of two numbers.
SECONDS_PER_EVALUATION, SECONDS_PER_PRODUCT = 1.5e-3, 1.5e-10

#: Folders of jobs on their way to a worker, the file that is locked as long as their owner lives, and their age in
#: seconds from which on it must be.
PREFIX, LOCK, JUST_MADE_S = ".fit-", ".lock", 60.0

#: What a worker says when it cannot go on is looked for in so many last characters of its log.
LOG_TAIL = 2000


@dataclass(frozen=True)
class FitJob:
    """All that a layer's table depends on.

    Args:
        key: Under which the table is cached.
        info: The layer.
        weight: (G, F, C, *kernel).
        metric: Of the layer's calibration inputs.
        space: Which structures.
        bytes_per_sample, steps: As for `build_layer_table`.
    """

    key: str
    info: LayerInfo
    weight: Tensor
    metric: InputMetric
    space: SearchSpace
    bytes_per_sample: int
    steps: int

    @property
    def seconds(self) -> float:
        """About how long the fit takes."""
        groups, rows = self.weight.shape[:2]
        columns = prod(self.weight.shape[2:])
        products = groups * rows * columns * (rows + columns)
        return self.space.max_options * (self.steps * SECONDS_PER_EVALUATION + products * SECONDS_PER_PRODUCT)

    def fit(self) -> FittedLayer:
        """The table."""
        sizes = {"bytes_per_sample": self.bytes_per_sample, "steps": self.steps}
        return build_layer_table(self.info, self.weight, self.metric, self.space, **sizes)

    def save(self, path: Path) -> None:
        """Write it to two files, for another process."""
        tensors = {"weight": self.weight, "moment": self.metric.moment, "mean": self.metric.mean}
        if self.metric.curvature is not None:
            tensors["curvature"] = self.metric.curvature
        write_tensors(path.with_suffix(".safetensors"), tensors)
        plain = {"key": self.key, "bytes_per_sample": self.bytes_per_sample, "steps": self.steps}
        write_json(path, {**plain, "info": asdict(self.info), "space": self.space.model_dump(mode="json")})

    @classmethod
    def load(cls, path: Path) -> FitJob:
        """What `save` wrote; the files are deleted."""
        data, tensors = read_json(path), read_tensors(path.with_suffix(".safetensors"))
        for file in (path, path.with_suffix(".safetensors")):
            file.unlink()
        info = {name: _tuples(value) for name, value in data["info"].items()}
        geometry = {name: _tuples(value) for name, value in info.pop("geometry").items()}
        metric = InputMetric(tensors["moment"], tensors["mean"], tensors.get("curvature"))
        return cls(
            data["key"],
            LayerInfo(**info, geometry=ConvGeometry(**geometry)),
            tensors["weight"],
            metric,
            SearchSpace.model_validate(data["space"]),
            data["bytes_per_sample"],
            data["steps"],
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


class Fitter:
    """Fits tables and puts them into a cache; every process works with one thread, so that none changes a table.

    Args:
        cache: Folder of the tables.
        workers: Processes.
    """

    def __init__(self, cache: Path, workers: int) -> None:
        self.cache, self.workers = cache, workers
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._started: list[_Worker] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Fitter:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._started:
            worker.stop()
        self._stack.close()

    def fit(self, jobs: Sequence[FitJob]) -> Iterator[FittedLayer]:
        """The tables of the jobs, as they come in.

        Raises:
            WorkerError: If a worker ended, or could not fit a layer; names the layer.
        """
        cuda = any(job.metric.moment.is_cuda for job in jobs)
        count = min(self.workers, len(jobs))
        if cuda or count <= 1 or sum(job.seconds for job in jobs) < LEAST_SECONDS:
            for job in jobs:
                with threads(None if cuda else 1):
                    fitted = job.fit()
                save_table(self.cache, job.key, fitted)
                yield fitted
            return
        self._start(count)
        with ThreadPoolExecutor(count) as pool:
            waiting: list[Future[FittedLayer]] = []
            try:
                waiting += [pool.submit(self._fit, j) for j in sorted(jobs, key=lambda job: -job.seconds)]
                for done in as_completed(waiting):
                    yield done.result()
            except BaseException:
                for future in waiting:
                    future.cancel()
                for worker in self._started:
                    worker.stop()
                raise

    def _start(self, count: int) -> None:
        if not self._started:
            self.cache.mkdir(parents=True, exist_ok=True)
            _sweep(self.cache)
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=self.cache)))
            fcntl.flock(self._stack.enter_context((self._folder / LOCK).open("w")), fcntl.LOCK_EX)
        for number in range(len(self._started), count):
            worker = _Worker(self.cache, self._folder / f"{number}.log")
            self._started.append(worker)
            self._idle.put(worker)

    def _fit(self, job: FitJob) -> FittedLayer:
        path, name = self._folder / f"{job.key}.json", job.info.name
        try:
            job.save(path)
        except OSError as error:
            raise WorkerError(f"layer '{name}': cannot write to {self.cache}: {error}") from error
        worker = self._idle.get()
        try:
            answer = worker.ask(str(path))
        finally:
            self._idle.put(worker)
        if answer:
            raise WorkerError(f"layer '{name}': its options could not be fitted: {answer}")
        fitted = load_table(self.cache, job.key, name)
        if fitted is None:
            raise WorkerError(f"layer '{name}': its table in {self.cache} cannot be read back; is the disk full?")
        return fitted


def _sweep(cache: Path) -> None:
    """Remove what killed processes have left of the jobs that they handed over."""
    for folder in cache.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it is in use, or another process removes it at the same time
            if time.time() - folder.stat().st_mtime < JUST_MADE_S:
                continue
            with (folder / LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


class _Worker:
    """A process that fits what it is told on its standard input, and ends with it."""

    def __init__(self, cache: Path, log: Path) -> None:
        # Where this process finds the user's modules, the worker finds them too: families of the user's own.
        paths = os.pathsep.join(dict.fromkeys([str(Path(__file__).parent.parent), *filter(None, sys.path)]))
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sekron_search.fit_worker", str(cache)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )

    def ask(self, line: str) -> str:
        """Why a job failed; empty if it did not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except (OSError, ValueError):  # a pipe that is broken, or closed meanwhile
            answer = ""
        if answer:
            return str(json.loads(answer)["error"])
        code = self.process.wait()
        tail = self._log.read_text(errors="replace")[-LOG_TAIL:].strip() if self._log.exists() else ""
        reason = "killed, perhaps for want of memory" if code == -9 else f"exit status {code}"
        return f"the worker process ended ({reason}){': ' if tail else ''}{tail}"

    def stop(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not written yet has nobody to read it
                    pipe.close()


def work(cache: Path, lines: Iterator[str], answer: Any) -> None:
    """What a worker does: fit job after job; `answer` is told the error of each, empty if there was none."""
    torch.set_num_threads(1)
    for line in lines:
        error = ""
        try:
            job = FitJob.load(Path(line.strip()))
            save_table(cache, job.key, job.fit())
        except SekronError as problem:
            error = str(problem)
        except Exception as problem:  # whatever it is, the parent names the layer
            error = f"{type(problem).__name__}: {problem}"
        answer(error)

"""Latency by the clock: interleaved, repeated, without gradients, as medians with their noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sekron_search.model import as_inputs
from sekron_search.runtimes.base import Runtime

#: Larger blocks are always given back (DEFAULT_MMAP_THRESHOLD_MAX of glibc, less a page for its own use).
_LARGEST_POOLED_BYTES = 32 * 2**20 - 4096

#: Share of the time for which a process is busy that works by itself, however many others there are.
_LEAST_BUSY = 0.2


@dataclass(frozen=True)
class Latency:
    """Median milliseconds per call, and the half-width of the interquartile range of its samples."""

    median_ms: float
    noise_ms: float
    samples: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Latency:
        """Summary of raw samples."""
        low, median, high = np.percentile(samples_ms, [25, 50, 75])
        return cls(float(median), float(high - low) / 2, len(samples_ms))

    def scaled(self, factor: float) -> Latency:
        """As it would be on a clock that much slower."""
        return Latency(self.median_ms * factor, self.noise_ms * factor, self.samples)


def measure_callables(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    min_sample_s: float = 1e-3,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Latency]:
    """Time every call once per round, all in turn, so that drifts of the machine hit all alike.

    A sample repeats a fast call until `min_sample_s` is filled, and divides.

    Args:
        calls: What to time, by name.
        rounds: Samples of each; the median is reported.
        min_sample_s: Shortest time of one sample.
        device: Synchronised before the clock is read, if it is a GPU.
        progress: Called after every round with the number of rounds done.
    """
    settle_allocator()
    inner = {}
    with torch.inference_mode():
        for name, call in calls.items():
            call()
            inner[name] = max(1, int(np.ceil(min_sample_s / max(_seconds(call, 2, device), 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(1, rounds + 1):
            for name, call in calls.items():
                samples[name].append(1e3 * _seconds(call, inner[name], device))
            if progress is not None:
                progress(done)
    return {name: Latency.of(values) for name, values in samples.items()}


def measure_networks(
    networks: Mapping[str, nn.Module], example_inputs: Any, runtime: Runtime, *, rounds: int = 21
) -> dict[str, Latency]:
    """Latency of whole networks, in evaluation mode, on the same inputs, interleaved.

    Args:
        networks: By name; as they are deployed, for nothing is folded here.
        example_inputs: What they take.
        runtime: What runs them.
        rounds: Samples of each.
    """
    inputs = as_inputs(example_inputs)
    with runtime.active():
        calls = {name: runtime.compile(network, inputs) for name, network in networks.items()}
        return measure_callables(calls, rounds=rounds, device=runtime.device)


def settle_allocator() -> None:
    """Bring glibc's allocator into the state that it has in any process that has worked for a while.

    Until a block of nearly 32 MB was freed once, it gives the memory of large outputs back to the system and faults
    its pages in anew in the next call. That was measured to take up to ten times as long as the operation itself, and
    whether it happens would depend on what else the process did before.
    """
    torch.empty(_LARGEST_POOLED_BYTES, dtype=torch.uint8).fill_(0)


class Stopwatch:
    """Started when made. Where torch runs on one thread of a CPU, time in which the process did not run is left out.

    Other processes that take turns on the core only add time, and were measured to double it. Where the process was
    busy for so little that the work must have been done elsewhere, all time counts.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._alone = (device is None or device.type == "cpu") and torch.get_num_threads() == 1
        synchronize(device)
        self._busy, self._start = time.process_time(), time.perf_counter()

    def seconds(self) -> float:
        """Since the start."""
        synchronize(self._device)
        passed, busy = time.perf_counter() - self._start, time.process_time() - self._busy
        return busy if self._alone and _LEAST_BUSY * passed < busy < passed else passed


def _seconds(call: Callable[[], object], repeats: int, device: torch.device | None) -> float:
    watch = Stopwatch(device)
    for _ in range(repeats):
        call()
    return watch.seconds() / repeats


def synchronize(device: torch.device | None) -> None:
    """Wait for a GPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)

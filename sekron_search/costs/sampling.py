"""Operations by the clock, as they run within a network: once each, on an input just written, other weights between.

A loop over one operation keeps its weights in the nearest cache and was measured up to 15 % faster than the same
operation within a network; one call of each in turn, its input written just before, was within some percent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from sekron_search.costs.anchored import node_samples
from sekron_search.costs.build import build
from sekron_search.costs.measure import Latency, Stopwatch, settle_allocator
from sekron_search.costs.operations import Operation
from sekron_search.runtimes.base import Compiled, Runtime

#: Operations that take turns, as many as a network has, and the bytes that they move at most.
CHUNK, CHUNK_BYTES = 32, 4e8

#: Samples of each operation by the runtime's clock, and how many count: the fastest, for that clock does not know when
#: other processes had the core.
NODE_SAMPLES, KEPT_SAMPLES = 12, 6

#: By ours: so many, and more of fast ones until they took so long together.
MIN_SAMPLES, MAX_SAMPLES, ENOUGH_MS = 5, 25, 40.0


class _Timed:
    """One operation, ready to be timed, and the samples of it."""

    def __init__(self, operation: Operation, runtime: Runtime, pool: Tensor) -> None:
        module, shapes = build(operation)
        self.inputs = tuple(_input(shape, pool, runtime) for shape in shapes)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.call: Compiled = runtime.compile(module.eval(), self.inputs)
        self.device = runtime.device
        self.samples_ms: list[float] = []
        self.call()

    def sample(self) -> None:
        """Time one call."""
        for tensor in self.inputs:
            tensor.mul_(1.0)  # written just now, as what another operation made
        watch = Stopwatch(self.device)
        self.call()
        self.samples_ms.append(1e3 * watch.seconds())


def measure_operations(
    operations: Sequence[Operation], runtime: Runtime, *, after_chunk: Callable[[dict[Operation, Latency]], None]
) -> None:
    """Measure operations, a chunk at a time: by the runtime's own clock where it has one, else by ours.

    Args:
        operations: What to measure.
        runtime: What runs them.
        after_chunk: Called with the latencies of every chunk.
    """
    settle_allocator()
    for chunk in turns(operations):
        with runtime.active(), torch.inference_mode():
            clocked = node_samples(chunk, runtime, NODE_SAMPLES)
            if clocked is None:
                samples = _samples(chunk, runtime)
            else:
                samples = [sorted(values)[:KEPT_SAMPLES] for values in clocked]
        after_chunk({o: Latency.of(values) for o, values in zip(chunk, samples, strict=True)})


def _samples(operations: Sequence[Operation], runtime: Runtime) -> list[list[float]]:
    pool = torch.randn(max(operation.read for operation in operations), device=runtime.device)
    timed = [_Timed(operation, runtime, pool) for operation in operations]
    for done in range(MAX_SAMPLES):
        for one in timed:
            if done < MIN_SAMPLES or sum(one.samples_ms) < ENOUGH_MS:
                one.sample()
    return [one.samples_ms for one in timed]


def turns(operations: Sequence[Operation]) -> list[list[Operation]]:
    """The operations that take turns, in an order that mixes sizes, so that drifts of the machine hit all alike.

    Those that take turns move about as many bytes each, as in a network: small ones between large ones were measured
    at twice the time that they take among their like, for nothing that they need was in any cache.
    """
    chunks: list[list[Operation]] = []
    held = 0.0
    for operation in sorted(operations, key=lambda operation: (operation.moved_bytes, str(operation))):
        if not chunks or len(chunks[-1]) == CHUNK or held + operation.moved_bytes > CHUNK_BYTES:
            chunks.append([])
            held = 0.0
        chunks[-1].append(operation)
        held += operation.moved_bytes
    random.Random(0).shuffle(chunks)
    return chunks


def _input(shape: tuple[int, ...], pool: Tensor, runtime: Runtime) -> Tensor:
    """An input of random numbers, in the runtime's memory format, so that the runtime takes it as it is."""
    values = pool[: prod(shape)].clone()
    if runtime.memory_format == "channels_last" and len(shape) >= 4:
        return values.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return values.view(shape)

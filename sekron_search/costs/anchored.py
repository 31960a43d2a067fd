"""Operations between two convolutions, as they stand in a network, for runtimes that lay out memory themselves.

Such a runtime (ONNX Runtime) keeps tensors in a blocked layout between convolutions and converts them where an
operation cannot work on it. Every operation therefore stands between two small convolutions that can, and all the
nodes that the runtime executes between those two are the operation's: itself and the conversions that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.costs.build import build
from sekron_search.costs.measure import measure_callables
from sekron_search.costs.operations import Convolution, Copy, Linear, Operation, Pool
from sekron_search.runtimes.base import NodeTime, Runtime

#: Channels on the outer sides of the two convolutions: one block of the largest blocked layout.
OUTER_CHANNELS = 16

#: What a clock of whole microseconds shows as nothing.
LEAST_MS = 5e-4

#: Length of the chain of small convolutions from which the cost of a node is learnt.
CHAIN = 32

#: Larger permutations than these are not of channels, and are timed without neighbours.
MAX_BATCH, MAX_CHANNELS = 1024, 16384


def node_samples(operations: Sequence[Operation], runtime: Runtime, runs: int) -> list[list[float]] | None:
    """Milliseconds of every operation in every run, from the runtime's own clock; None where it has none.

    All of the operations are one graph, so that in every run each is executed once, after all the others.
    """
    if not runtime.times_nodes:
        return None
    found = _node_times([_branch(operation) for operation in operations], runtime, runs)
    return [[sum(node.time_ms for node in nodes) for nodes in own] for own in found]


def layer_samples(
    modules: Sequence[nn.Module], channels: tuple[int, int], size: Sequence[int], runtime: Runtime, runs: int
) -> list[list[float]] | None:
    """Milliseconds of modules in every run, as they stand in a network; None if the runtime has no clock of its own.

    What the runtime needs from one node to the next is part of it.

    Args:
        modules: Each from (N, C, H, W) to (N, F, H', W').
        channels: C and F.
        size: N, H and W.
        runtime: What runs them.
        runs: How many.
    """
    if not runtime.times_nodes:
        return None
    batch, *spatial = size
    branches = [_anchored(module, batch, channels, tuple(spatial)) for module in modules]
    between = node_overhead(runtime)
    found = _node_times(branches, runtime, runs)
    if not all(nodes for own in found for nodes in own):
        return None  # the exporter that names nodes after modules could not export one of them
    return [[max(sum(node.time_ms + between for node in nodes), LEAST_MS) for nodes in own] for own in found]


@cache
def node_overhead(runtime: Runtime) -> float:
    """Milliseconds that a runtime needs between two nodes, where operations were timed by its own clock; else 0."""
    small = Convolution(1, 16, 16, (1, 1), (1, 1), (1, 1), (1, 1), (0, 0), 1)
    with runtime.active(), torch.inference_mode():
        own = node_samples([small] * CHAIN, runtime, 15)
        if own is None:
            return 0.0
        x = torch.randn(1, 16, 1, 1)
        chains = {n: nn.Sequential(*[nn.Conv2d(16, 16, 1) for _ in range(n)]).eval() for n in (CHAIN, 2 * CHAIN)}
        times = measure_callables({str(n): runtime.compile(chain, (x,)) for n, chain in chains.items()})
    each = (times[str(2 * CHAIN)].median_ms - times[str(CHAIN)].median_ms) / CHAIN
    return max(0.0, each - float(np.median([np.median(samples) for samples in own])))


def _node_times(
    branches: Sequence[tuple[nn.Module, tuple[int, ...]]], runtime: Runtime, runs: int
) -> list[list[list[NodeTime]]]:
    """Of every branch, in every run, its own nodes."""
    module = _Branches([branch for branch, _ in branches]).eval().requires_grad_(False)
    inputs = tuple(torch.randn(shape) for _, shape in branches)
    found = runtime.node_times(module, inputs, runs)
    return [[_own_nodes(nodes, i, branch) for nodes in found] for i, (branch, _) in enumerate(branches)]


def _own_nodes(nodes: Sequence[NodeTime], index: int, branch: nn.Module) -> list[NodeTime]:
    """A branch's own nodes: those between its two convolutions, or those of its name."""
    prefix = f"/branches.{index}/"
    if isinstance(branch, _Anchored):
        ends = [i for i, node in enumerate(nodes) if node.name.startswith((f"{prefix}before/", f"{prefix}after/"))]
        return list(nodes[ends[0] + 1 : ends[-1]]) if ends else []
    return [node for node in nodes if node.name.startswith(prefix)]


def _branch(operation: Operation) -> tuple[nn.Module, tuple[int, ...]]:
    """A module that contains the operation, and the shape of its input."""
    if isinstance(operation, Convolution) and len(operation.size) == 2:
        module, _ = build(operation)
        channels = operation.in_channels, operation.out_channels
        return _anchored(module, operation.batch, channels, operation.size)
    if isinstance(operation, Pool):
        module, [(batch, channel, *size)] = build(operation)
        return _anchored(module, batch, (channel, channel), tuple(size))
    if isinstance(operation, Copy):
        channel = operation.rows * operation.columns
        if channel == 1:
            half = max(1, operation.run // (2 * OUTER_CHANNELS))
            return _anchored(_Double(), 1, (OUTER_CHANNELS, 2 * OUTER_CHANNELS), (half, 1))
        if operation.outer <= MAX_BATCH and channel <= MAX_CHANNELS:
            return _anchored(_Shuffle(operation), operation.outer, (channel, channel), (operation.run, 1))
    module, [shape] = build(operation)
    return _Alone(module, flat=isinstance(operation, Linear)), shape


def _anchored(
    module: nn.Module, batch: int, channels: tuple[int, int], size: tuple[int, ...]
) -> tuple[nn.Module, tuple[int, ...]]:
    return _Anchored(module, channels), (batch, OUTER_CHANNELS, *size)


class _Anchored(nn.Module):
    def __init__(self, operation: nn.Module, channels: tuple[int, int]) -> None:
        super().__init__()
        self.before = nn.Conv2d(OUTER_CHANNELS, channels[0], 1)
        self.operation = operation
        self.after = nn.Conv2d(channels[1], OUTER_CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        # A node that makes an output of the graph is named after the output; flattening keeps the name of the last.
        out: Tensor = self.after(self.operation(self.before(x)))
        return out.flatten(1)


class _Alone(nn.Module):
    def __init__(self, operation: nn.Module, *, flat: bool) -> None:
        super().__init__()
        self.operation, self.flat = operation, flat

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.operation(x)
        return out.flatten() if self.flat else out


class _Double(nn.Module):
    """The input and as many zeros: what joins, pads or copies moves about as much."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, x.shape[1]))


class _Shuffle(nn.Module):
    def __init__(self, op: Copy) -> None:
        super().__init__()
        self.split = (op.outer, op.rows, op.columns, op.run)
        self.joined = (op.outer, op.rows * op.columns, op.run, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.split).permute(0, 2, 1, 3).reshape(self.joined)


class _Branches(nn.Module):
    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(x) for branch, x in zip(self.branches, inputs, strict=True))

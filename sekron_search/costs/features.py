"""What a latency model sees of an operation: its regime, the columns of a roofline, and the logarithms of its sizes."""

from __future__ import annotations

from math import log2, prod

from sekron_search.costs.operations import ELEMENT_BYTES, Convolution, Copy, Elementwise, Linear, Operation, Pool

#: Tensors of so many bytes are given back to the system after every call, and their pages faulted in anew.
PAGED_BYTES = 2**25

#: From so many samples on, PyTorch hands convolutions of kernel 1 to another library.
LARGE_BATCH = 16


def regime(operation: Operation) -> str:
    """Name of the group of operations that runtimes have kernels of their own for; a model is fitted to each."""
    if not isinstance(operation, Convolution):
        return operation.kind
    if operation.transposed:
        return "transposed"
    if len(operation.size) == 3:
        return "volume"
    if operation.groups > 1:
        alike = operation.groups == operation.in_channels == operation.out_channels
        return "depthwise" if alike else "grouped"
    return "pointwise" if prod(operation.kernel) == 1 else "spatial"


def roofline(operation: Operation, granularity: int) -> list[float]:
    """Columns whose weighted sum, the weights not negative, is the base of a prediction in ms.

    They are one call, 1e7 multiply-adds with channels as they are and rounded up to the granularity, 1e6 elements
    read, written and of weights, and 1e6 elements in pages that have to be faulted in.
    """
    flops = padded = operation.flops
    if isinstance(operation, Convolution):
        ours = operation.in_channels // operation.groups, operation.out_channels // operation.groups
        full = prod(_rounded_up(n, granularity) for n in ours)
        padded = flops * full // prod(ours)
    paged = operation.written if ELEMENT_BYTES * operation.written >= PAGED_BYTES else 0
    elements = operation.read, operation.written, operation.weights, paged
    return [1.0, flops / 1e7, padded / 1e7, *(n / 1e6 for n in elements)]


def features(operation: Operation, granularity: int) -> list[float]:
    """Numbers that tell operations of a regime apart, mostly logarithms."""
    if isinstance(operation, Convolution):
        return _of_convolution(operation, granularity)
    if isinstance(operation, Linear):
        return _logs(operation.rows, operation.in_features, operation.out_features, operation.batch)
    if isinstance(operation, Copy):
        return _logs(operation.outer, operation.rows, operation.columns, operation.run)
    if isinstance(operation, Elementwise):
        return _logs(operation.elements, operation.inputs)
    assert isinstance(operation, Pool)
    return _logs(operation.batch, operation.channels, operation.inputs, operation.positions, operation.window)


def _of_convolution(op: Convolution, granularity: int) -> list[float]:
    ours = op.in_channels // op.groups, op.out_channels // op.groups
    logs = _logs(*ours, op.groups, op.batch, prod(op.output_size), op.output_size[-1], prod(op.stride))
    padded = [log2(_rounded_up(n, granularity) / n) for n in ours]
    # Kernels for blocks of channels ask for whole blocks, of a group or of all groups together.
    whole = [n % block == 0 for n in (*ours, op.out_channels) for block in (max(1, granularity // 2), granularity)]
    flags = [op.batch >= LARGE_BATCH, max(op.dilation) > 1, *whole]
    return [*logs, *_logs(*op.kernel), *padded, *map(float, flags)]


def _logs(*sizes: int) -> list[float]:
    return [log2(n) for n in sizes]


def _rounded_up(count: int, granularity: int) -> int:
    return -(-count // granularity) * granularity

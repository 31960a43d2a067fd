"""The designed set of operations that a device profile measures: it covers the space, and knows no network.

Shapes come from scrambled Sobol sequences over the logarithms of their sizes, thrown away where they would take too
long or too much memory, with one quota per regime that runtimes have kernels of their own for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
from scipy.stats import qmc

from sekron_search.costs.operations import Convolution, Copy, Elementwise, Linear, Operation, Pool

#: Bounds of one operation: multiply-adds, and bytes moved.
MAX_FLOPS, MAX_BYTES = 4e8, 6.4e7

MAX_BATCH = 2048

#: Two operations of three have at least so many multiply-adds or bytes: they make up most of any network's time.
LARGE = 1e6

#: Operations of every regime in a full design.
QUOTAS: dict[str, int] = {
    "pointwise": 800,
    "axis kernel": 600,
    "square kernel": 700,
    "depthwise": 400,
    "grouped": 800,
    "volume": 80,
    "transposed": 80,
    "linear": 160,
    "copy": 360,
    "elementwise": 80,
    "pool": 80,
}

#: Share of every quota in a quick design.
QUICK_SHARE = 0.25

#: Channels of the sweep that shows at which multiple of channels time steps.
SWEEP_CHANNELS = tuple(range(32, 81, 2))


@dataclass(frozen=True)
class _Draw:
    """A point of a Sobol sequence, its coordinates taken one after the other."""

    values: Iterator[float]

    def log(self, low: float, high: float) -> int:
        """A whole number, uniform in its logarithm."""
        return round(float(low * (high / low) ** next(self.values)))

    def pick(self, *choices: int) -> int:
        """One of the choices."""
        return choices[min(int(next(self.values) * len(choices)), len(choices) - 1)]

    def channels(self, high: int = 2048) -> int:
        """Channels or a rank: half of the time any number, else a multiple of 8, as networks have."""
        count = self.log(1, high)
        rounded = next(self.values) < 0.5
        return max(1, round(count / 8)) * 8 if rounded and count > 4 else count


def design(seed: int = 0, *, quick: bool = False) -> list[Operation]:
    """The operations to measure, every one once; the same for the same seed.

    Args:
        seed: Of the scrambling.
        quick: A quarter of them.
    """
    found: dict[Operation, None] = {}
    for number, (name, quota) in enumerate(QUOTAS.items()):
        wanted = max(4, round(quota * QUICK_SHARE)) if quick else quota
        sobol = qmc.Sobol(d=12, scramble=True, rng=np.random.default_rng([seed, number]))
        made = 0
        while made < wanted:
            for point in sobol.random(64):
                operation = _DRAWS[name](_Draw(iter(point.tolist())))
                large = max(operation.flops, operation.moved_bytes) >= LARGE
                if made < wanted and operation not in found and fits(operation) and (large or made % 3 == 0):
                    found[operation] = None
                    made += 1
    return list(found)


def granularity_sweep() -> list[Operation]:
    """Convolutions that differ in their number of channels alone."""
    return [_conv(1, n, n, (28, 28), (3, 3)) for n in SWEEP_CHANNELS]


def fits(operation: Operation) -> bool:
    """Whether an operation stays within the bounds of the design."""
    return operation.flops <= MAX_FLOPS and operation.moved_bytes <= MAX_BYTES


def _conv(
    batch: int,
    in_channels: int,
    out_channels: int,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    dilation: int = 1,
    groups: int = 1,
) -> Convolution:
    axes = len(size)
    dilations = tuple(dilation if k > 1 else 1 for k in kernel)
    return Convolution(
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        size=size,
        kernel=kernel,
        stride=stride or (1,) * axes,
        dilation=dilations,
        padding=tuple(d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)),
        groups=groups,
    )


def _batch(draw: _Draw) -> int:
    """One sample, as often as a batch; large ones, for channels that share a weight may be folded into the batch."""
    return 1 if draw.pick(0, 1) else draw.log(1, MAX_BATCH)


def _square(draw: _Draw, largest: int = 224) -> tuple[int, int]:
    side = draw.log(1, largest)
    return side, side


def _pointwise(draw: _Draw) -> Operation:
    batch, size, stride = _batch(draw), _square(draw), draw.pick(1, 1, 1, 2)
    return _conv(batch, draw.channels(), draw.channels(), size, (1, 1), stride=(stride, stride))


def _axis_kernel(draw: _Draw) -> Operation:
    batch, size, stride, long = _batch(draw), _square(draw), draw.pick(1, 1, 1, 2), draw.pick(3, 3, 3, 5, 7)
    upright = draw.pick(0, 1)
    kernel, strides = ((long, 1), (stride, 1)) if upright else ((1, long), (1, stride))
    return _conv(batch, draw.channels(1024), draw.channels(1024), size, kernel, stride=strides)


def _square_kernel(draw: _Draw) -> Operation:
    batch, size, stride, side = _batch(draw), _square(draw), draw.pick(1, 1, 2), draw.pick(3, 3, 3, 3, 5, 7)
    dilation = draw.pick(1, 1, 1, 1, 2, 3) if side == 3 else 1
    channels = draw.channels(512), draw.channels(512)
    return _conv(batch, *channels, size, (side, side), stride=(stride, stride), dilation=dilation)


def _depthwise(draw: _Draw) -> Operation:
    batch, size, stride, long = _batch(draw), _square(draw), draw.pick(1, 1, 2), draw.pick(3, 3, 3, 5, 7)
    kernel = [(long, 1), (1, long), (long, long)][draw.pick(0, 1, 2)]
    strides = tuple(stride if k > 1 else 1 for k in kernel)
    channels, dilation = draw.channels(1024), draw.pick(1, 1, 1, 3)
    return _conv(batch, channels, channels, size, kernel, stride=strides, dilation=dilation, groups=channels)


def _grouped(draw: _Draw) -> Operation:
    batch, size, long = _batch(draw), _square(draw), draw.pick(3, 3, 3, 5)
    kernel = [(1, 1), (1, 1), (long, 1), (1, long), (long, long)][draw.pick(0, 1, 2, 3, 4)]
    stride, dilation, groups = draw.pick(1, 1, 1, 2), draw.pick(1, 1, 3), draw.log(2, 512)
    strides = tuple(stride if k > 1 or max(kernel) == 1 else 1 for k in kernel)
    channels = draw.log(1, 128) * groups, draw.log(1, 128) * groups
    return _conv(batch, *channels, size, kernel, stride=strides, dilation=dilation, groups=groups)


def _volume(draw: _Draw) -> Operation:
    batch, side = draw.log(1, 8), draw.log(2, 32)
    kernel = [(3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1)][draw.pick(0, 1, 2, 3)]
    return _conv(batch, draw.channels(256), draw.channels(256), (max(1, side // 2), side, side), kernel)


def _transposed(draw: _Draw) -> Operation:
    batch, side, kernel, stride = _batch(draw), draw.log(2, 64), draw.pick(2, 3, 4), draw.pick(1, 2)
    return Convolution(
        batch=batch,
        in_channels=draw.channels(512),
        out_channels=draw.channels(512),
        size=(side, side),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        dilation=(1, 1),
        padding=((kernel - 1) // 2,) * 2,
        groups=1,
        output_padding=(0, 0),
    )


def _linear(draw: _Draw) -> Operation:
    rows, batch = draw.log(1, 4096), draw.pick(1, 1, 1, 8)
    return Linear(rows, draw.channels(4096), draw.channels(4096), batch)


def _copy(draw: _Draw) -> Operation:
    """Channels reordered in both memory formats, conversions between the formats, and plain copies."""
    form, batch, positions, rows, columns = (
        draw.pick(0, 1, 2, 3, 4),
        _batch(draw),
        draw.log(1, 224) ** 2,
        draw.log(2, 128),
        draw.log(2, 128),
    )
    if form == 0:
        return Copy(1, 1, 1, draw.log(16, MAX_BYTES / 8))
    if form == 1:
        return Copy(batch, rows, columns, positions)
    if form == 2:
        return Copy(batch, rows * columns, positions, 1) if draw.pick(0, 1) else Copy(batch, positions, rows, 1)
    return Copy(batch * positions, rows, columns, 1 if draw.pick(0, 1) else draw.log(1, 64))


def _elementwise(draw: _Draw) -> Operation:
    return Elementwise(draw.log(16, MAX_BYTES / 12), draw.pick(1, 2))


def _pool(draw: _Draw) -> Operation:
    batch, side, channels = _batch(draw), draw.log(1, 112), draw.channels(1024)
    if draw.pick(0, 1):
        return Pool(batch, channels, side**2, 1, side**2)
    even = 2 * -(-side // 2)
    return Pool(batch, channels, even**2, (even // 2) ** 2, 2 ** gcd(2, side) + 5 * (side % 2))


_DRAWS: dict[str, Callable[[_Draw], Operation]] = {
    "pointwise": _pointwise,
    "axis kernel": _axis_kernel,
    "square kernel": _square_kernel,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "volume": _volume,
    "transposed": _transposed,
    "linear": _linear,
    "copy": _copy,
    "elementwise": _elementwise,
    "pool": _pool,
}

"""What the layers of a network see: second moments of their unfolded inputs, streamed over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.kron.dense import as_images, pad_by_mode
from sekron_search.kron.geometry import Size
from sekron_search.kron.refine import InputMetric, damping_share
from sekron_search.model import Inputs, LayerInfo, run_model

#: Positions (pixels or rows) of one batch that enter a layer's moment; more are drawn from with a seed. The moment of
#: P unknowns needs some multiple of P samples, not every pixel of every image.
MAX_POSITIONS_PER_BATCH = 32768


class _Moment:
    """Running sums of x x' and x over the unfolded input, per group."""

    def __init__(self, info: LayerInfo, seed: int) -> None:
        self.info = info
        self.count = 0
        self.second: Tensor | None = None
        self.first: Tensor | None = None
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor, conv: nn.Module) -> None:
        columns = unfold_input(x, self.info, conv)
        if columns.shape[-1] > MAX_POSITIONS_PER_BATCH:
            chosen = torch.randperm(columns.shape[-1], generator=self.generator)[:MAX_POSITIONS_PER_BATCH]
            columns = columns[..., chosen.to(columns.device)]
        second, first = (columns @ columns.mT).double(), columns.double().sum(-1)
        self.second = second if self.second is None else self.second + second
        self.first = first if self.first is None else self.first + first
        self.count += columns.shape[-1]

    def metric(self, curvature: Tensor | None) -> InputMetric:
        if self.second is None or self.first is None:
            raise DataError(f"layer '{self.info.name}' saw no calibration data; give at least one batch")
        if not bool(torch.isfinite(self.second).all()):
            raise DataError(f"layer '{self.info.name}': its input holds NaN or infinity on the calibration data")
        centered = self.info.output_shift != "kept"
        second, first = self.second / self.count, self.first / self.count
        share = damping_share(second.shape[-1], self.count)
        return InputMetric.from_moments(second, first, centered=centered, damping=share, curvature=curvature)


def unfold_input(x: Tensor, info: LayerInfo, module: nn.Module, output: Tensor | None = None) -> Tensor:
    """The columns that meet the weight: (G, P, samples times positions), with P = C times the kernel's sizes.

    A layer's output is the (G, F, P) weight times its columns, plus the bias. Those of a transposed convolution are
    the columns of its input with zeros between the positions, the kernel read backwards.

    Args:
        x: The layer's input.
        info: The layer.
        module: The layer's module, for padding modes other than zeros.
        output: Its output, where a transposed convolution may be asked for other output sizes than on the example.
    """
    geometry, kernel = info.geometry, info.weight_shape[2:]
    x = as_images(pad_by_mode(x.detach().float(), module), info.kind)
    strides, padding = geometry.stride, geometry.padding
    if geometry.transposed:
        x = _stuffed(x, strides)
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
        full = info.input_size if output is None else tuple(as_images(output, info.kind).shape[2:])
        extra = geometry.unread(full, kernel)
        padding = tuple((r - a, r - b + n) for r, (a, b), n in zip(reach, padding, extra, strict=True))
        strides = (1,) * len(kernel)
    if any(n for ends in padding for n in ends):
        x = F.pad(x, [n for ends in reversed(padding) for n in ends])
    for axis, (size, dilation, stride) in enumerate(zip(kernel, geometry.dilation, strides, strict=True), start=2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    axes = len(kernel)  # x is (N, G C, *positions, *kernel) now, still a view
    x = x.unflatten(1, (geometry.groups, -1))
    x = x.permute(1, 2, *range(3 + axes, 3 + 2 * axes), 0, *range(3, 3 + axes))
    if geometry.transposed:
        x = x.flip(tuple(range(2, 2 + axes)))
    columns: Tensor = x.reshape(geometry.groups, prod(info.weight_shape[1:]), -1)
    return columns


def output_rows(output: Tensor, info: LayerInfo) -> Tensor:
    """A layer's output as (G, F, samples times positions), beside the columns of its input."""
    grouped: Tensor = as_images(output.detach(), info.kind).unflatten(1, (info.geometry.groups, -1))
    return grouped.permute(1, 2, 0, *range(3, grouped.dim())).flatten(2)


def _stuffed(x: Tensor, strides: Size) -> Tensor:
    """x of shape (N, C, *size) with stride - 1 zeros between the positions of every axis."""
    if all(stride == 1 for stride in strides):
        return x
    sizes = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], strides, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    every: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in strides))
    stuffed[every] = x
    return stuffed


@torch.no_grad()
def collect_metrics(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    batches: Iterable[Inputs],
    *,
    curvature: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, InputMetric]:
    """The input metric of every layer, from one pass over the batches; memory does not grow with their number.

    Args:
        model: The network, in the mode in which it will be used.
        layers: Layers to observe.
        batches: Calibration inputs.
        curvature: Of the layers' outputs, from `output_curvature`; layers without one weigh all errors alike.
        seed: Of the choice of positions.
        progress: Called with the number of batches done.

    Raises:
        DataError: If there is no batch, or an input holds NaN or infinity.
    """
    moments = {info.name: _Moment(info, seed) for info in layers}
    handles = []

    def hook(moment: _Moment) -> Any:
        return lambda module, args: moment.add(args[0], module)

    try:
        for name, moment in moments.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook(moment)))
        for done, inputs in enumerate(batches, start=1):
            run_model(model, inputs)
            if progress is not None:
                progress(done)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment.metric((curvature or {}).get(name)) for name, moment in moments.items()}

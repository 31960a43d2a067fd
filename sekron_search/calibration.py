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
from sekron_search.kron.metric import InputMetric, damping_share
from sekron_search.model import Inputs, LayerInfo, run_model

#: Positions (pixels or rows) of one batch that enter a layer's moment; more are drawn from with a seed. The moment of
#: P unknowns needs some multiple of P samples, not every pixel of every image.
MAX_POSITIONS_PER_BATCH = 32768

#: Entries of unfolded columns that are in memory at a time: 256 MiB. Larger inputs are unfolded some samples at a time.
MAX_UNFOLDED = 1 << 26

#: A group of inputs that varies less than this, relative to its mean square, counts as constant.
CONSTANT = 1e-12


class Moments:
    """Running second moments of a layer's unfolded input, per group, and of its products with targets if there are any.

    Sums are taken in float32 of columns that are shifted and scaled by what the first batch shows, and added up in
    float64: large means and extreme scales cost no digits. Memory grows neither with the number of batches nor with
    the size of the images.

    Args:
        info: The layer.
        seed: Of the choice of positions.
    """

    def __init__(self, info: LayerInfo, seed: int) -> None:
        self.info = info
        self.count = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._origins: list[tuple[Tensor, Tensor]] | None = None
        self._sums: list[Tensor] | None = None

    def add(self, x: Tensor, module: nn.Module, *, output: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            x: The layer's input.
            module: The dense layer.
            output: As for `unfold_input`.
            rows: Targets (G, F, samples times positions), in the order of `output_rows`.
        """
        x = x if x.dim() > 1 else x[None]
        samples = len(x)
        first = unfold_input(x[:1], self.info, module, output)
        positions = first.shape[-1]
        step = max(MAX_UNFOLDED // max(first.numel(), 1), 1)
        for start in range(0, samples, step):
            part = x[start : start + step]
            columns = unfold_input(part, self.info, module, output)
            targets = None if rows is None else rows[..., start * positions : (start + len(part)) * positions]
            self._add(columns, targets, max(MAX_POSITIONS_PER_BATCH * len(part) // samples, 1))

    def _add(self, columns: Tensor, rows: Tensor | None, most: int) -> None:
        if columns.shape[-1] > most:
            chosen = torch.randperm(columns.shape[-1], generator=self._generator)[:most].to(columns.device)
            columns, rows = columns[..., chosen], None if rows is None else rows[..., chosen]
        parts = [columns] if rows is None else [columns, rows.float()]
        if self._origins is None:
            self._origins = [_origin(part) for part in parts]
        parts = [(part - mean) / scale for part, (mean, scale) in zip(parts, self._origins, strict=True)]
        new = [part.sum(-1) for part in parts] + [part @ parts[0].mT for part in parts]
        self._sums = [a.double() + (0 if self._sums is None else self._sums[i]) for i, a in enumerate(new)]
        self.count += columns.shape[-1]

    def collected(self) -> tuple[list[Tensor], list[Tensor]]:
        """Means of inputs (G, P) and targets (G, F); covariances (G, P, P) and (G, F, P) with the inputs; float64.

        Raises:
            DataError: If there is no data, or it holds NaN or infinity.
        """
        if self._sums is None or self._origins is None:
            raise DataError(f"layer '{self.info.name}' saw no calibration data; give at least one batch")
        if not all(bool(torch.isfinite(total).all()) for total in self._sums):
            raise DataError(f"layer '{self.info.name}': its input holds NaN or infinity on the calibration data")
        count = len(self._origins)
        averages = [total / self.count for total in self._sums]
        scales = [scale.double() for _, scale in self._origins]
        means = [
            average * scale[..., 0] + origin.double()[..., 0]
            for average, scale, (origin, _) in zip(averages[:count], scales, self._origins, strict=True)
        ]
        products = [
            (product - average[:, :, None] * averages[0][:, None, :]) * scale * scales[0]
            for product, average, scale in zip(averages[count:], averages[:count], scales, strict=True)
        ]
        return means, products

    def metric(self, curvature: Tensor | None, *, damping: float | None = None) -> InputMetric:
        """The metric of the inputs; damped by how few samples there are, if not told by how much."""
        (mean, *_), (covariance, *_) = self.collected()
        share = damping_share(covariance.shape[-1], self.count) if damping is None else damping
        centered = self.info.output_shift != "kept"
        second = covariance + mean[:, :, None] * mean[:, None, :]
        return InputMetric.from_moments(second, mean, centered=centered, damping=share, curvature=curvature)

    def best_weight(self, weight: Tensor) -> Tensor:
        """The (G, F, C, *kernel) weight that gives the targets best; near the given one where data says little.

        With n samples the estimate of P unknowns is off by about P / n, so that share of the input's variance is added
        in favour of the given weight. A group whose input is constant keeps it.
        """
        (mean_in, mean_out), (second, cross) = self.collected()
        squares = second.diagonal(dim1=-2, dim2=-1) + mean_in.square()
        if self.info.output_shift == "kept":
            second = second + mean_in[:, :, None] * mean_in[:, None, :]
            cross = cross + mean_out[:, :, None] * mean_in[:, None, :]
        variance = second.diagonal(dim1=-2, dim2=-1).mean(-1)
        alive = variance > CONSTANT * squares.mean(-1)
        damping = (damping_share(second.shape[-1], self.count) * variance)[:, None, None]
        eye = torch.eye(second.shape[-1], dtype=second.dtype, device=second.device)
        own = weight.flatten(2)
        system = torch.where(alive[:, None, None], second + damping * eye, eye)
        right = torch.where(alive[:, None, None], cross + damping * own, own)
        best: Tensor = torch.linalg.solve(system, right.mT).mT
        return best.reshape(weight.shape)


def _origin(part: Tensor) -> tuple[Tensor, Tensor]:
    """A mean (G, n, 1) and a scale (G, 1, 1) of the first columns."""
    mean = part.mean(-1, keepdim=True)
    scale = (part - mean).abs().amax((1, 2), keepdim=True)
    return mean, torch.where(scale > 0, scale, torch.ones_like(scale))


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
    damping: float | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, InputMetric]:
    """The input metric of every layer, from one pass over the batches; memory does not grow with their number.

    Args:
        model: The network, in the mode in which it will be used.
        layers: Layers to observe.
        batches: Calibration inputs.
        curvature: Of the layers' outputs, from `output_curvature`; layers without one weigh all errors alike.
        damping: Of the second moments, relative to their mean diagonal; by how few samples there are if None.
        seed: Of the choice of positions.
        progress: Called with the number of batches done.

    Raises:
        DataError: If there is no batch, or an input holds NaN or infinity.
    """
    moments = {info.name: Moments(info, seed) for info in layers}
    handles = []

    def hook(moment: Moments) -> Any:
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
    known = curvature or {}
    return {name: moment.metric(known.get(name), damping=damping) for name, moment in moments.items()}

"""What the layers of a network see: second moments of their unfolded inputs, streamed over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.kron.dense import as_images, pad_by_mode
from sekron_search.kron.geometry import Size
from sekron_search.kron.metric import DOUBLE_UP_TO, InputMetric, damping_share
from sekron_search.model import Inputs, LayerInfo, run_model

#: Positions (pixels or rows) that enter a layer's moment, spread over the batches: P unknowns need some multiple of P
#: samples, and small moments can have more for the same work, so many products of two entries in all.
POSITIONS_PER_UNKNOWN, MOST_PRODUCTS = 8, 2 * 10**10

#: Entries of unfolded columns that are in memory at a time: 128 MiB. Larger inputs are unfolded in parts.
MAX_UNFOLDED = 1 << 25

#: Moments of more unknowns are products of blocks of rows, for only those up to the diagonal are needed.
BLOCK = 768

#: Bytes of the moments that are collected in one pass over the data.
MOMENT_BYTES = 1 << 30

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
        batches: Number of batches that will come: the positions are spread over them.
    """

    def __init__(self, info: LayerInfo, seed: int, batches: int = 1) -> None:
        self.info = info
        self.count = 0
        unknowns = prod(info.weight_shape[1:])
        self._most = -(-max(POSITIONS_PER_UNKNOWN * unknowns, MOST_PRODUCTS // unknowns**2) // max(batches, 1))
        self._dtype = _dtype_of(info)
        self._generator = torch.Generator().manual_seed(seed)
        self._origins: list[tuple[Tensor, Tensor]] | None = None
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, module: nn.Module, *, output: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            x: The layer's input.
            module: The dense layer.
            output: As for `unfold_input`.
            rows: Targets (G, F, samples times positions), in the order of `output_rows`.
        """
        patches = _patches(x if x.dim() > 1 else x[None], self.info, module, output)
        samples, *sizes = patches.shape[: 1 + len(self.info.weight_shape[2:])]
        positions = prod(sizes)
        entries = prod(self.info.weight_shape[1:]) * self.info.geometry.groups
        if samples * positions <= self._most:
            step = max(MAX_UNFOLDED // (entries * positions), 1)
            for start in range(0, samples, step):
                own = None if rows is None else rows[..., start * positions : (start + step) * positions]
                self._add(_columns(patches[start : start + step], self.info), own)
            return
        chosen = torch.randperm(samples * positions, generator=self._generator)[: self._most]
        for part in chosen.to(x.device).split(max(MAX_UNFOLDED // entries, 1)):
            picked = patches[torch.unravel_index(part, (samples, *sizes))]
            self._add(_columns(picked, self.info), None if rows is None else rows[..., part])

    def _add(self, columns: Tensor, rows: Tensor | None) -> None:
        parts = [columns] if rows is None else [columns, rows.float()]
        if self._origins is None:
            self._origins = [_origin(part) for part in parts]
            shapes = [part.shape[:2] for part in parts] + [(*part.shape[:2], columns.shape[1]) for part in parts]
            self._sums = [torch.zeros(shape, dtype=self._dtype, device=columns.device) for shape in shapes]
        parts = [(part - mean) / scale for part, (mean, scale) in zip(parts, self._origins, strict=True)]
        for total, part in zip(self._sums, parts, strict=False):
            total += part.sum(-1)
        for start in range(0, columns.shape[1], BLOCK):
            end = start + BLOCK
            self._sums[len(parts)][:, start:end, :end] += parts[0][:, start:end] @ parts[0][:, :end].mT
        if rows is not None:
            self._sums[-1] += parts[1] @ parts[0].mT
        self.count += columns.shape[-1]

    def collected(self) -> tuple[list[Tensor], list[Tensor]]:
        """Means of inputs (G, P) and targets (G, F); covariances (G, P, P) and (G, F, P) with the inputs.

        In float64, those of large moments in float32.

        Raises:
            DataError: If there is no data, or it holds NaN or infinity.
        """
        if self._origins is None:
            raise DataError(f"layer '{self.info.name}' saw no calibration data; give at least one batch")
        if not all(bool(torch.isfinite(total).all()) for total in self._sums):
            raise DataError(f"layer '{self.info.name}': its input holds NaN or infinity on the calibration data")
        count = len(self._origins)
        averages = [total / self.count for total in self._sums[:count]]
        scales = [scale.to(self._dtype) for _, scale in self._origins]
        means = [
            average * scale[..., 0] + origin.to(self._dtype)[..., 0]
            for average, scale, (origin, _) in zip(averages, scales, self._origins, strict=True)
        ]
        lower = self._sums[count].tril()
        totals = [lower + lower.tril(-1).mT, *self._sums[count + 1 :]]
        products = [
            (total / self.count - average[:, :, None] * averages[0][:, None, :]) * scale * scales[0]
            for total, average, scale in zip(totals, averages, scales, strict=True)
        ]
        return means, products

    def metric(self, curvature: Tensor | None, *, damping: float | None = None) -> InputMetric:
        """The metric of the inputs; damped by how few samples there are, if not told by how much."""
        (mean, *_), (covariance, *_) = self.collected()
        share = damping_share(covariance.shape[-1], self.count) if damping is None else damping
        kept = self.info.output_shift == "kept"
        moment = covariance + mean[:, :, None] * mean[:, None, :] if kept else covariance
        return InputMetric.damped(moment, mean, damping=share, curvature=curvature)

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
        own = weight.flatten(2).to(second)
        system = torch.where(alive[:, None, None], second + damping * eye, eye)
        right = torch.where(alive[:, None, None], cross + damping * own, own)
        best: Tensor = torch.linalg.solve(system, right.mT).mT
        return best.reshape(weight.shape).to(weight)


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
    return _columns(_patches(x, info, module, output), info)


def _columns(patches: Tensor, info: LayerInfo) -> Tensor:
    """(G, P, samples times positions) from patches (any axes, G, C, *kernel)."""
    return patches.reshape(-1, info.geometry.groups, prod(info.weight_shape[1:])).permute(1, 2, 0)


def _patches(x: Tensor, info: LayerInfo, module: nn.Module, output: Tensor | None) -> Tensor:
    """What meets the weight at every position, (N, *positions, G, C, *kernel); a view, but of a transposed kernel."""
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
    if x.dim() == 4:  # patches are picked here and there: channels side by side make that five times as fast
        x = x.contiguous(memory_format=torch.channels_last)
    if any(n for ends in padding for n in ends):
        x = F.pad(x, [n for ends in reversed(padding) for n in ends])
    for axis, (size, dilation, stride) in enumerate(zip(kernel, geometry.dilation, strides, strict=True), start=2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    axes = len(kernel)  # x is (N, G C, *positions, *kernel) now, still a view
    x = x.unflatten(1, (geometry.groups, -1))
    x = x.permute(0, *range(3, 3 + axes), 1, 2, *range(3 + axes, 3 + 2 * axes))
    return x.flip(tuple(range(-axes, 0))) if geometry.transposed else x


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


def memory_groups(layers: Sequence[LayerInfo], most_bytes: int = MOMENT_BYTES) -> list[list[LayerInfo]]:
    """The layers in groups whose moments fit into so much memory, each of at least one."""
    groups: list[list[LayerInfo]] = []
    left = 0
    for info in layers:
        size = info.geometry.groups * prod(info.weight_shape[1:]) ** 2 * _dtype_of(info).itemsize
        if not groups or size > left:
            groups.append([])
            left = most_bytes
        groups[-1].append(info)
        left -= size
    return groups


def _dtype_of(info: LayerInfo) -> torch.dtype:
    return torch.float64 if prod(info.weight_shape[1:]) <= DOUBLE_UP_TO else torch.float32


@torch.no_grad()
def collect_metrics(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    batches: Sequence[Inputs],
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
    moments = {info.name: Moments(info, seed, len(batches)) for info in layers}
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

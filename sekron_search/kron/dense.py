"""The kinds of dense layers that can be replaced, each seen as a convolution with two spatial axes or three."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import UnsupportedLayerError
from sekron_search.kron.geometry import ConvGeometry, Pair, Size

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
DenseLayer = nn.Linear | Conv | ConvTranspose

#: Named after the functions of torch.nn.functional.
LayerKind = Literal["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

#: The dense layer of every kind.
KINDS: dict[LayerKind, type[nn.Module]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}

#: Spatial axes of what a layer of the kind takes; those missing to two have size 1.
AXES: dict[LayerKind, int] = {
    "linear": 0,
    "conv1d": 1,
    "conv2d": 2,
    "conv3d": 3,
    "conv_transpose1d": 1,
    "conv_transpose2d": 2,
    "conv_transpose3d": 3,
}

_CONV_OPTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


def layer_kind(dense: nn.Module) -> LayerKind:
    """The kind of a dense layer.

    Raises:
        UnsupportedLayerError: If it is of another class, subclasses included: their forward may differ.
    """
    for kind, module in KINDS.items():
        if type(dense) is module:
            return kind
    raise UnsupportedLayerError(f"expected {class_names(*KINDS.values())} with its weight, got {type(dense).__name__}")


def class_names(*classes: type[nn.Module]) -> str:
    """`nn.A, nn.B or nn.C`, for messages."""
    *others, last = (f"nn.{module.__name__}" for module in classes)
    return f"{', '.join(others)} or {last}" if others else last


def options(dense: DenseLayer) -> dict[str, Any]:
    """The arguments that a dense layer was built with, but for its bias, device and dtype."""
    if isinstance(dense, nn.Linear):
        names: tuple[str, ...] = ("in_features", "out_features")
    else:
        names = (*_CONV_OPTIONS, "output_padding" if isinstance(dense, ConvTranspose) else "padding_mode")
    return {name: getattr(dense, name) for name in names}


def filled(values: tuple[Any, ...], kind: LayerKind, fill: Any) -> tuple[Any, ...]:
    """One value per spatial axis of the layer, with `fill` for the axes that are missing to two."""
    return tuple(values) + (fill,) * (2 - len(values)) if AXES[kind] < 2 else tuple(values)


def dense_geometry(dense: DenseLayer) -> ConvGeometry:
    """Stride, dilation, groups and zero padding; other padding modes are applied before (`pad_by_mode`).

    Raises:
        UnsupportedLayerError: If a transposed convolution adds so much padding to its output that it is not the
            adjoint of a convolution.
    """
    if isinstance(dense, nn.Linear):
        return ConvGeometry()
    kind = layer_kind(dense)
    transposed = isinstance(dense, ConvTranspose)
    if transposed and any(extra >= n for extra, n in zip(dense.output_padding, dense.stride, strict=True)):
        raise UnsupportedLayerError(
            f"its output_padding {tuple(dense.output_padding)} is not smaller than its stride {tuple(dense.stride)}"
        )
    padding = _padding(dense) if dense.padding_mode == "zeros" else ((0, 0),) * AXES[kind]
    return ConvGeometry(
        filled(dense.stride, kind, 1),
        filled(dense.dilation, kind, 1),
        filled(padding, kind, (0, 0)),
        dense.groups,
        transposed,
    )


def dense_weight(dense: DenseLayer) -> Tensor:
    """The weight with its groups as a leading axis, F the out-channels of a group: (G, F, C, *kernel)."""
    groups = 1 if isinstance(dense, nn.Linear) else dense.groups
    grouped: Tensor = dense.weight.unflatten(0, (groups, -1))
    if isinstance(dense, ConvTranspose):
        grouped = grouped.transpose(1, 2)
    return grouped[(..., *[None] * max(0, 5 - grouped.dim()))]


def native_weight(grouped: Tensor, kind: LayerKind) -> Tensor:
    """Inverse of `dense_weight`: the weight in the layout of the dense layer."""
    if kind.startswith("conv_transpose"):
        grouped = grouped.transpose(1, 2)
    flat = grouped.flatten(0, 1)
    return flat.reshape(flat.shape[: 2 + AXES[kind]])


def as_images(x: Tensor, kind: LayerKind) -> Tensor:
    """What a layer takes or gives, with a batch axis, as (N, channels, *size) with two spatial axes or three."""
    if kind == "linear":
        return x.reshape(-1, x.shape[-1], 1, 1)
    return x[..., None] if AXES[kind] == 1 else x


def pad_by_mode(x: Tensor, dense: nn.Module) -> Tensor:
    """The input of a convolution whose padding mode is not zeros, padded as it says; any other input as it is."""
    if not isinstance(dense, Conv) or dense.padding_mode == "zeros":
        return x
    return F.pad(x, mode_padding(dense), mode=dense.padding_mode)


def mode_padding(conv: Conv) -> list[int]:
    """What `F.pad` takes for a convolution's padding, whatever its mode."""
    return [n for ends in reversed(_padding(conv)) for n in ends]


def image_size(size: Size, dense: nn.Module) -> Size:
    """Spatial size of a convolution's input once it is padded by its mode."""
    if not isinstance(dense, Conv) or dense.padding_mode == "zeros":
        return size
    return tuple(n + sum(ends) for n, ends in zip(size, _padding(dense), strict=True))


def _padding(conv: Conv | ConvTranspose) -> tuple[Pair, ...]:
    """(before, after) of every axis; 'same' puts the odd position after, as torch does."""
    if conv.padding == "valid":
        return ((0, 0),) * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((n, n) for n in cast(Size, conv.padding))

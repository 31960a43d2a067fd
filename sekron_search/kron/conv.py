"""A convolution whose weight is a structure: the drop-in replacement of `nn.Conv2d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import UnsupportedLayerError
from sekron_search.kron.layer import Execution, KroneckerLayer
from sekron_search.kron.plan import ConvGeometry, Pair
from sekron_search.kron.projection import check_weight
from sekron_search.kron.structure import Structure

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class KroneckerConv(KroneckerLayer):
    """A 2-d convolution whose weight (of every group) is a structure; the semantics of `nn.Conv2d`.

    Args:
        structure: The structure of one group's weight; F and C may exceed the group's channels (zero-padded).
        in_channels, out_channels: Of the whole layer.
        stride, padding, dilation, groups, bias, padding_mode: As for `nn.Conv2d`; the kernel is the structure's.
        order: In which the factors run; by default the one of fewest flops for `input_size`.
        execution: "factored" runs the factors; "dense" rebuilds the weight: small on disk, dense in speed.
        input_size: (height, width) for which the order is chosen.
    """

    def __init__(
        self,
        structure: Structure,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
        input_size: Pair | None = None,
    ) -> None:
        kernel = structure.weight_shape[2:]
        conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, dilation, groups, bias, padding_mode, device="meta"
        )
        super().__init__(
            structure,
            conv_geometry(conv),
            (out_channels, in_channels),
            bias=bias,
            order=order,
            execution=execution,
            input_size=input_size,
        )
        self.stride, self.dilation, self.groups = _pair(conv.stride), _pair(conv.dilation), groups
        self.kernel_size: Pair = kernel
        self.padding: Pair | str = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
        self.padding_mode = padding_mode
        (top, bottom), (left, right) = _padding(conv)
        needed = padding_mode != "zeros" and any((top, bottom, left, right))
        #: What the input is padded with beforehand, in the order of `F.pad`; zeros are the convolution's own affair.
        self._mode_padding = [left, right, top, bottom] if needed else None

    @classmethod
    def like(
        cls,
        conv: nn.Conv2d,
        structure: Structure,
        *,
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
        input_size: Pair | None = None,
    ) -> KroneckerConv:
        """A layer that can stand in a convolution's place, all zeros: to load a state dict into.

        Args:
            conv: The dense convolution; it is not changed, and nothing is shared with it.
            structure: The structure of one group's weight.
            order, execution, input_size: As for the class.

        Raises:
            UnsupportedLayerError: If `conv` is not a plain `nn.Conv2d`.
            StructureError: If the structure does not reconstruct the convolution's weight.
        """
        if type(conv) is not nn.Conv2d:
            raise UnsupportedLayerError(f"expected an nn.Conv2d with its weight, got {type(conv).__name__}")
        check_weight(conv_weight(conv), structure)
        layer = cls(
            structure,
            conv.in_channels,
            conv.out_channels,
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            order=order,
            execution=execution,
            input_size=input_size,
        )
        return layer._like(conv)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        structure: Structure,
        *,
        factors: Sequence[Tensor] | None = None,
        order: Sequence[int] | None = None,
        execution: Execution = "factored",
        input_size: Pair | None = None,
    ) -> KroneckerConv:
        """The replacement of a convolution, fitted to its weight.

        Args:
            conv, structure, order, execution, input_size: As for `like`.
            factors: Factors of shapes (G, rank indices, f, c, h, w); fitted by `project` if None.

        Raises:
            UnsupportedLayerError, StructureError: As `like` does.
        """
        layer = cls.like(conv, structure, order=order, execution=execution, input_size=input_size)
        return layer._take(conv, conv_weight(conv), factors)

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with the reconstructed weight."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.weights[0].device,
            dtype=self.weights[0].dtype,
        )
        return self._give(conv)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (N, C, H, W) or (C, H, W)."""
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self._mode_padding is not None:
            x = F.pad(x, self._mode_padding, mode=self.padding_mode)
        return self._run(x)


def conv_geometry(conv: nn.Conv2d) -> ConvGeometry:
    """Stride, dilation, groups and zero padding of a convolution; other padding modes are applied before it."""
    padding = _padding(conv) if conv.padding_mode == "zeros" else ((0, 0), (0, 0))
    return ConvGeometry(_pair(conv.stride), _pair(conv.dilation), padding, conv.groups)


def conv_weight(conv: nn.Conv2d) -> Tensor:
    """The weight with its groups as a leading axis: (G, F, C, Kh, Kw)."""
    weight: Tensor = conv.weight.unflatten(0, (conv.groups, -1))
    return weight


def _padding(conv: nn.Conv2d) -> tuple[Pair, Pair]:
    """(before, after) of both axes; 'same' puts the odd pixel after, as `nn.Conv2d` does."""
    if conv.padding == "valid":
        return (0, 0), (0, 0)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        (top, left), (bottom, right) = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (top, bottom), (left, right)
    height, width = _pair(conv.padding)  # type: ignore[arg-type]
    return (height, height), (width, width)


def _pair(value: int | tuple[int, ...]) -> Pair:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width

"""Convolutions whose weight is a structure: the drop-in replacements of `nn.Conv2d` and `nn.ConvTranspose2d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, Unpack, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sekron_search.errors import DataError
from sekron_search.kron.dense import AXES, Conv, ConvTranspose, as_images, filled, mode_padding
from sekron_search.kron.geometry import Size
from sekron_search.kron.layer import HowToRun, KroneckerLayer
from sekron_search.kron.structure import Structure


class KroneckerConv(KroneckerLayer):
    """A convolution whose weight (of every group) is a structure; the semantics of `nn.Conv1d`, `2d` and `3d`.

    Args:
        dense: The convolution whose place it takes.
        structure: The structure of one group's weight; F and C may exceed the group's channels (zero-padded). That of
            a 1-d convolution has a kernel Kh x 1.
        how: See `HowToRun`.

    Raises:
        UnsupportedLayerError, StructureError: As `KroneckerLayer` does.
    """

    replaces = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def __init__(self, dense: Conv, structure: Structure, **how: Unpack[HowToRun]) -> None:
        super().__init__(dense, structure, **how)
        #: What the input is padded with beforehand, in the order of `F.pad`; zeros are the convolution's own affair.
        self._mode_padding = mode_padding(dense) if dense.padding_mode != "zeros" else []

    @classmethod
    def from_conv(
        cls,
        conv: Conv,
        structure: Structure,
        *,
        factors: Sequence[Tensor] | None = None,
        **how: Unpack[HowToRun],
    ) -> Self:
        """The replacement of a convolution, fitted to its weight.

        Args:
            conv, structure, how: As for the class.
            factors: Factors of shapes (G, rank indices, f, c, *kernel); fitted by `project` if None.

        Raises:
            UnsupportedLayerError, StructureError: As `KroneckerLayer` does.
        """
        return cls._fitted(conv, structure, factors, **how)

    def to_conv(self) -> Conv:
        """The dense convolution with the reconstructed weight."""
        return cast(Conv, self.to_dense())

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x of shape (N, C, *size) or (C, *size), with one to three spatial axes."""
        axes = AXES[self.kind]
        if x.dim() == 1 + axes:
            return self.forward(x[None])[0]
        if any(self._mode_padding):
            x = F.pad(x, self._mode_padding, mode=self.options["padding_mode"])
        out = self._run(as_images(x, self.kind))
        return out.squeeze(-1) if axes == 1 else out


class KroneckerConvTranspose(KroneckerLayer):
    """A transposed convolution whose weight is a structure; the semantics of `nn.ConvTranspose1d`, `2d` and `3d`.

    It is the adjoint of a convolution: the plan of that convolution runs backwards, each step transposed.

    Args:
        dense: The transposed convolution whose place it takes.
        structure: The structure of one group's weight, F its out-channels and C its in-channels; F and C may exceed
            the group's channels (zero-padded). That of a 1-d convolution has a kernel Kh x 1.
        how: See `HowToRun`.

    Raises:
        UnsupportedLayerError, StructureError: As `KroneckerLayer` does.
    """

    replaces = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @classmethod
    def from_conv(
        cls,
        conv: ConvTranspose,
        structure: Structure,
        *,
        factors: Sequence[Tensor] | None = None,
        **how: Unpack[HowToRun],
    ) -> Self:
        """The replacement of a transposed convolution, fitted to its weight; see `KroneckerConv.from_conv`."""
        return cls._fitted(conv, structure, factors, **how)

    def to_conv(self) -> ConvTranspose:
        """The dense transposed convolution with the reconstructed weight."""
        return cast(ConvTranspose, self.to_dense())

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Convolve x, transposed.

        Args:
            x: Of shape (N, C, *size) or (C, *size), with one to three spatial axes.
            output_size: Spatial size of the output, where `output_padding` shall not decide it.

        Raises:
            DataError: If no output padding gives that size.
        """
        axes = AXES[self.kind]
        if x.dim() == 1 + axes:
            return self.forward(x[None], output_size)[0]
        padding = self.options["output_padding"]
        if output_size is not None:
            padding = self._output_padding(tuple(int(n) for n in x.shape[2:]), tuple(output_size)[-axes:])
        out = self._run(as_images(x, self.kind), filled(tuple(padding), self.kind, 0))
        return out.squeeze(-1) if axes == 1 else out

    def _output_padding(self, size: Size, wanted: Size) -> Size:
        axes = AXES[self.kind]
        least = self.geometry.transposed_size(filled(size, self.kind, 1), self.structure.kernel, (0,) * max(axes, 2))
        extra = tuple(int(n) - m for n, m in zip(wanted, least, strict=False))
        if len(extra) < axes or any(not 0 <= n < s for n, s in zip(extra, self.geometry.stride, strict=False)):
            most = tuple(n + s - 1 for n, s in zip(least, self.geometry.stride, strict=True))
            raise DataError(
                f"output_size: an input of size {size} can give sizes from {least[:axes]} to {most[:axes]}, "
                f"got {wanted}"
            )
        return extra

"""What a convolution does besides its weight, for any number of spatial axes."""

from __future__ import annotations

from dataclasses import dataclass

#: (before, after) an axis, or (out-channels, in-channels).
Pair = tuple[int, int]

#: One number per spatial axis.
Size = tuple[int, ...]


@dataclass(frozen=True)
class ConvGeometry:
    """What a convolution does besides its weight, one entry per spatial axis.

    Args:
        stride, dilation: Of every axis.
        padding: Zeros (before, after) every axis.
        groups: Number of groups.
        transposed: Whether the layer is the adjoint of this convolution, as `nn.ConvTranspose2d` is.
    """

    stride: Size = (1, 1)
    dilation: Size = (1, 1)
    padding: tuple[Pair, ...] = ((0, 0), (0, 0))
    groups: int = 1
    transposed: bool = False

    def output_size(self, input_size: Size, kernel: Size) -> Size:
        """Size of the convolution's output for an input of that size; of a transposed one's input for its output."""
        return tuple(
            last // stride + 1 for last, stride in zip(self._last(input_size, kernel), self.stride, strict=True)
        )

    def unread(self, input_size: Size, kernel: Size) -> Size:
        """Positions at the end of the padded input that no kernel reaches; a transposed one's output padding."""
        return tuple(last % stride for last, stride in zip(self._last(input_size, kernel), self.stride, strict=True))

    def _last(self, input_size: Size, kernel: Size) -> Size:
        """Where the kernel starts when it stands at the end of the padded input."""
        sizes = zip(input_size, self.padding, self.dilation, kernel, strict=True)
        return tuple(n + sum(pad) - dilation * (k - 1) - 1 for n, pad, dilation, k in sizes)

    def transposed_size(self, size: Size, kernel: Size, output_padding: Size) -> Size:
        """Size of a transposed convolution's output for an input of that size: inverse of `output_size`."""
        spans = self._last((0,) * len(size), kernel)
        sizes = zip(size, self.stride, spans, output_padding, strict=True)
        return tuple((n - 1) * stride - span + extra for n, stride, span, extra in sizes)

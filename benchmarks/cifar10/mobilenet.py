"""Inverted residual blocks with depthwise convolutions, for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

STEM, HEAD = 16, 256

#: Of every stage: how much a block widens, its out-channels, number of blocks, stride of the first.
STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 3, 1), (4, 64, 3, 2), (4, 96, 2, 1))


def conv_norm(before: int, channels: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size of the image, but for its stride, and its batch-norm."""
    conv = nn.Conv2d(before, channels, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class Block(nn.Module):
    """Widen, convolve every channel by itself, narrow; added to the input where shapes allow it."""

    def __init__(self, before: int, channels: int, widen: int, stride: int) -> None:
        super().__init__()
        wide = before * widen
        layers = [*conv_norm(before, wide, 1), nn.ReLU6()] if widen > 1 else []
        layers += [*conv_norm(wide, wide, 3, stride=stride, groups=wide), nn.ReLU6(), *conv_norm(wide, channels, 1)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        out: Tensor = self.layers(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """Logits of ten classes for images (N, 3, 32, 32).

    Args:
        width: Factor of all channels.

    Source: after Sandler et al. 2018, with fewer blocks and strides.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        before, head = (max(round(c * width), 1) for c in (STEM, HEAD))
        layers: list[nn.Module] = [*conv_norm(3, before, 3), nn.ReLU6()]
        for widen, out, count, stride in STAGES:
            channels = max(round(out * width), 1)
            for index in range(count):
                layers.append(Block(before, channels, widen, stride if index == 0 else 1))
                before = channels
        layers += [*conv_norm(before, head, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(head, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.linear(self.features(x))
        return logits

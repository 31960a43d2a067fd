"""An EDSR-like network for twofold super-resolution: no batch-norm, residual blocks, pixel shuffle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS, BLOCKS = 48, 8

#: Mean colour of natural images, taken away at the start and added at the end.
MEAN = (0.4488, 0.4371, 0.4040)


class Block(nn.Module):
    """Two convolutions, added to their input.

    Args:
        width: Channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        out: Tensor = x + self.conv2(torch.relu(self.conv1(x)))
        return out


class Edsr(nn.Module):
    """Images in [0, 1], (N, 3, H, W), at twice their size, (N, 3, 2 H, 2 W).

    Args:
        width: Factor of all channels.
        blocks: Their number.

    Source: Lim et al. 2017, Enhanced Deep Residual Networks for Single Image Super-Resolution.
    """

    mean: Tensor

    def __init__(self, width: float = 1.0, blocks: int = BLOCKS) -> None:
        super().__init__()
        channels = max(round(CHANNELS * width), 1)
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.body_end = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsample = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The larger image."""
        features = self.head(x - self.mean)
        features = features + self.body_end(self.body(features))
        out: Tensor = self.tail(self.shuffle(self.upsample(features))) + self.mean
        return out

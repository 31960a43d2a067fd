"""ResNet-20 for CIFAR-10 (He et al. 2015, Sec. 4.2), with parameter-free shortcuts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        before = (channels - in_channels) // 2
        self.added = before, channels - in_channels - before

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.added))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """Logits of ten classes for images (N, 3, 32, 32).

    Args:
        width: Factor of all channels.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        a, b, c = (max(round(n * width), 1) for n in (16, 32, 64))
        self.conv1 = nn.Conv2d(3, a, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(Block(a, a, 1), Block(a, a, 1), Block(a, a, 1))
        self.layer2 = nn.Sequential(Block(a, b, 2), Block(b, b, 1), Block(b, b, 1))
        self.layer3 = nn.Sequential(Block(b, c, 2), Block(c, c, 1), Block(c, c, 1))
        self.linear = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits

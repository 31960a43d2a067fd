"""ResNet-18 (He et al. 2015) for images of 224x224, with random weights, for measuring speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths, blocks, channels = (64, 128, 256, 512), [], 64
        for stage, width in enumerate(widths):
            blocks += [Block(channels, width, 1 if stage == 0 else 2), Block(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))
        return logits


#: Singular values of the channels fall like this power of their number, about as in trained networks.
DECAY = 0.5


def resnet18(seed: int = 0) -> nn.Module:
    """The network, its weights random but for their spectra, from a seed.

    Weights without any structure would make structures of one rank look almost as good as those of half the ranks, and
    a search would then remove layers instead of factorizing them. Activations keep their scale from layer to layer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet18()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                module.weight.data = _decaying(module.weight.data)
    return model.eval()


def _decaying(weight: Tensor) -> Tensor:
    """The weight (F, C, h, w) with decaying spectra of both channel modes, its norm kept."""
    f, c = weight.shape[:2]
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (f, c))
    scales = [torch.arange(1, n + 1) ** -DECAY for n in (f, c)]
    shaped: Tensor = torch.einsum("fi,i,ijhw,j,cj->fchw", left, scales[0], weight, scales[1], right)
    scaled: Tensor = shaped * (weight.norm() / shaped.norm())
    return scaled

"""ResNet-18 and its relatives (He et al. 2015) for images of 224x224, with random weights, for measuring speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, the last of which has four times as many channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, self.expansion * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(self.expansion * channels)
        self.downsample = shortcut(in_channels, self.expansion * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """What leads around a block: nothing, or a 1x1 convolution where the shape changes."""
    if stride == 1 and in_channels == channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


#: Kind of block, and number of blocks per stage, by depth.
DEPTHS: dict[int, tuple[type[Block | Bottleneck], tuple[int, ...]]] = {
    18: (Block, (2, 2, 2, 2)),
    34: (Block, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """The network of a depth.

    Args:
        depth: Of `DEPTHS`.
        width: All numbers of channels but those of the image and of the classes are multiplied by it.
    """

    def __init__(self, depth: int = 18, width: float = 1.0) -> None:
        super().__init__()
        block, counts = DEPTHS[depth]
        widths = [int(width * n) for n in (64, 128, 256, 512)]
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks: list[nn.Module] = []
        for stage, (number, own) in enumerate(zip(counts, widths, strict=True)):
            for i in range(number):
                blocks.append(block(channels, own, 2 if stage > 0 and i == 0 else 1))
                channels = block.expansion * own
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))
        return logits


#: Singular values of the channels fall like this power of their number, about as in trained networks.
DECAY = 0.5


def resnet18(seed: int = 0) -> nn.Module:
    """ResNet-18 as `resnet` gives it."""
    return resnet(seed=seed)


def resnet(depth: int = 18, width: float = 1.0, seed: int = 0) -> nn.Module:
    """The network, its weights random but for their spectra, from a seed.

    Weights without any structure would make structures of one rank look almost as good as those of half the ranks, and
    a search would then remove layers instead of factorizing them. Activations keep their scale from layer to layer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(depth, width)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                module.weight.data = _decaying(module.weight.data)
    return model.eval()


def correlated_images(count: int, size: int, seed: int = 0) -> Tensor:
    """(count, 3, size, size) random images whose power falls with the frequency as that of natural ones."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    amplitude = 1 / (rows.square() + columns.square()).sqrt().clamp_min(1 / size)
    images = torch.empty(count, 3, size, size)
    colours = torch.linalg.cholesky(0.1 * torch.eye(3) + 0.9)  # of a pixel: about alike
    for i in range(count):
        noise = torch.randn(3, size, size, generator=generator)
        grey = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(size, size))
        images[i] = torch.einsum("ij,jhw->ihw", colours, grey / grey.std())
    return images


def _decaying(weight: Tensor) -> Tensor:
    """The weight (F, C, h, w) with decaying spectra of both channel modes, its norm kept."""
    f, c = weight.shape[:2]
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (f, c))
    scales = [torch.arange(1, n + 1) ** -DECAY for n in (f, c)]
    shaped: Tensor = torch.einsum("fi,i,ijhw,j,cj->fchw", left, scales[0], weight, scales[1], right)
    scaled: Tensor = shaped * (weight.norm() / shaped.norm())
    return scaled

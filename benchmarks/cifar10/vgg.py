"""A network of plain convolutions without residual connections, for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

#: Channels of a stage's two convolutions; every stage but the first halves the image before.
CHANNELS = (32, 64, 128, 256)


class Vgg(nn.Module):
    """Logits of ten classes for images (N, 3, 32, 32).

    Args:
        width: Factor of all channels.

    Source: after Simonyan and Zisserman 2015, with batch-norm, narrower and with one linear layer.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage, channels in enumerate(max(round(c * width), 1) for c in CHANNELS):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(2):
                layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.linear(self.features(x))
        return logits
